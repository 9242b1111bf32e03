"""MimeLite: every node steps with the federation's momentum, which its own steps don't change."""

from __future__ import annotations

import numpy as np

from atoll.algorithms.algorithm import Algorithm, Memory, State
from atoll.algorithms.fedavg import fedavg, moved
from atoll.algorithms.local import gradient, rest, trained
from atoll.algorithms.options import part
from atoll.learner import Learner, Rows
from atoll.training import Pace
from atoll.vector import Flat, Groups, Layouts, Total, Update


def mime_lite(momentum: float = 0.9, *, weighted: bool = True) -> Algorithm:
    """Step along (1 − β) g + β m with m held still; then m ← (1 − β) ∇ + β m from whole gradients at the received model.

    A node goes through its rows once more for its gradient; an update holds it beside the move, so it is twice a model.

    Args:
        momentum: β.
        weighted: by rows; else, as in the paper, each node has one voice.

    Raises:
        PlanError: an option out of its range.

    Source: Karimireddy et al. 2021, "Breaking the centralized barrier for cross-device federated learning", Algorithm 1
    (MimeLite) with the momentum of table 1.
    """
    part(momentum=momentum)

    def local(
        learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        held = brief["momentum"]

        def correct(found: Flat, vector: Flat) -> Flat:
            del vector
            along: Flat = (1 - momentum) * found + momentum * held.values
            return along

        update = trained(learner, brief, rows, pace, rng, correct)
        whole, _ = gradient(learner, brief, rows, pace, rng)
        return memory, Update({**update.groups, "momentum": held.with_values(whole)}, update.weight, update.metrics)

    def step(state: State, total: Total) -> State:
        held = state["momentum"]
        after = moved(state, rest(total, "momentum"))
        return {**after, "momentum": held.with_values((1 - momentum) * total.mean("momentum") + momentum * held.values)}

    def init(model: Groups) -> State:
        start = model["parameters"]
        return {**model, "momentum": start.with_values(np.zeros_like(start.values))}

    method = fedavg(weighted=weighted)._replace(init=init, local=local, step=step, updates=_layouts)
    return method._replace(late=None, needs=frozenset({"correct", "sgd"}))


def _layouts(model: Layouts) -> Layouts:
    return {**model, "momentum": model["parameters"]}
