"""FedAsync: every update makes a model as it comes, the less of it the staler it is."""

from __future__ import annotations

from atoll.algorithms.algorithm import Algorithm, Late, State
from atoll.algorithms.fedavg import moved
from atoll.algorithms.fedprox import fedprox
from atoll.algorithms.local import rest
from atoll.algorithms.options import above_0, at_least_0, one_of
from atoll.algorithms.staleness import hinge, polynomial
from atoll.errors import PlanError
from atoll.vector import Total


def fedasync(
    mixing: float = 0.6, staleness: str = "polynomial", a: float | None = None, b: int = 4, rho: float = 0.0
) -> Algorithm:
    """Mix what a node made into the model: x ← x + α s(τ) Δ, with Δ its move, τ rounds late.

    It is meant for `cohort.buffer = 1`, a model for each update; with a larger buffer Δ is the mean, one voice each. The
    paper mixes the node's whole model in, (1 − αs) x + αs x_new, which for τ = 0 is the same; for a late one it also pulls the
    model back to where that node began, which a move doesn't.

    Args:
        mixing: α, in (0, 1].
        staleness: s: `constant`, `polynomial` (1 + τ)^-a, or `hinge`: 1 up to b rounds, then 1 / (a (τ − b) + 1).
        a: by default .5 for `polynomial`, 10 for `hinge`.
        b: of `hinge`.
        rho: ρ, how strong a node is pulled back to the model it received.

    Raises:
        PlanError: an option out of its range.

    Source: Xie et al. 2019, "Asynchronous Federated Optimization", Algorithm 1 and section 5.2.
    """
    if not 0 < mixing <= 1:
        raise PlanError(f"aggregation.options.mixing: it lies in (0, 1]; it is {mixing}")
    one_of("staleness", staleness, ("constant", "polynomial", "hinge"))
    at_least_0(rho=rho, b=b)
    power = (10.0 if staleness == "hinge" else 0.5) if a is None else a
    above_0(a=power)
    kinds: dict[str, Late] = {
        "constant": lambda _: 1.0,
        "polynomial": lambda late: polynomial(late, power),
        "hinge": lambda late: hinge(late, power, b),
    }

    def step(state: State, total: Total) -> State:
        model = state["parameters"]
        mixed = model.with_values(model.values + mixing * total.mean("parameters"))
        return {**moved(state, rest(total, "parameters")), "parameters": mixed}

    return fedprox(rho, weighted=False)._replace(step=step, late=kinds[staleness])
