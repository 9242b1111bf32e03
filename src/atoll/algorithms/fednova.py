"""FedNova: nodes that take more steps don't pull the model further towards themselves."""

from __future__ import annotations

import numpy as np

from atoll.algorithms.algorithm import Algorithm, Memory, State
from atoll.algorithms.fedavg import moved
from atoll.algorithms.folds import mean
from atoll.algorithms.local import pulling, rest, trained
from atoll.algorithms.options import at_least_0
from atoll.learner import Learner, Rows
from atoll.training import Pace
from atoll.vector import Group, Groups, Layout, Layouts, Tensor, Total, Update

_STEPS = Layout((Tensor("effective", (1,)),), "float64")


def fednova(mu: float = 0.0) -> Algorithm:
    """Average directions, not moves: x ← x − τ Σ pᵢ η dᵢ, with dᵢ = Gᵢ aᵢ / ‖aᵢ‖₁ and τ = Σ pᵢ ‖aᵢ‖₁; pᵢ by rows.

    aᵢ says how much each of a node's τᵢ gradients is in its move: 1 each for plain SGD; with a pull μ back to the received model
    (1 − η μ)^(τᵢ − 1 − k).

    Args:
        mu: μ, how strong a node is pulled back to the received model; 0: not at all.

    Raises:
        PlanError: an option out of its range.

    Source: Wang et al. 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", eq. 7–11.
    """
    at_least_0(mu=mu)

    def local(
        learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        update = trained(learner, brief, rows, pace, rng, pulling(mu, brief["parameters"].values) if mu else None)
        share = float(np.sum((1 - pace.learning_rate * mu) ** np.arange(pace.steps)))
        move = update.groups["parameters"]
        groups = {"parameters": move.with_values(move.values / share), "steps": Group(_STEPS, np.array([share]))}
        return memory, Update({**update.groups, **groups}, update.weight, update.metrics)

    def step(state: State, total: Total) -> State:
        model, steps = state["parameters"], float(total.mean("steps")[0])
        after = moved(state, rest(total, "parameters", "steps"))
        return {**after, "parameters": model.with_values(model.values + steps * total.mean("parameters"))}

    needs = frozenset({"correct", "sgd"} if mu else {"sgd"})
    return Algorithm(init=dict, brief=dict, updates=_layouts, local=local, step=step, fold=mean, needs=needs)


def _layouts(model: Layouts) -> Layouts:
    return {**model, "steps": _STEPS}
