"""Ditto: beside the federation's model, each node fits one of its own that stays near it."""

from __future__ import annotations

import numpy as np

from atoll.algorithms.algorithm import Algorithm, Memory
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.local import only, pulling, trained
from atoll.algorithms.options import at_least_0
from atoll.learner import Learner, Rows
from atoll.training import Pace
from atoll.vector import Groups, Update


def ditto(pull: float = 0.1, *, weighted: bool = True) -> Algorithm:
    """FedAvg, and on each node vₖ that lowers Fₖ(v) + (λ/2) ‖v − wᵗ‖², by as many steps again.

    Args:
        pull: λ, how near vₖ stays to the received model wᵗ; with 0 each node trains alone.
        weighted: by rows; else, as in the paper, each node has one voice.

    Raises:
        PlanError: an option out of its range.

    Source: Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization", Algorithm 1.
    """
    at_least_0(pull=pull)

    def local(
        learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        back = pulling(pull, brief["parameters"].values)
        update = trained(learner, brief, rows, pace, rng)
        mine = only(memory or brief, learner.layouts)
        moves = trained(learner, mine, rows, pace, rng, back).groups
        return {name: group.with_values(group.values + moves[name].values) for name, group in mine.items()}, update

    return fedavg(weighted=weighted)._replace(local=local, own=_own, needs=frozenset({"correct"}))


def _own(learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator) -> Groups:
    del rows, pace, rng
    return only(memory or brief, learner.layouts)
