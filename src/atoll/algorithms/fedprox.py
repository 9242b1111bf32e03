"""FedProx: a node that trains for long is held near the model it received."""

from __future__ import annotations

import numpy as np

from atoll.algorithms.algorithm import Algorithm, Memory
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.local import pulling, trained
from atoll.algorithms.options import at_least_0
from atoll.learner import Learner, Rows
from atoll.training import Pace
from atoll.vector import Groups, Update


def fedprox(mu: float = 0.01, *, weighted: bool = True) -> Algorithm:
    """Fit Fₖ(w) + (μ/2) ‖w − wᵗ‖², where wᵗ is the received model; then average.

    Args:
        mu: μ, how strong the pull back to the received model is; with 0 it is FedAvg.
        weighted: by rows; else each node has one voice.

    Raises:
        PlanError: an option out of its range.

    Source: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", eq. 2 and Algorithm 2.
    """
    at_least_0(mu=mu)

    def local(
        learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        return memory, trained(learner, brief, rows, pace, rng, pulling(mu, brief["parameters"].values) if mu else None)

    return fedavg(weighted=weighted)._replace(local=local, needs=frozenset({"correct"} if mu else ()))
