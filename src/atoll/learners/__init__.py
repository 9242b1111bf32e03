"""Learners: one file a framework, each foreign library in exactly one of them.

Enters: a plan. Leaves: a `Learner`. Rank 2; imported by machines' runtimes and simulators, lazily: a
framework is loaded only when a plan names it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from atoll import memory
from atoll import metrics as measures
from atoll.errors import AtollError, LearnerError, PlanError
from atoll.learner import Learner, Measure
from atoll.learners import named
from atoll.metrics import Count, Task
from atoll.plan import Plan
from atoll.vector import Groups, check
from atoll.wire import unpack_any

Start = str | Path | Groups
"""A model to start from: a `.safetensors` or `.keras` file, or groups."""

_FILES = {"logistic": "logistic", "keras": "keras", "sklearn": "sklearn", "torch": "torch", "jax": "jax", "trees": "trees"}
_BYTES = 8
"""Of a weight, where a learner computes in float64."""
_NAMED = ("torch", "jax")
"""Kinds whose model is made by a function that the plan names."""


class _File(Protocol):
    def build(self, plan: Plan, *function: Callable[..., Any]) -> _Measuring: ...


class _Measuring(Learner, Protocol):
    task: Task | None
    chances: bool
    measure: Measure
    count: Count


def build(plan: Plan, allow: Collection[str] = ()) -> Learner:
    """Build the learner that a plan names.

    Args:
        plan: the plan.
        allow: functions ("package.module:function") that a plan may name here, beside those of installed packages.

    Raises:
        PlanError: the plan asks of the model what it can't do, or to judge it by a metric that isn't of such a model, or
            names a function that is not allowed here.
        LearnerError: its framework is not installed, a function can't be imported, or the model can't fit into memory.
    """
    kind = plan.model.kind
    named.permit(plan.model.functions, allow)
    metrics = {name: named.load("model.metrics", name) for name in plan.model.own_metrics}
    function = [named.load(f"model.{kind}", getattr(plan.model, kind))] if kind in _NAMED else []
    if plan.training.precision != "float32" and kind not in _NAMED:
        raise PlanError(f"training.precision: {kind} trains in float32 only; {' and '.join(_NAMED)} know more")
    try:
        file = cast("_File", import_module(f"atoll.learners.{_FILES[kind]}"))
    except ModuleNotFoundError as error:
        raise LearnerError(f"model.{kind}: {error.name} is not installed; pip install 'atoll-fl[{kind}]'") from error
    if plan.inputs is not None:
        memory.need(2 * plan.inputs * _BYTES, f"model.{kind}: a weight for each of {plan.inputs:,} inputs, and its gradient,")
    learner = file.build(plan, *function)
    known = plan.model.known_metrics
    if metrics:
        learner.measure = named.measure(metrics, known)
    for name in known:
        measures.fits(name, learner.task, plan.labels, plan.model.range, chances=learner.chances)
    if known and learner.task:
        learner.count = measures.counting(known, learner.task, plan.labels, plan.model.range)
    return learner


def first(plan: Plan, learner: Learner, start: Start | None = None) -> Groups:
    """Return the model that a run begins with: a new one by the plan's seed, or one that was trained before.

    Raises:
        LearnerError: the file can't be read, or it is no model of this plan; names the first array that doesn't fit.
        LayoutError: groups that are no model of this plan, or numbers that are not finite.
    """
    if start is None:
        return learner.initial(plan.plan.seed)
    groups = start if isinstance(start, Mapping) else _read(plan, learner, Path(start))
    check(groups, learner.layouts)
    return groups


def _read(plan: Plan, learner: Learner, path: Path) -> Groups:
    try:
        if path.suffix == ".safetensors":
            return unpack_any(np.memmap(path, np.uint8, "r").data, learner.layouts)
        if path.suffix == ".keras" and plan.model.kind == "keras":
            from atoll.learners.keras import load

            return load(plan, path)
    except OSError as error:
        raise LearnerError(f"{path}: can't be read ({error.strerror or error})") from error
    except (ValueError, AtollError) as error:
        raise LearnerError(f"{path}: no model of this plan: {error}") from error
    kinds = "a .safetensors file" + (" or a .keras file" if plan.model.kind == "keras" else "")
    raise LearnerError(f"{path}: this plan starts from {kinds}, as `atoll export` writes it")
