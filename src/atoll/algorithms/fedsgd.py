"""FedSGD: one step a round along the gradient over all rows of all nodes."""

from __future__ import annotations

import numpy as np

from atoll.algorithms.algorithm import Algorithm, Memory
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.local import gradient, only
from atoll.learner import Learner, Rows
from atoll.training import Pace
from atoll.vector import Groups, Update


def fedsgd(*, weighted: bool = True) -> Algorithm:
    """Step once along the nodes' whole gradients: w ← w − η Σ (nₖ/n) ∇Fₖ(w).

    A node goes through its rows once, in mini-batches that only say how much lies in memory at a time; `epochs` and `steps`
    mean nothing to it. η is the plan's learning rate.

    Args:
        weighted: by rows, as in the paper; else each node has one voice.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", section 2.
    """
    return fedavg(weighted=weighted)._replace(local=_local, needs=frozenset({"correct"}))


def _local(
    learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
) -> tuple[Memory, Update]:
    down, after = gradient(learner, brief, rows, pace, rng)
    received = only(brief, learner.layouts)
    moves = {name: group.with_values(after[name].values - group.values) for name, group in received.items()}
    step = received["parameters"].with_values(-pace.learning_rate * down)
    return memory, Update({**moves, "parameters": step}, float(len(rows)))
