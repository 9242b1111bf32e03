"""PyTorch modules: built by a function that the plan names, fitted by any of torch.optim.

Enters: a plan and the function that it names. Leaves: a learner. `learner.py` fits, `gradients.py` gives gradients row by row,
`represented.py` what a layer makes of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from atoll.errors import PlanError
from atoll.learners import named
from atoll.learners.torch.learner import LOSSES, OPTIMIZERS, Torch
from atoll.learners.torch.stacked import BY_NUMBER
from atoll.plan import Plan


def build(plan: Plan, function: Callable[..., Any]) -> Torch:
    """Build the learner of `[model] torch = "package:function"`; `model.options` are the function's keywords.

    Raises:
        PlanError: the function returns no module, or loss or optimiser are not known.
        LearnerError: the module's tensors can't travel.
    """
    training, name = plan.training, str(plan.model.torch)
    for key, given, known in (
        ("model.loss", plan.model.loss, LOSSES),
        ("training.optimizer", training.optimizer, OPTIMIZERS),
    ):
        if given not in known:
            raise PlanError(f"{key}: '{given}' is not known; it is one of {', '.join(known)}")

    def make() -> Any:
        module = named.make("model.torch", name, function, plan.model.options)
        if not isinstance(module, torch.nn.Module):
            raise PlanError(f"model.torch: '{name}' returned a {type(module).__name__}: it returns a torch.nn.Module")
        return module

    def optimizer(parameters: list[Any], rate: float) -> Any:
        return OPTIMIZERS[training.optimizer](parameters, lr=training.learning_rate * rate, **training.options)

    try:
        optimizer([torch.nn.Parameter(torch.zeros(1))], 1.0)
    except (TypeError, ValueError) as error:
        raise PlanError(f"training.options: {error}") from error
    can = {"vmap"} if training.optimizer in BY_NUMBER else set()
    if training.optimizer == "sgd" and not training.options:
        can.add("sgd")
    return Torch(make, str(plan.model.loss), optimizer, training.precision, can)
