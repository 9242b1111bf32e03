"""FedDyn: each node's goal is bent so that the nodes' best models and the federation's are the same."""

from __future__ import annotations

import numpy as np

from atoll.algorithms.algorithm import Algorithm, Memory, State
from atoll.algorithms.fedavg import fedavg, moved
from atoll.algorithms.fedopt import without
from atoll.algorithms.local import rest, trained
from atoll.algorithms.options import above_0
from atoll.learner import Learner, Rows
from atoll.training import Pace
from atoll.vector import Flat, Groups, Total, Update


def feddyn(alpha: float = 0.1) -> Algorithm:
    """Fit Lₖ(θ) − ⟨λₖ, θ⟩ + (α/2) ‖θ − θᵗ⁻¹‖²; then θᵗ = mean of θₖ − h/α. Each node has one voice.

    The node keeps λₖ, its gradient at the model it last made: λₖ ← λₖ − α (θₖ − θᵗ⁻¹). The server keeps h.

    Args:
        alpha: α, how strong the bend is.

    Raises:
        PlanError: an option out of its range.

    Source: Acar et al. 2021, "Federated Learning Based on Dynamic Regularization", Algorithm 1.
    """
    above_0(alpha=alpha)

    def local(
        learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        received = brief["parameters"]
        dual = memory.get("dual", received.with_values(np.zeros_like(received.values))).values

        def correct(gradient: Flat, vector: Flat) -> Flat:
            bent: Flat = gradient - dual + alpha * (vector - received.values)
            return bent

        update = trained(learner, brief, rows, pace, rng, correct)
        return {"dual": received.with_values(dual - alpha * update.groups["parameters"].values)}, update

    def step(state: State, total: Total) -> State:
        model, delta = state["parameters"], total.mean("parameters")
        h = state["dual"].values - (alpha * total.participants / total.registered) * delta
        after = moved(state, rest(total, "parameters"))
        bent = model.with_values(model.values + delta - h / alpha)
        return {**after, "parameters": bent, "dual": model.with_values(h)}

    def init(model: Groups) -> State:
        start = model["parameters"]
        return {**model, "dual": start.with_values(np.zeros_like(start.values))}

    plain = fedavg(weighted=False)
    return plain._replace(late=None, init=init, brief=without("dual"), local=local, step=step, needs=frozenset({"correct"}))
