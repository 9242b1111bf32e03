"""Clipping: no update longer than a bound, over all its groups together; and updates in whole steps that are no longer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.vector import Flat, Group, Groups

STEPS = 1 << 20
"""Steps of the grid that the bound is cut into: so fine that cutting numbers to it costs nothing."""
_ROOM = 1 - 2.0**-30
"""Of the bound, what is used: sums of squares are rounded, maybe down, and no update may end up longer."""
_BLOCK = 1 << 16


def squares(values: Flat) -> float:
    """Return the sum of squares, added up in float64: in float32 a large number hides small ones, and a bound would be passed."""
    with np.errstate(over="ignore", invalid="ignore"):
        parts = (values[lo : lo + _BLOCK] for lo in range(0, values.size, _BLOCK))
        return float(sum(np.square(part, dtype=np.float64).sum() for part in parts))


def length(groups: Groups) -> float:
    """Return the Euclidean norm of all groups together."""
    return math.sqrt(sum(squares(group.values) for group in groups.values()))


def shortened(norm: float, bound: float) -> float:
    """Return what an update of a length is multiplied with, so that it is no longer than the bound: at most 1."""
    return min(1.0, bound * _ROOM / norm) if norm > 0 else 1.0


def clipped(groups: Groups, bound: float) -> tuple[dict[str, Group], float]:
    """Return groups no longer together than a bound, all made smaller alike, and how long they were."""
    norm = length(groups)
    scale = shortened(norm, bound)
    if scale == 1.0:
        return dict(groups), norm
    return {name: group.with_values(group.values * scale) for name, group in groups.items()}, norm


def whole(values: Flat, scale: float) -> NDArray[Any]:
    """Return values · scale as whole float64 numbers, cut towards zero: so none, nor their length, gets larger."""
    steps = np.multiply(values, scale, dtype=np.float64)
    return np.trunc(steps, out=steps)
