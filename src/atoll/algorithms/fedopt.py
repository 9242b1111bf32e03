"""FedAdam, FedYogi, FedAdagrad: the server takes the nodes' mean move for a gradient, and steps as an adaptive optimiser does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from atoll.algorithms.algorithm import Algorithm, State
from atoll.algorithms.fedavg import fedavg, moved
from atoll.algorithms.folds import BLOCK
from atoll.algorithms.local import rest
from atoll.algorithms.options import above_0, part
from atoll.vector import Flat, Groups, Total

Second = Callable[[Flat, Flat], Flat]
"""`second(v, square)`: the next second moment."""


def fedadam(
    learning_rate: float = 0.01, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3, *, weighted: bool = True
) -> Algorithm:
    """Adam on the server: v ← β₂ v + (1 − β₂) Δ².

    Args:
        learning_rate: η, the server's.
        beta_1: β₁, how long the first moment remembers.
        beta_2: β₂, how long the second moment remembers.
        tau: τ, what is added to the root, and how small a move counts as large.
        weighted: by rows; else, as in the paper, each node has one voice.

    Raises:
        PlanError: an option out of its range.

    Source: Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2.
    """
    part(beta_2=beta_2)

    def second(v: Flat, square: Flat) -> Flat:
        after: Flat = beta_2 * v + (1 - beta_2) * square
        return after

    return _fedopt(second, learning_rate, beta_1, tau, weighted=weighted)


def fedyogi(
    learning_rate: float = 0.01, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3, *, weighted: bool = True
) -> Algorithm:
    """Yogi on the server: v ← v − (1 − β₂) Δ² sign(v − Δ²).

    Args, Raises, Source: as `fedadam`.
    """
    part(beta_2=beta_2)

    def second(v: Flat, square: Flat) -> Flat:
        after: Flat = v - (1 - beta_2) * square * np.sign(v - square)
        return after

    return _fedopt(second, learning_rate, beta_1, tau, weighted=weighted)


def fedadagrad(learning_rate: float = 0.01, beta_1: float = 0.0, tau: float = 1e-3, *, weighted: bool = True) -> Algorithm:
    """Adagrad on the server: v ← v + Δ².

    Args, Raises, Source: as `fedadam`.
    """
    return _fedopt(lambda v, square: v + square, learning_rate, beta_1, tau, weighted=weighted)


def _fedopt(second: Second, learning_rate: float, beta_1: float, tau: float, *, weighted: bool) -> Algorithm:
    above_0(learning_rate=learning_rate, tau=tau)
    part(beta_1=beta_1)

    def init(model: Groups) -> State:
        start = model["parameters"]
        zero, least = (np.full_like(start.values, value) for value in (0, tau * tau))  # v₋₁ ≥ τ²
        return {**model, "first": start.with_values(zero), "second": start.with_values(least)}

    def step(state: State, total: Total) -> State:
        after = moved(state, rest(total, "parameters"))
        delta, start = total.mean("parameters"), [state[name].values for name in ("parameters", "first", "second")]
        x, m, v = (np.empty_like(values) for values in start)
        for lo in range(0, delta.size, BLOCK):  # so that no more than the next state is in memory
            part, move = slice(lo, lo + BLOCK), delta[lo : lo + BLOCK]
            m[part] = beta_1 * start[1][part] + (1 - beta_1) * move
            v[part] = second(start[2][part], move * move)
            x[part] = start[0][part] + learning_rate * m[part] / (np.sqrt(v[part]) + tau)
        found = {"parameters": x, "first": m, "second": v}
        return {**after, **{name: state[name].with_values(values) for name, values in found.items()}}

    return fedavg(weighted=weighted)._replace(init=init, brief=without("first", "second"), step=step)


def without(*names: str) -> Callable[[State], Groups]:
    """Return the brief that keeps some of the server's groups to the server."""
    return lambda state: {name: group for name, group in state.items() if name not in names}
