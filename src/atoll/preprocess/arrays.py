"""Arrays as blocks: given from Python, or by whoever reads arrays from somewhere."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol

import numpy as np

from atoll.errors import DataError
from atoll.plan import Plan
from atoll.preprocess.batch import Block, Source


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...


def check(x: _Shaped, y: _Shaped, plan: Plan, where: str) -> None:
    """Check that `x` of shape `[rows, …]` and `y` of shape `[rows]` are numbers that fit each other and the plan.

    Raises:
        DataError: they don't.
    """
    if x.shape[:1] != y.shape[:1] or not x.shape or x.dtype.kind not in "fiub" or y.dtype.kind not in "fiub":
        raise DataError(
            f"{where}: x of shape {x.shape} ({x.dtype}) and y of shape {y.shape} ({y.dtype}): "
            "give as many rows of numbers as targets"
        )
    if plan.inputs is not None and x.shape[1:] != (plan.inputs,):
        raise DataError(f"{where}: rows of shape {x.shape[1:]}, the plan's model takes {plan.inputs} numbers")


def source(given: Sequence[Any], plan: Plan, where: str = "data") -> Source:
    """Return arrays `(x, y)` or `(x, y, x_test, y_test)` as a source; `x` has the rows' shape `[rows, …]`.

    Raises:
        DataError: they don't fit each other or the plan.
    """
    fields = tuple(given)  # of `Rows`, len() counts the rows
    if len(fields) not in (2, 4):
        raise DataError(f"{where}: {len(fields)} arrays; give (x, y), or (x, y, x_test, y_test)")
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(fields[::2], fields[1::2], strict=True)]
    for x, y in pairs:
        check(x, y, plan, where)

    def blocks() -> Generator[Block, None, None]:
        for number, (x, y) in enumerate(pairs):
            yield Block(x, y, np.full(len(x), number == 1), len(x))

    return Source(where, blocks, sum(len(x) for x, _ in pairs))
