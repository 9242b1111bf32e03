"""From what a node holds to rows a model takes, as the plan's `[data]` says.

Enters: a table file, or arrays. Leaves: `Data`. Rank 2: knows plans and learners' rows; imported by the
runtimes and the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoll.learner import Data
from atoll.plan import Plan
from atoll.preprocess.table import from_arrays, read

__all__ = ["prepare"]


def prepare(source: str | Path | Sequence[Any], plan: Plan) -> Data:
    """Return the rows behind a node's source of data.

    Args:
        source: a CSV file, or arrays `(x, y)` or `(x, y, x_test, y_test)`.
        plan: whose `[data]` says what to make of it.

    Raises:
        DataError: one line with the place and the mend.
    """
    return read(Path(source), plan) if isinstance(source, (str, Path)) else from_arrays(source, plan)
