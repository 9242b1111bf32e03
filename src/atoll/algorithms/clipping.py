"""Rules that let no update pull further than a bound: norm clipping and centered clipping."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from atoll.algorithms.algorithm import Algorithm
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.folds import combination
from atoll.errors import PlanError


def norm_clipping(bound: float | None = None, *, weighted: bool = False) -> Algorithm:
    """Scale updates longer than a bound down to it, then take the mean.

    Args:
        bound: the longest that an update may be (Euclidean norm); without it, the median of the round's norms.
        weighted: by rows, as in the paper; but how many rows a node has is its own word.

    Raises:
        PlanError: an option out of its range.

    Source: Sun et al. 2019, "Can You Really Backdoor Federated Learning?", section 4.
    """
    _check_above_0("bound", bound)

    def weigh(gram: NDArray[np.float64], weights: Sequence[float]) -> tuple[Sequence[float], float]:
        voices = np.asarray(weights) if weighted else np.ones(len(weights))
        scales = voices * _short(np.sqrt(gram.diagonal()), bound)
        return scales.tolist(), float(voices.sum())

    return fedavg()._replace(fold=combination(weigh), robust=True)


def centered_clipping(radius: float | None = None, iterations: int = 3) -> Algorithm:
    """Move a centre by the mean of the updates as seen from it, each clipped to a radius; begin at no move at all.

    The paper begins at the last round's result; here every round stands alone, so that a replay needs no more than its
    updates, and more iterations make up for it.

    Args:
        radius: τ; without it, the median of the distances to the centre, anew in each iteration.
        iterations: how many.

    Raises:
        PlanError: an option out of its range.

    Source: Karimireddy et al. 2021, "Learning from History for Byzantine Robust Optimization", algorithm 2.
    """
    _check_above_0("radius", radius)
    if not (type(iterations) is int and iterations >= 1):
        raise PlanError(f"aggregation.options.iterations: it is a whole number from 1 up; it is {iterations!r}")

    def weigh(gram: NDArray[np.float64], weights: Sequence[float]) -> tuple[Sequence[float], float]:
        count = len(weights)
        centre = np.zeros(count)  # as parts of the updates: Σ cₖxₖ
        for _ in range(iterations):
            along = (gram * centre).sum(axis=1)
            squares = gram.diagonal() - 2 * along + (along * centre).sum()
            pulls = _short(np.sqrt(np.maximum(squares, 0.0)), radius)
            centre = centre * (1 - pulls.mean()) + pulls / count
        return centre.tolist(), 1.0

    return fedavg()._replace(fold=combination(weigh), robust=True)


def _short(lengths: NDArray[np.float64], bound: float | None) -> NDArray[np.float64]:
    """Return what lengths are multiplied with so that none exceeds a bound, by default their median: min(1, τ / ‖x‖)."""
    most = float(np.median(lengths)) if bound is None else bound
    scales: NDArray[np.float64] = most / np.maximum(lengths, most) if most else (lengths == 0).astype(np.float64)
    return scales


def _check_above_0(option: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise PlanError(f"aggregation.options.{option}: it is above 0, or left out; it is {value}")
