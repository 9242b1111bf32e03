"""FedAvgM: the mean move gathers momentum on the server."""

from __future__ import annotations

import numpy as np

from atoll.algorithms.algorithm import Algorithm, State
from atoll.algorithms.fedavg import fedavg, moved
from atoll.algorithms.fedopt import without
from atoll.algorithms.local import rest
from atoll.algorithms.options import above_0, part
from atoll.vector import Groups, Total


def fedavgm(momentum: float = 0.9, learning_rate: float = 1.0, *, weighted: bool = True) -> Algorithm:
    """Step with momentum: v ← β v + Δ, w ← w + η v.

    Args:
        momentum: β; with 0 it is FedAvg.
        learning_rate: η, the server's.
        weighted: by rows, as in the paper; else each node has one voice.

    Raises:
        PlanError: an option out of its range.

    Source: Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", section 4.3.
    """
    above_0(learning_rate=learning_rate)
    part(momentum=momentum)

    def init(model: Groups) -> State:
        start = model["parameters"]
        return {**model, "velocity": start.with_values(np.zeros_like(start.values))}

    def step(state: State, total: Total) -> State:
        after, delta = moved(state, rest(total, "parameters")), total.mean("parameters")
        velocity = momentum * state["velocity"].values + delta
        model = state["parameters"].with_values(state["parameters"].values + learning_rate * velocity)
        return {**after, "parameters": model, "velocity": state["velocity"].with_values(velocity)}

    return fedavg(weighted=weighted)._replace(init=init, brief=without("velocity"), step=step)
