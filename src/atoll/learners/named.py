"""Functions that a plan names: loaded only if this machine's owner agreed, by installing or by allowing them.

Enters: "package.module:function" out of a plan. Leaves: the function. A plan comes from another machine, so its names
are data: nothing is imported unless an installed package registers it, or the owner allows it in so many words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from atoll.errors import AtollError, LearnerError, PlanError
from atoll.learner import OWN, Measure, Rows, classified, nothing, regressed
from atoll.metrics import ALWAYS, Count, Task
from atoll.vector import Dtype, Kind, Layout, Layouts, Metrics, Tensor, difference

ENTRY_POINTS = "atoll.models"
"""The group in which an installed package registers what plans may name."""


def permit(names: Sequence[str], allow: Collection[str]) -> None:
    """Check that all functions which a plan names may run here; nothing is imported.

    Args:
        names: each "package.module:function".
        allow: those that the owner of this machine allows, beside those that installed packages register.

    Raises:
        PlanError: naming all that nobody allowed.
    """
    known = {*allow, *(found.value for found in entry_points(group=ENTRY_POINTS))} if names else set()
    if missing := [name for name in dict.fromkeys(names) if name not in known]:
        raise PlanError(
            f"the plan asks to run {' and '.join(map(repr, missing))}, which this machine's owner has not allowed: read that, "
            f"then `{' '.join(f'--allow {name}' for name in missing)}` (in Python allow={missing}), "
            f"or install a package that registers it under '{ENTRY_POINTS}'"
        )


def load(key: str, name: str) -> Callable[..., Any]:
    """Return the function that a key of the plan names, once it is permitted.

    Raises:
        LearnerError: it can't be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(import_module(module), attribute)
    except Exception as error:  # whatever a foreign module does when it is imported
        raise LearnerError(
            f"{key}: '{name}' can't be imported ({error!r}); install it, or put its folder on PYTHONPATH"
        ) from error
    return cast("Callable[..., Any]", function)


