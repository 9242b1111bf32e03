"""One-shot federated learning: a round of local models, an ensemble of them, and one model that learns what that says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from atoll.algorithms.algorithm import Algorithm, Bodies, State
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.local import only, trained
from atoll.errors import PlanError
from atoll.learner import Learner, Rows, scores
from atoll.training import Pace
from atoll.vector import Flat, Group, Groups, Layout, Tensor, Total, layouts_of

_ENSEMBLE, _ROWS, _STUDENT = "ensemble.", "members", "student."


def one_shot(models: int = 10, *, weighted: bool = True, share: bool = True, distil: bool = False, epochs: int = 20) -> Algorithm:
    """Every node trains a model of its own; the server keeps them as an ensemble, whose members' chances are averaged.

    The model that is judged, and goes on where a plan has more rounds, is their mean, as in FedAvg; or, with `distil`, one
    that the server then fits to what the ensemble says of its own rows (their labels are not looked at).

    Args:
        models: the most that the ensemble holds; of more nodes those with the most rows.
        weighted: members count by their rows, in the ensemble and in the mean; else all alike.
        share: whether nodes and exports get the ensemble, too; else it stays in the server's state.
        distil: fit one model to the ensemble, on the server's holdout.
        epochs: passes over the holdout for that.

    Raises:
        PlanError: an option out of its range; or the model's outputs can't be averaged.

    Source: Guha, Talwalkar and Smith 2019, "One-Shot Federated Learning", section 2 (the ensemble, "data selection" by rows,
    and distillation on unlabelled rows); labels are the ensemble's best guess, so that any learner can be the student.
    """
    for name, value in (("models", models), ("epochs", epochs)):
        if not (type(value) is int and value >= 1):
            raise PlanError(f"aggregation.options.{name}: it is a whole number from 1 up; it is {value!r}")

    def init(model: Groups) -> State:
        many = {f"{_ENSEMBLE}{name}": _many(group.layout, models) for name, group in model.items()}
        many[_ROWS] = Layout((Tensor("rows", (models,)),), "float64", "plain")
        return {**model, **{name: Group(layout, np.zeros(layout.size, layout.dtype)) for name, layout in many.items()}}

    def brief(state: State) -> Groups:
        return state if share else {name: group for name, group in state.items() if f"{_ENSEMBLE}{name}" in state}

    def fold(bodies: Bodies, weights: Sequence[float], registered: int) -> Total:
        return _collected(bodies, weights, models, registered)

    def step(state: State, total: Total) -> State:
        return _put(state, total, weighted=weighted)

    def teach(learner: Learner, before: State, after: State, rows: Rows, pace: Pace, rng: np.random.Generator) -> Groups:
        said = guess(learner, after, rows, weighted=weighted)
        steps = epochs * -(-len(rows) // pace.batch_size)
        begun = only(after, learner.layouts)
        moves = trained(learner, begun, Rows(rows.x, said), pace._replace(steps=steps), rng).groups
        return {name: _moved(group, begun[name].values - before[name].values) for name, group in moves.items()}

    def fits(learner: Learner) -> None:
        if distil and getattr(learner, "task", None) is None:
            raise PlanError("aggregation.options.distil: it isn't known what this model's outputs mean, so they have no mean")

    return fedavg()._replace(init=init, brief=brief, fold=fold, step=step, late=None, fits=fits, teach=teach if distil else None)


def members(state: Groups) -> list[Groups]:
    """Return the ensemble's models, from a server's state (`Simulated.state`) or an export."""
    rows = state[_ROWS].values
    shapes = {name.removeprefix(_ENSEMBLE): group for name, group in state.items() if name.startswith(_ENSEMBLE)}
    return [
        {name: state[name].with_values(group.arrays["models"][k]) for name, group in shapes.items()}
        for k in np.flatnonzero(rows > 0)
    ]


def guess(learner: Learner, state: Groups, rows: Rows, *, weighted: bool = True) -> NDArray[np.float64]:
    """Return what the ensemble says of rows `[rows]`: the class with the largest mean chance, or the mean number.

    Raises:
        LearnerError: there is no model in it yet, or rows have more than one target.
    """
    found = [_chances(learner, scores(learner, model, rows)) for model in members(state)]
    if not found:
        raise PlanError("aggregation.rule: the ensemble of 'one_shot' is empty until its first round is closed")
    voices = state[_ROWS].values[state[_ROWS].values > 0]
    mean = np.average(found, axis=0, weights=voices if weighted else None)
    if getattr(learner, "task", None) == "numbers":
        return np.asarray(mean, np.float64)
    return np.asarray(mean >= 0.5 if mean.ndim == 1 else mean.argmax(axis=1), np.float64)


def _chances(learner: Learner, said: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return chances of logits; where scores are no logits, each model has one vote."""
    if getattr(learner, "task", None) == "numbers":
        return said
    if not getattr(learner, "chances", True):
        return (said >= 0).astype(np.float64) if said.ndim == 1 else np.eye(said.shape[1])[said.argmax(axis=1)]
    if said.ndim == 1:
        return np.exp(-np.logaddexp(0.0, -said))
    powers = np.exp(said - said.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return shares


def _many(layout: Layout, models: int) -> Layout:
    return replace(layout, tensors=(Tensor("models", (models, layout.size)),), total="plain")


def _collected(bodies: Bodies, weights: Sequence[float], models: int, registered: int) -> Total:
    """Take the moves of the nodes with the most rows, in the order of nodes; and the server's own, where there is one."""
    chosen = np.sort(np.argsort(-np.asarray(weights), kind="stable")[:models])
    groups = {}
    for name, layout in bodies.layouts.items():
        flats = bodies.block(name, 0, layout.size)
        groups[name] = Group(_many(layout, len(chosen)), np.concatenate([flats[k] for k in chosen]))
        if bodies.reference:
            groups[f"{_STUDENT}{name}"] = bodies.reference[name]
    rows = np.asarray(weights, np.float64)[chosen]
    groups[_ROWS] = Group(Layout((Tensor("rows", (len(chosen),)),), "float64", "plain"), rows)
    return Total(groups, float(rows.sum()), len(weights), registered)


def _put(state: State, total: Total, *, weighted: bool) -> State:
    rows, after = total.groups[_ROWS].values, dict(state)
    whole = np.zeros(state[_ROWS].values.size)
    whole[: len(rows)] = rows
    after[_ROWS] = state[_ROWS].with_values(whole)
    for name, layout in layouts_of(state).items():
        if f"{_ENSEMBLE}{name}" not in state:
            continue
        start, moves = state[name].values, total.groups[name].arrays["models"]
        places = np.zeros((len(whole), layout.size), layout.dtype)
        places[: len(rows)] = start + moves
        after[f"{_ENSEMBLE}{name}"] = state[f"{_ENSEMBLE}{name}"].with_values(places.reshape(-1))
        if student := total.groups.get(f"{_STUDENT}{name}"):
            after[name] = _moved(state[name], student.values)
        elif layout.total == "plain":
            after[name] = _moved(state[name], moves.sum(axis=0))
        else:
            after[name] = _moved(state[name], np.average(moves, axis=0, weights=rows if weighted else None))
    return after


def _moved(group: Group, move: Flat) -> Group:
    return group.with_values(group.values + np.asarray(move, group.layout.dtype))
