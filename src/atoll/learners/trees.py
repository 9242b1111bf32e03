"""Boosted trees over tables: XGBoost grows them on a node's rows, or the server from sums of histograms; as arrays in groups.

The arrays' form, and all that needs no XGBoost, is `atoll.trees`. XGBoost itself is imported where a node boosts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll import buckets, memory, trees
from atoll.errors import LearnerError, PlanError
from atoll.learner import Correct, Fit, Measure, Rows, by_blocks, classified, nothing, regressed
from atoll.metrics import Count, Task
from atoll.plan import Plan
from atoll.vector import Groups, Metrics

SOFTPROB = "multi:softprob"
OBJECTIVES = {"binary:logistic": 0.5, SOFTPROB: 0.5, "reg:squarederror": 0.0}
"""What is known, and the `base_score` that predictions begin with where the plan names none; with classes it means nothing."""
DEFAULTS: Mapping[str, float] = {"max_depth": 6, "reg_lambda": 1.0, "gamma": 0.0, "min_child_weight": 1.0}
_XGBOOST = ("reg_alpha", "max_delta_step", "subsample", "colsample_bytree", "colsample_bylevel", "colsample_bynode", "max_bin")
"""Options that XGBoost alone knows: of `bagging`."""
_CAPACITY = 500
_DEEPEST = 12
_RULES = "take aggregation.rule = 'bagging' or 'histograms'"


def build(plan: Plan) -> Trees:
    """Build the learner of `[model] trees = "binary:logistic"`.

    Raises:
        PlanError: an objective or option isn't known, or a key of [training] means nothing to trees.
        LearnerError: the model can't fit into memory.
    """
    model, training, rule = plan.model, plan.training, plan.aggregation.rule
    if plan.inputs is None:
        raise PlanError("model.inputs: is missing: name data.features, or say how many numbers a row has")
    if model.trees not in OBJECTIVES:
        raise PlanError(f"model.trees: '{model.trees}' is not known; it is one of {', '.join(OBJECTIVES)}")
    if training.epochs or training.steps:
        raise PlanError(
            "training: trees know no epochs or steps: with bagging, aggregation.options.trees are a node's in a round"
        )
    if training.optimizer != "sgd" or training.options or (training.schedule and rule == "histograms"):
        raise PlanError("training: trees have a learning_rate, with bagging a schedule, and neither optimizer nor options")
    known = {*DEFAULTS, "capacity", *(_XGBOOST if rule != "histograms" else ())}
    known |= {"base_score"} if model.trees != SOFTPROB else set()
    for name, value in model.options.items():
        if name not in known:
            raise PlanError(f"model.options.{name}: trees have no such option with '{rule}'; known: {', '.join(sorted(known))}")
        if type(value) not in (int, float) or not math.isfinite(value) or (value < 0 and name != "base_score"):
            raise PlanError(f"model.options.{name}: it is a number, not negative; it is {value!r}")
    options = {**DEFAULTS, "base_score": OBJECTIVES[model.trees], **model.options}
    for name, most in (("max_depth", _DEEPEST), ("capacity", 100_000)):
        if name in options and not (type(options[name]) is int and 1 <= options[name] <= most):
            raise PlanError(f"model.options.{name}: it is a whole number from 1 to {most}; it is {options[name]!r}")
    if model.trees == "binary:logistic" and not 0 < options["base_score"] < 1:
        raise PlanError(f"model.options.base_score: it is a chance between 0 and 1; it is {options['base_score']}")
    depth, labels = int(options["max_depth"]), plan.labels if model.trees == SOFTPROB else ()
    room, outputs = _room(plan, depth, len(labels) or 1, options.pop("capacity", None)), len(labels) or 1
    memory.need(room * outputs * 4 * (5 << depth), f"model.trees: {room * outputs:,} trees, and what nodes sent of them,")
    return Trees(model.trees, trees.Sizes(room, outputs, depth, plan.inputs), options, training.learning_rate, labels)


def _room(plan: Plan, depth: int, outputs: int, capacity: int | None) -> int:
    """Return for how many boosting steps there is to be room."""
    rounds = plan.plan.rounds
    if plan.aggregation.rule == "histograms":
        bins = plan.aggregation.options.get("bins", 32)
        first = buckets.passes(outputs * (bins + 1) << depth) if type(bins) is int and 1 < bins <= 1024 else 1
        if rounds < first + depth:
            raise PlanError(
                f"plan.rounds: with 'histograms' nodes agree on bins in {first} rounds, and a tree takes max_depth = {depth} "
                f"more; there are {rounds}: for n trees take {first} + {depth} n"
            )
        return capacity or -(-(rounds - first) // depth)
    grown = plan.aggregation.options.get("trees", 1)
    least = rounds * plan.cohort.minimum * (grown if type(grown) is int else 1)
    if capacity and capacity < least:
        nodes = plan.cohort.minimum
        raise PlanError(
            f"model.options.capacity: {capacity} trees have room, but {rounds} rounds of {nodes} nodes give {least} or more"
        )
    return capacity or max(_CAPACITY, 2 * least)


class Trees:
    """An ensemble of boosted trees, and how one more is grown.

    Args:
        objective: one of `OBJECTIVES`.
        sizes: how many trees it may hold, and of which form.
        options: XGBoost's parameters, by its names.
        learning_rate: what each new leaf is multiplied with.
        labels: the classes, in the order of their trees; none where there is one tree a step.
    """

    chances = True
    measure: Measure = staticmethod(nothing)
    count: Count = staticmethod(nothing)

    def __init__(
        self, objective: str, sizes: trees.Sizes, options: Mapping[str, float], learning_rate: float, labels: Sequence[int] = ()
    ) -> None:
        self.can = frozenset({"slopes", "boost"} if find_spec("xgboost") else {"slopes"})
        self._objective, self._sizes, self._options, self._learning_rate = objective, sizes, options, learning_rate
        self._labels = np.asarray(labels, np.float64)
        self.task: Task = "classes" if labels else "binary" if objective == "binary:logistic" else "numbers"
        self._base = base = options["base_score"]
        self._begins = math.log(base / (1 - base)) if self.task == "binary" else base
        self.layouts = sizes.layouts

    def initial(self, seed: int) -> Groups:
        """Return a model without trees: every seed begins there."""
        del seed
        settings = (self._options[name] for name in ("reg_lambda", "gamma", "min_child_weight"))
        return trees.empty(self._sizes, trees.Settings(self._learning_rate, *settings))

    def fit(
        self,
        groups: Groups,
        rows: Rows,
        steps: int,
        batch_size: int,
        rng: np.random.Generator,
        correct: Correct | None = None,
        *,
        rate: float = 1.0,
    ) -> Fit:
        """Boost `steps` more trees, of each class, by XGBoost on all rows; there are no mini-batches.

        Raises:
            LearnerError: there is no room for them, or XGBoost can't take the rows.
        """
        del batch_size, correct
        whole = int(groups["counts"].values[0])
        if whole + steps > self._sizes.steps:
            raise LearnerError(f"the model has {whole} trees and room for {self._sizes.steps}: raise model.options.capacity")
        x, y = self._table(rows)
        grown = self._grown(x, y, self._margins(groups, x), steps, int(rng.integers(1 << 31)), rate)
        fitted = {name: group.with_values(group.values.copy()) for name, group in groups.items()}
        for name, array in {**fitted["parameters"].arrays, **fitted["splits"].arrays}.items():
            array[whole : whole + steps] = grown[name]
        fitted["counts"] = trees.counted(fitted, whole + steps)
        return Fit(fitted, {"samples": float(len(rows)), "loss": self.evaluate(fitted, rows)["loss"]})

    def _grown(
        self, x: NDArray[Any], y: NDArray[Any], margin: NDArray[Any], steps: int, seed: int, rate: float
    ) -> dict[str, NDArray[Any]]:
        import xgboost

        given = {name: int(value) if name in ("max_depth", "max_bin") else value for name, value in self._options.items()}
        options: dict[str, Any] = {
            **given, "objective": self._objective, "eta": self._learning_rate * rate, "tree_method": "hist", "seed": seed,
            "nthread": 1, "verbosity": 0, **({"num_class": self._sizes.outputs} if self.task == "classes" else {}),
        }  # fmt: skip
        try:
            data = xgboost.DMatrix(x, label=y, nthread=1)
            data.set_base_margin(self._flat(margin).astype(np.float32))
            booster = xgboost.train(options, data, num_boost_round=steps)
        except (xgboost.core.XGBoostError, ValueError) as error:
            raise LearnerError(f"model.trees: XGBoost: {str(error).strip().splitlines()[-1][:300]}") from error
        return trees.read(bytes(booster.save_raw("json")), self._sizes.depth, self._sizes.outputs)

    def slopes(self, groups: Groups, rows: Rows) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return the rows, and gradient and curvature of each one's loss `[rows, outputs]` at what the whole trees say of it."""
        x, y = self._table(rows)
        said = self._said(self._margins(groups, x, int(groups["counts"].values[0])))
        if self.task == "numbers":
            return x, said - y[:, None], np.ones_like(said)
        true = np.arange(said.shape[1]) == y[:, None] if self.task == "classes" else y[:, None]
        # XGBoost takes twice the softmax's own curvature: of two classes it is then that of one logit.
        return x, said - true, np.maximum((2 if self.task == "classes" else 1) * said * (1 - said), 1e-16)

    def predict(self, groups: Groups, x: NDArray[Any]) -> NDArray[np.float64]:
        """Return chances of 1, or numbers, `[rows]`; of classes the chances of each, `[rows, classes]`.

        Raises:
            LayoutError: the trees are broken.
            LearnerError: the rows don't fit.
        """
        return self._flat(self._said(self._margins(groups, self._inputs(x))))

    def _said(self, margins: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what margins `[rows, outputs]` mean: chances, or numbers."""
        if self.task == "numbers":
            return margins
        if self.task == "binary":
            return _sigmoid(margins)
        away = np.exp(margins - margins.max(axis=1, keepdims=True))
        return np.asarray(away / away.sum(axis=1, keepdims=True), np.float64)

    def _flat(self, said: NDArray[np.float64]) -> NDArray[np.float64]:
        return said if self.task == "classes" else said[:, 0]

    def evaluate(self, groups: Groups, rows: Rows) -> Metrics:
        """See `Learner.evaluate`; log loss, or half the squared error."""
        return by_blocks(lambda part: self._judge(groups, *self._table(part)), rows)

    def _judge(self, groups: Groups, x: NDArray[Any], y: NDArray[Any]) -> Metrics:
        margins = self._margins(groups, x)
        scores, said = self._flat(margins), self._flat(self._said(margins))
        if self.task == "numbers":
            judged = regressed(float(np.sum((scores - y) ** 2)) / 2, scores, y)
        elif self.task == "binary":
            judged = classified(float(np.sum(np.logaddexp(0.0, scores) - y * scores)), (scores >= 0).astype(int), y, two=True)
        else:
            true = scores[np.arange(len(y)), y.astype(np.intp)]
            loss = float(np.sum(np.logaddexp.reduce(scores, axis=1) - true))
            judged = classified(loss, scores.argmax(axis=1), y, two=scores.shape[1] == 2)
            y = self._labels[y.astype(np.intp)]
        return {**judged, **self.count(scores, y), **self.measure(said, y)}

    def written(self, groups: Groups) -> dict[str, Any]:
        """Return a model as XGBoost's JSON."""
        return trees.written(groups, self._objective, self._sizes.inputs, self._base)

    def _margins(self, groups: Groups, x: NDArray[Any], count: int | None = None) -> NDArray[np.float64]:
        trees.check(groups, self._sizes.inputs)
        return self._begins + trees.margins(groups, x, trees.used(groups) if count is None else count)

    def _inputs(self, x: NDArray[Any]) -> NDArray[np.float32]:
        x = np.asarray(x, np.float32)
        if x.ndim != 2 or x.shape[1] != self._sizes.inputs:
            raise LearnerError(f"rows of shape {x.shape[1:]}: the plan's model takes {self._sizes.inputs} numbers a row")
        return x

    def _table(self, rows: Rows) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Return inputs and targets; of classes their places among the labels."""
        x, y = self._inputs(rows.x), np.asarray(rows.y, np.float64).reshape(-1)
        if self.task == "binary" and not ((y == 0) | (y == 1)).all():
            raise LearnerError("the target of binary:logistic is 0 or 1 in every row; data.positive says which values mean 1")
        if self.task == "classes":
            places = np.minimum(np.searchsorted(self._labels, y), len(self._labels) - 1)
            if (wrong := self._labels[places] != y).any():
                said = ", ".join(f"{label:g}" for label in self._labels)
                raise LearnerError(f"the target {y[wrong][0]:g} is none of the plan's classes {said}: see model.classes")
            y = places.astype(np.float64)
        return x, y


def export(plan: Plan, groups: Groups, path: Path) -> None:
    """Write a model as XGBoost's JSON, which XGBoost itself loads from version 3.1 on.

    Raises:
        LearnerError: it can't be written.
    """
    learner = build(plan)
    trees.check(groups, trees.Sizes.of(learner.layouts).inputs)
    try:
        path.write_text(json.dumps(learner.written(groups)), encoding="utf-8")
    except OSError as error:
        raise LearnerError(f"{path}: the model can't be written ({error.strerror or error})") from error


def _sigmoid(margin: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0.0, -margin))