def make(key: str, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """Call the function with the plan's options as keywords.

    Raises:
        PlanError: it doesn't take these options, or raises.
    """
    try:
        return function(**options)
    except Exception as error:  # whatever a foreign function raises
        raise PlanError(f"{key}: {name}({_words(options)}) failed: {type(error).__name__}: {error}") from error


def _words(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def measure(functions: Mapping[str, Callable[..., Any]], taken: Collection[str] = ()) -> Measure:
    """Return what measures with all functions in a plan's `[model] metrics`.

    Args:
        functions: name in the plan → `(predictions, y) -> {name: sum over the rows}`.
        taken: the well-known metrics that the plan names beside them.

    Raises (when measuring):
        LearnerError: a function fails, or gives something else than names and finite sums.
    """

    def measured(predictions: NDArray[Any], y: NDArray[Any]) -> Metrics:
        sums: dict[str, float] = {}
        for named, function in functions.items():
            try:
                found = {f"{OWN}{name}": float(value) for name, value in function(predictions, y).items()}
            except Exception as error:  # whatever a foreign function raises
                raise LearnerError(f"model.metrics: '{named}' failed: {type(error).__name__}: {error}") from error
            for name, value in found.items():
                if name in sums or name.removeprefix(OWN) in {*ALWAYS, *taken}:
                    raise LearnerError(f"model.metrics: '{named}': the name '{name.removeprefix(OWN)}' is taken: give it another")
                if not math.isfinite(value):
                    raise LearnerError(f"model.metrics: '{named}': the sum '{name.removeprefix(OWN)}' is {value}")
            sums |= found
        return sums

    return measured


@contextmanager
def said(key: str, rows: Rows) -> Iterator[None]:
    """Turn whatever a foreign model raises over some rows into one line.

    Raises:
        LearnerError: naming the rows' shape, and the first line of what was raised.
    """
    try:
        yield
    except AtollError:
        raise
    except Exception as error:  # whatever the model's own code raises
        reason = str(error).strip().partition("\n")[0]
        raise LearnerError(f"{key}: the model can't take rows of shape {rows.x.shape[1:]}: {reason or repr(error)}") from error


class Form(NamedTuple):
    """What a framework knows of one array of a model: its shape, and its dtype's name."""

    shape: tuple[int, ...]
    dtype: str


def layouts(key: str, parameters: Mapping[str, Form], others: Mapping[str, Form]) -> dict[str, Layout]:
    """Return a model's layouts: `parameters` are trained, `buffers` are its other real numbers, `counts` its whole ones.

    Counts (batches seen, positions) are added up over nodes, exactly, in int64: their mean would be no whole number.

    Raises:
        LearnerError: there is nothing to train, or a dtype can't travel.
    """
    if not parameters:
        raise LearnerError(f"{key}: the model has no parameters to train")
    for name, form in {**parameters, **others}.items():
        if form.dtype == "bool":
            raise LearnerError(f"{key}: '{name}' is bool, which has no sum: keep it out of the state, or make it a number")
        whole = form.dtype.startswith(("int", "uint"))
        if form.dtype != "float32" and (name in parameters or not whole):
            raise LearnerError(f"{key}: '{name}' is {form.dtype}; weights travel as float32 (training.precision may be less)")
    groups = {
        "parameters": parameters,
        "buffers": {name: form for name, form in others.items() if form.dtype == "float32"},
        "counts": {name: form for name, form in others.items() if form.dtype != "float32"},
    }
    kinds: dict[str, tuple[Dtype, Kind]] = {"counts": ("int64", "plain")}
    return {
        group: Layout(tuple(Tensor(name, form.shape) for name, form in forms.items()), *kinds.get(group, ("float32", "weighted")))
        for group, forms in groups.items()
        if forms
    }


def same(key: str, found: Layouts, agreed: Layouts) -> None:
    """Check that a function made the same model again.

    Raises:
        LearnerError: saying where the two part.
    """
    if found != agreed:
        parted = [difference(found[name], agreed[name]) for name in agreed if name in found and found[name] != agreed[name]]
        said = parted[0] if parted else f"{', '.join(found)} instead of {', '.join(agreed)}"
        raise LearnerError(f"{key}: the function made another model than the first time: {said}")


def alike(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Say whether two arrays differ by rounding alone."""
    return one.shape == other.shape and bool(np.allclose(one, other, rtol=1e-3, atol=1e-4 * float(np.abs(one).max(initial=1.0))))


def judged(task: Task | None, loss: float, outputs: NDArray[Any], y: NDArray[Any], count: Count = nothing) -> Metrics:
    """Return the sums that judge outputs `[rows, …]`, and what `count` adds; of a loss without a task, samples and loss alone."""
    if task is None:
        return {"samples": float(len(y)), "loss": loss}
    if task == "classes" and y.ndim > 1:
        return {"samples": float(len(y)), "loss": loss, "correct": float(np.sum(_hits(outputs.argmax(axis=-1), y)))}
    scores: NDArray[Any]
    if task == "classes":
        scores = outputs.reshape(-1, outputs.shape[-1])
        found = classified(loss, outputs.argmax(axis=-1), y, two=scores.shape[1] == 2)
    elif task == "binary":
        scores = outputs.reshape(len(y))
        found = classified(loss, (scores >= 0).astype(int), y, two=True)
    else:
        scores = outputs.reshape(len(y), -1)[:, 0]
        found = regressed(loss, scores, y)
    return {**found, **count(scores, y)}


def _hits(predicted: NDArray[Any], y: NDArray[Any]) -> NDArray[np.float64]:
    """Return which part of each row's targets `[rows, places]` is right; below 0 there is none, as where a text has ended."""
    there = y >= 0
    hits: NDArray[np.float64] = np.sum((predicted == y) & there, axis=1) / np.maximum(1, np.sum(there, axis=1))
    return hits
