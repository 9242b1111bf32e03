"""Rules that trust the updates which lie closest to others: Krum, Multi-Krum, Bulyan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from atoll.algorithms.algorithm import Algorithm, Bodies
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.folds import combination, coordinatewise, distances, gram
from atoll.algorithms.median import middle
from atoll.errors import PlanError
from atoll.vector import Flat, Total

Matrix = NDArray[np.float64]


def krum(f: int | None = None) -> Algorithm:
    """Take the one update that lies closest to its n − f − 2 nearest others.

    Args:
        f: how many nodes may be hostile, n ≥ 2f + 3; without it, as many as that allows in each round.

    Raises:
        PlanError: an option out of its range.

    Source: Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", section 4.
    """

    def weigh(products: Matrix, weights: Sequence[float]) -> tuple[Sequence[float], float]:
        scores = _scores(distances(products), _hostile(f, len(weights), 2))
        return _only([int(np.argmin(scores))], len(weights)), 1.0

    return fedavg()._replace(fold=combination(weigh), least=_least(f, 2), robust=True)


def multi_krum(f: int | None = None, m: int | None = None) -> Algorithm:
    """Take the mean of the m updates that Krum ranks first.

    Args:
        f: as for `krum`.
        m: how many are taken; without it n − f.

    Raises:
        PlanError: an option out of its range.

    Source: Blanchard et al. 2017, section 5.
    """
    if not (m is None or (type(m) is int and m >= 1)):
        raise PlanError(f"aggregation.options.m: it is a whole number from 1 up; it is {m}")

    def weigh(products: Matrix, weights: Sequence[float]) -> tuple[Sequence[float], float]:
        count = len(weights)
        hostile = _hostile(f, count, 2)
        taken = min(m or count - hostile, count)
        best = np.argsort(_scores(distances(products), hostile), kind="stable")[:taken]
        return _only(best.tolist(), count), float(taken)

    return fedavg()._replace(fold=combination(weigh), least=max(_least(f, 2), m or 0), robust=True)


def bulyan(f: int | None = None) -> Algorithm:
    """Choose n − 2f updates by Krum, one after the other; at each place take the mean of the n − 4f nearest to their median.

    Args:
        f: how many nodes may be hostile, n ≥ 4f + 3; without it, as many as that allows in each round.

    Raises:
        PlanError: an option out of its range.

    Source: El Mhamdi et al. 2018, "The Hidden Vulnerability of Distributed Learning in Byzantium", section 4.
    """

    def fold(bodies: Bodies, weights: Sequence[float], registered: int) -> Total:
        count = len(weights)
        hostile = _hostile(f, count, 4)
        chosen = _chosen(distances(gram(bodies)), hostile)
        return coordinatewise(lambda table: _nearest(table[chosen], count - 4 * hostile))(bodies, weights, registered)

    return fedavg()._replace(fold=fold, least=_least(f, 4), robust=True)


def _scores(away: Matrix, hostile: int) -> Matrix:
    """The sum of each update's squared distances to its n − f − 2 nearest others, `[updates]`."""
    near = max(len(away) - hostile - 2, 1)
    others = np.sort(away + np.diag(np.full(len(away), np.inf)), axis=1)
    scores: Matrix = others[:, :near].sum(axis=1)
    return scores


def _only(places: Sequence[int], count: int) -> list[float]:
    return [float(place in places) for place in range(count)]


def _chosen(away: Matrix, hostile: int) -> list[int]:
    """Bulyan's choice: n − 2f updates, each the best of those that are left."""
    left, chosen = list(range(len(away))), []
    for _ in range(len(away) - 2 * hostile):
        best = left[int(np.argmin(_scores(away[np.ix_(left, left)], hostile)))]
        left.remove(best)
        chosen.append(best)
    return sorted(chosen)


def _nearest(table: NDArray[np.floating], keep: int) -> Flat:
    """Return the mean of the numbers of each column of `[updates, block]` that are nearest to its median."""
    centre = middle(table.copy())
    nearest = np.argsort(np.abs(table - centre), axis=0, kind="stable")[:keep]
    kept: Flat = np.take_along_axis(table, nearest, axis=0).mean(axis=0)
    return kept


def _hostile(f: int | None, count: int, times: int) -> int:
    """How many nodes of a round may be hostile: as the plan says, or the most that n ≥ times · f + 3 allows."""
    return (count - 3) // times if f is None else f


def _least(f: int | None, times: int) -> int:
    """How many nodes a round needs at least.

    Raises:
        PlanError: `f` is no number of nodes.
    """
    if not (f is None or (type(f) is int and f >= 0)):
        raise PlanError(f"aggregation.options.f: how many nodes may be hostile is a whole number; it is {f!r}")
    return times * (1 if f is None else f) + 3
