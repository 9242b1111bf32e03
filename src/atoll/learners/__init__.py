"""Learners: one file a framework, each foreign library in exactly one of them.

Enters: a plan. Leaves: a `Learner`. Rank 2; imported by machines' runtimes and simulators, lazily: a
framework is loaded only when a plan names it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from atoll.errors import LearnerError, PlanError
from atoll.learner import Learner
from atoll.plan import Plan

_FILES = {"logistic": "logistic", "keras": "keras", "sklearn": "sklearn"}


class _File(Protocol):
    def build(self, plan: Plan) -> Learner: ...


def build(plan: Plan) -> Learner:
    """Build the learner that a plan names.

    Raises:
        PlanError: the kind of model is not known here, or the plan asks of it what it can't do.
        LearnerError: its framework is not installed.
    """
    kind = plan.model.kind
    if kind not in _FILES:
        raise PlanError(f"model.{kind}: this version trains {', '.join(_FILES)}")
    try:
        file = cast("_File", import_module(f"atoll.learners.{_FILES[kind]}"))
    except ModuleNotFoundError as error:
        raise LearnerError(f"model.{kind}: {error.name} is not installed; pip install 'atoll-fl[{kind}]'") from error
    return file.build(plan)
