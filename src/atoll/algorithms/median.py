"""Medians and trimmed means, number by number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from atoll.algorithms.algorithm import Algorithm
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.folds import coordinatewise
from atoll.errors import PlanError
from atoll.vector import Flat

_LEAST = 3


def median() -> Algorithm:
    """Take the median of the nodes' updates at each place, every node with one voice.

    Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", definition 1.
    """
    return fedavg()._replace(fold=coordinatewise(middle), least=_LEAST, robust=True)


def trimmed_mean(trim: float = 0.2) -> Algorithm:
    """Leave out the largest and the smallest numbers at each place, and take the mean of the others.

    Args:
        trim: the part that is left out at either end, in [0, 0.5); rounded up to whole nodes, and one at least stays.

    Raises:
        PlanError: an option out of its range.

    Source: Yin et al. 2018, definition 2.
    """
    if not 0 <= trim < 0.5:
        raise PlanError(f"aggregation.options.trim: it lies in [0, 0.5), as much at either end; it is {trim}")

    def trimmed(table: NDArray[np.floating]) -> Flat:
        count = len(table)
        out = min(math.ceil(trim * count - 1e-9), (count - 1) // 2)
        kept: Flat = np.mean(ordered(table)[out : count - out], axis=0)
        return kept

    return fedavg()._replace(fold=coordinatewise(trimmed), least=_LEAST, robust=True)


def middle(table: NDArray[np.floating]) -> Flat:
    """Return the median of each column of `[updates, block]`, whose numbers it puts in another order."""
    rows, half, upper = ordered(table), table.dtype.type(0.5), len(table) // 2
    # Halved before they are added: two large numbers must not overflow.
    centre: Flat = rows[upper] if len(rows) % 2 else rows[upper - 1] * half + rows[upper] * half
    return centre


def ordered(table: NDArray[np.floating]) -> list[Flat]:
    """Sort each column of `[updates, block]`, and return the rows; two whole rows are compared at a time.

    Two to five times as fast as `np.sort(axis=0)`, which goes through each column by itself.
    """
    rows, spare = list(table), np.empty_like(table[0])
    for low, high in _network(len(rows)):
        np.minimum(rows[low], rows[high], out=spare)
        np.maximum(rows[low], rows[high], out=rows[high])
        rows[low], spare = spare, rows[low]
    return rows


@lru_cache(maxsize=8)
def _network(count: int) -> tuple[tuple[int, int], ...]:
    """Return the places to compare and exchange, in turn, to sort so many: Batcher's odd-even merge sort.

    Source: Knuth, The Art of Computer Programming, volume 3, algorithm 5.2.2M.
    """
    return tuple(_exchanges(count))


def _exchanges(count: int) -> Iterator[tuple[int, int]]:
    part = 1
    while part < count:
        step = part
        while step:
            for start in range(step % part, count - step, 2 * step):
                for place in range(start, min(start + step, count - step)):
                    if place // (2 * part) == (place + step) // (2 * part):
                        yield place, place + step
            step //= 2
        part *= 2
