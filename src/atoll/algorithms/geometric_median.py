"""The geometric median of the nodes' updates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from atoll.algorithms.algorithm import Algorithm
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.folds import combination, distances
from atoll.errors import PlanError

_STILL = 1e-12


def geometric_median(smoothing: float = 1e-6, iterations: int = 100, *, weighted: bool = False) -> Algorithm:
    """Take the point whose summed distance to the nodes' updates is least, by smoothed Weiszfeld steps.

    Each step's point is a weighted mean of updates, so its distances follow from their inner products, and no step but
    the last reads the updates.

    Args:
        smoothing: ν: distances count as no less.
        iterations: so many steps at most; it ends where they move nothing any more.
        weighted: by rows, as in the paper; but how many rows a node has is its own word.

    Raises:
        PlanError: an option out of its range.

    Source: Pillutla et al. 2022, "Robust Aggregation for Federated Learning", algorithm 2.
    """
    if not (smoothing > 0 and type(iterations) is int and iterations >= 1):
        raise PlanError(f"aggregation.options: smoothing and iterations are above 0; they are {smoothing} and {iterations}")

    def weigh(gram: NDArray[np.float64], weights: Sequence[float]) -> tuple[Sequence[float], float]:
        voices = np.asarray(weights) if weighted else np.ones(len(weights))
        voices = voices / voices.sum()
        away, parts = distances(gram), voices
        for _ in range(iterations):
            # ‖Σ cⱼxⱼ − xₖ‖² = Σ cⱼDⱼₖ − ½ Σ cᵢcⱼDᵢⱼ, where Σ cⱼ = 1.
            pulls = (away * parts).sum(axis=1)
            to_point = np.sqrt(np.maximum(pulls - (pulls * parts).sum() / 2, 0.0))
            closer = voices / np.maximum(to_point, smoothing)
            closer /= closer.sum()
            # What is so far away pulls no more; kept, its square would drown the others' distances.
            closer[closer < _STILL] = 0.0
            moved, parts = np.abs(closer - parts).max(), closer
            if moved < _STILL:
                break
        return parts.tolist(), float(parts.sum())

    return fedavg()._replace(fold=combination(weigh), least=3, robust=True)
