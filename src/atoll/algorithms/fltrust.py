"""Trust by what the server itself learns from a few rows of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from atoll.algorithms.algorithm import Algorithm, Bodies
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.folds import along, scaled_sum
from atoll.vector import Flat, Total


def fltrust() -> Algorithm:
    """Weigh each node's update by how far it points where the server's own does, all of them as long as that one.

    The server trains on rows of its own as a node does: g₀. With cᵢ the cosine of gᵢ and g₀, the model moves by
    Σ max(cᵢ, 0) ‖g₀‖/‖gᵢ‖ gᵢ / Σ max(cᵢ, 0). Where nobody's update points there, it stays where it is.

    Source: Cao et al. 2021, "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping", equations 2 to 4.
    """
    return fedavg()._replace(fold=_fold, root=True, late=None, robust=True)  # it takes every update at one length


def _fold(bodies: Bodies, weights: Sequence[float], registered: int) -> Total:
    del weights  # how many rows a node has is its own word
    trust, scales = _trusted(*along(_WithReference(bodies)))
    return scaled_sum(bodies, scales.tolist(), float(trust.sum()) or 1.0, registered)


def _trusted(squares: NDArray[np.float64], products: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each update's trust, and what it is multiplied with; the server's own comes last."""
    *lengths, own = np.maximum(np.sqrt(squares), np.finfo(np.float64).tiny)
    trust: NDArray[np.float64] = np.maximum(products[:-1] / lengths / own, 0.0)
    return trust, trust * np.sqrt(squares[-1]) / lengths


class _WithReference:
    """The nodes' updates, and the server's own after them."""

    def __init__(self, bodies: Bodies) -> None:
        if bodies.reference is None:
            raise ValueError("this fold needs the server's own update")
        self.ids, self.layouts, self.reference = [*bodies.ids, ""], bodies.layouts, bodies.reference
        self._bodies = bodies

    def block(self, group: str, lo: int, hi: int) -> Sequence[Flat]:
        return [*self._bodies.block(group, lo, hi), self.reference[group].values[lo:hi]]
