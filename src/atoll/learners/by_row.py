"""Gradients of single rows: how many are taken side by side, and how each is made no longer than a bound.

Learners compute them with arrays of their own framework, and so does this: any that has numpy's names for a few functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TOGETHER, _NUMBERS = 256, 1 << 21
"""Rows, and numbers, of which gradients are taken side by side: what fills no cache is slower, by four times on JAX."""
ROOM = 1 - 1e-4
"""Of a bound on lengths, what is used: lengths are computed in float32."""


def together(parameters: int, rows: int) -> int:
    """Return of how many rows gradients are taken side by side: a power of two, so that few sizes are compiled.

    >>> together(10, 1000), together(10, 20), together(1 << 20, 1000), together(1 << 30, 1000)
    (256, 32, 2, 1)
    """
    most = min(_TOGETHER, max(1, _NUMBERS // parameters))
    return int(1 << (min(most, 1 << (rows - 1).bit_length()).bit_length() - 1))


def filled(parameters: int, rows: int) -> Iterator[tuple[NDArray[np.intp], NDArray[np.bool_]]]:
    """Return the numbers of the rows of each block, all of one size, and which of them are there: the last block is filled up.

    >>> [(which.tolist(), there.tolist()) for which, there in filled(1 << 20, 3)]
    [([0, 1], [True, True]), ([2, 2], [True, False])]
    """
    size = together(parameters, rows)
    for lo in range(0, rows, size):
        places = np.arange(lo, lo + size)
        yield np.minimum(places, rows - 1), places < rows


def whole(xp: Any, gradients: Any, bound: Any, steps: Any) -> Any:
    """Return gradients `[rows, p]` in whole steps of bound/steps, each row no longer than the bound; cut towards zero.

    A gradient that isn't finite counts as nothing.

    >>> whole(np, np.array([[3.0, -4.0], [0.25, 0.0], [np.inf, 1.0]]), 1.0, 100)
    array([[ 59., -79.],
           [ 25.,   0.],
           [  0.,   0.]])

    Args:
        xp: numpy, or what has its `sqrt`, `sum`, `isfinite`, `where`, `trunc`, `ones_like` and `zeros_like`.
        gradients: float32 of that framework.
        bound: the longest that a row's gradient may be.
        steps: into so many the bound is cut.
    """
    lengths = xp.sqrt(xp.sum(gradients * gradients, axis=1))
    there, one = xp.isfinite(lengths), xp.ones_like(lengths)
    short = xp.where(there & (lengths > bound * ROOM), bound * ROOM / lengths, one)
    steps_in = xp.where(there[:, None], gradients, xp.zeros_like(gradients)) * (short * (steps / bound))[:, None]
    return xp.trunc(steps_in)
