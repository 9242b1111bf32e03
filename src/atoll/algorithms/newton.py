"""Federated Newton–Raphson: exact second-order steps from summed gradients and Hessians."""

from __future__ import annotations

from typing import cast

import numpy as np

from atoll.algorithms.algorithm import Algorithm, Memory, State
from atoll.algorithms.folds import mean
from atoll.errors import PlanError
from atoll.learner import Curved, Learner, Rows
from atoll.training import Pace
from atoll.vector import Group, Groups, Layout, Layouts, Tensor, Total, Update


def newton(damping: float = 1.0, ridge: float = 1.0) -> Algorithm:
    """Take the Newton step of the pooled loss: θ ← θ − damping · (Σ Hₖ + ridge · I)⁻¹ Σ gₖ.

    Sums, not means: the result is the one of all rows pooled, however they are spread over nodes.

    Args:
        damping: the part of a whole step that is taken, in (0, 1].
        ridge: what is added to the Hessian's diagonal, so that it can be inverted.

    Raises:
        PlanError: an option out of its range.

    Source: NVIDIA FLARE's "hello-lr" example; Hessian of the logistic loss as in Bishop 2006, eq. 4.97.
    """
    if not (0 < damping <= 1 and ridge >= 0):
        raise PlanError(f"aggregation.options: damping lies in (0, 1] and ridge is not negative; they are {damping} and {ridge}")

    def step(state: State, total: Total) -> State:
        model = state["parameters"]
        hessian = total.groups["hessian"].values.reshape(model.layout.size, -1)
        bowl = hessian + ridge * np.eye(model.layout.size)
        down = np.linalg.solve(bowl, total.groups["gradient"].values)
        return {**state, "parameters": model.with_values(model.values - damping * down)}

    return Algorithm(init=dict, brief=dict, updates=_layouts, local=_local, step=step, fold=mean, needs=frozenset({"curvature"}))


def _layouts(model: Layouts) -> Layouts:
    size = model["parameters"].size
    return {
        "gradient": Layout((Tensor("sum", (size,)),), "float64", "plain"),
        "hessian": Layout((Tensor("sum", (size, size)),), "float64", "plain"),
    }


def _local(
    learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
) -> tuple[Memory, Update]:
    del pace, rng  # one pass over all rows; nothing is drawn
    gradient, hessian = cast("Curved", learner).curvature(brief, rows)
    layouts = _layouts(learner.layouts)
    groups = {
        "gradient": Group(layouts["gradient"], gradient.astype(np.float64)),
        "hessian": Group(layouts["hessian"], hessian.astype(np.float64).reshape(-1)),
    }
    return memory, Update(groups, float(len(rows)))
