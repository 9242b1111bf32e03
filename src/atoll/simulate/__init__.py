"""Simulation: the server's own machine and `close` over clients in memory, one at a time.

Enters: a plan and clients' data. Leaves: the run's history and its final model, the same bits that a
deployed federation of nodes with these names would give. May import ranks 0 to 4.
"""

import sys
from types import ModuleType
from typing import Any

from atoll.simulate.run import Simulated, simulate

__all__ = ["Simulated", "simulate"]


class _Callable(ModuleType):
    """`atoll.simulate` is this folder and the function in it: whichever was imported first, a call runs the plan."""

    def __call__(self, *args: Any, **options: Any) -> Simulated:
        return simulate(*args, **options)


sys.modules[__name__].__class__ = _Callable
