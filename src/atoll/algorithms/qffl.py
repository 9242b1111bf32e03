"""q-FFL: nodes that the model serves badly have more of a say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from atoll.algorithms.algorithm import Algorithm, Memory, State
from atoll.algorithms.fedavg import moved
from atoll.algorithms.folds import mean
from atoll.algorithms.local import only, rest, trained
from atoll.algorithms.options import above_0, at_least_0
from atoll.learner import Learner, Rows
from atoll.training import Pace
from atoll.vector import Group, Groups, Layout, Layouts, Tensor, Total, Update

_SCALE = Layout((Tensor("h", (1,)),), "float64", "plain")
_LEAST = 1e-10
"""What is added to a loss, so that none is 0."""


def qffl(q: float = 1.0, lipschitz: float | None = None) -> Algorithm:
    """Lower Σ Fₖ(w)^(q+1) / (q+1): w ← w − Σ Δₖ / Σ hₖ. Each node has one voice, and its loss says how loud it is.

    Δw = L (w − wₖ), Δₖ = Fₖ^q Δw, hₖ = q Fₖ^(q−1) ‖Δw‖² + L Fₖ^q, with Fₖ the mean loss of the received model on the node's
    training rows.

    Args:
        q: how much fairness counts; with 0 it is FedAvg with one voice each.
        lipschitz: L; without it, 1 over the nodes' learning rate.

    Raises:
        PlanError: an option out of its range.

    Source: Li et al. 2020, "Fair Resource Allocation in Federated Learning", Algorithm 2 (q-FedAvg).
    """
    at_least_0(q=q)
    if lipschitz is not None:
        above_0(lipschitz=lipschitz)

    def local(
        learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        lost = learner.evaluate(only(brief, learner.layouts), rows)["loss"] / len(rows) + _LEAST
        update = trained(learner, brief, rows, pace, rng)
        move, steep = update.groups["parameters"], lipschitz or 1 / pace.learning_rate
        length = steep * float(np.linalg.norm(move.values.astype(np.float64)))
        h = q * lost ** (q - 1) * length**2 + steep * lost**q
        loud = Group(replace(move.layout, total="plain"), move.values * (steep * lost**q))
        groups = {**update.groups, "parameters": loud, "scale": Group(_SCALE, np.array([h]))}
        return memory, Update(groups, update.weight, update.metrics)

    def step(state: State, total: Total) -> State:
        model = state["parameters"]
        by = 1 / float(total.mean("scale")[0])
        after = moved(state, rest(total, "parameters", "scale"))
        return {**after, "parameters": model.with_values(model.values + by * total.mean("parameters"))}

    return Algorithm(init=dict, brief=dict, updates=_layouts, local=local, step=step, fold=mean)


def _layouts(model: Layouts) -> Layouts:
    return {**model, "parameters": replace(model["parameters"], total="plain"), "scale": _SCALE}
