"""APFL: each node mixes a model of its own with the federation's."""

from __future__ import annotations

import numpy as np

from atoll.algorithms.algorithm import Algorithm, Memory
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.local import only
from atoll.errors import PlanError
from atoll.learner import Learner, Rows, batches
from atoll.training import Pace
from atoll.vector import Group, Groups, Update, add


def apfl(alpha: float = 0.5, *, weighted: bool = True) -> Algorithm:
    """At each step w goes along ∇f(w), and v along α ∇f(v̄) with v̄ = α v + (1 − α) w; a node uses v̄, and sends w.

    The node keeps v; buffers of its own model are those of w.

    Args:
        alpha: α, how much of a node's model is its own, in [0, 1].
        weighted: by rows; else, as in the paper, each node has one voice.

    Raises:
        PlanError: an option out of its range.

    Source: Deng et al. 2020, "Adaptive Personalized Federated Learning", Algorithm 1, eq. 4, α fixed.
    """
    if not 0 <= alpha <= 1:
        raise PlanError(f"aggregation.options.alpha: it lies in [0, 1]; it is {alpha}")

    def own(learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator) -> Groups:
        del rows, pace, rng
        received = only(brief, learner.layouts)
        return {**received, "parameters": _mixed(memory.get("parameters", received["parameters"]), received["parameters"])}

    def _mixed(mine: Group, shared: Group) -> Group:
        return shared.with_values(alpha * mine.values + (1 - alpha) * shared.values)

    def local(
        learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        received = only(brief, learner.layouts)
        shared, mine, sums = dict(received), memory.get("parameters", received["parameters"]), []
        for batch in batches(rng, len(rows), pace.batch_size, pace.steps):
            part = Rows(rows.x[batch], rows.y[batch])
            mixed = {**shared, "parameters": _mixed(mine, shared["parameters"])}
            fit = learner.fit(shared, part, 1, len(part), rng, rate=pace.rate)
            there = learner.fit(mixed, part, 1, len(part), rng, rate=pace.rate).groups["parameters"]
            mine = mine.with_values(mine.values + alpha * (there.values - mixed["parameters"].values))
            shared = dict(fit.groups)
            sums.append(fit.metrics)
        moves = {name: group.with_values(group.values - received[name].values) for name, group in shared.items()}
        return {"parameters": mine}, Update(moves, float(len(rows)), add(sums))

    return fedavg(weighted=weighted)._replace(local=local, own=own, needs=frozenset({"sgd"}))
