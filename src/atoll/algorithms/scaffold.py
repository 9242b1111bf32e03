"""SCAFFOLD: control variates take the drift out of what nodes send."""

from __future__ import annotations

import numpy as np

from atoll.algorithms.algorithm import Algorithm, Memory, State
from atoll.algorithms.fedavg import moved
from atoll.algorithms.folds import mean
from atoll.algorithms.local import gradient, rest, trained, uniformly
from atoll.algorithms.options import above_0, one_of
from atoll.learner import Learner, Rows
from atoll.training import Pace
from atoll.vector import Flat, Group, Groups, Layouts, Total, Update


def scaffold(option: str = "II", learning_rate: float = 1.0, *, weighted: bool = True) -> Algorithm:
    """Step along g − cᵢ + c on each node i, where c estimates the whole gradient and cᵢ the node's own.

    The node keeps cᵢ; the server keeps c, and sends it with the model. An update holds both moves, so twice a model.

    Args:
        option: how the node makes its next cᵢ. I: the gradient over all its rows at the received model, one more pass;
            II: cᵢ − c + (x − yᵢ) / (K ηₗ), from the steps it took anyway.
        learning_rate: ηg, how much of the mean move the server takes.
        weighted: by rows; else, as in the paper, each node has one voice.

    Raises:
        PlanError: an option out of its range.

    Source: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", Algorithm 1, eq. 3–5.
    """
    one_of("option", option, ("I", "II"))
    above_0(learning_rate=learning_rate)

    def local(
        learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        whole = brief["control"]
        own = memory.get("control", whole.with_values(np.zeros_like(whole.values))).values
        drift = whole.values - own
        update = trained(learner, brief, rows, pace, rng, lambda found, _: found + drift)  # eq. 3
        if option == "I":
            new, _ = gradient(learner, brief, rows, pace, rng)
        else:  # eq. 4
            new = -drift - update.groups["parameters"].values / (pace.steps * pace.learning_rate)
        groups = {**update.groups, "control": whole.with_values(new - own)}
        return {"control": whole.with_values(new)}, Update(groups, update.weight, update.metrics)

    def step(state: State, total: Total) -> State:
        return {
            **moved(state, rest(total, "parameters", "control")),
            "parameters": _ahead(state["parameters"], total.mean("parameters"), learning_rate),
            # eq. 5: the mean over who took part, as far as those are all there are
            "control": _ahead(state["control"], total.mean("control"), total.participants / total.registered),
        }

    def init(model: Groups) -> State:
        start = model["parameters"]
        return {**model, "control": start.with_values(np.zeros_like(start.values))}

    return Algorithm(
        init=init,
        brief=dict,
        updates=_layouts,
        local=local,
        step=step,
        fold=mean if weighted else uniformly,
        needs=frozenset({"correct", "sgd"}),
    )


def _layouts(model: Layouts) -> Layouts:
    return {**model, "control": model["parameters"]}


def _ahead(group: Group, move: Flat, part: float) -> Group:
    return group.with_values(group.values + part * move)
