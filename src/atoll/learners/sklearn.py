"""scikit-learn's linear models and perceptrons: weights as flat groups, a fresh estimator for each fit.

What has `partial_fit` goes through mini-batches as any learner does. `LogisticRegression` has none: it takes up to
`steps` iterations of its own solver over all of the node's rows, from the weights it received.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, SGDClassifier, SGDRegressor
from sklearn.neural_network import MLPClassifier, MLPRegressor

from atoll import memory
from atoll.errors import LayoutError, LearnerError, PlanError
from atoll.learner import Correct, Fit, Measure, Rows, batches, by_blocks, classified, nothing, regressed
from atoll.metrics import Count, Task
from atoll.plan import Plan
from atoll.training import Training
from atoll.vector import Flat, Group, Groups, Layout, Metrics

Arrays = dict[str, NDArray[np.float64]]


class _Kind(NamedTuple):
    """What there is to know of an estimator's class."""

    make: Callable[..., Any]
    classifies: bool
    deep: bool
    settings: Callable[[Training], Mapping[str, Any]]
    optimizers: tuple[str, ...]


def _sgd(training: Training) -> Mapping[str, Any]:
    return {"learning_rate": "constant", "eta0": training.learning_rate}


def _perceptron(training: Training) -> Mapping[str, Any]:
    return {"solver": training.optimizer, "learning_rate_init": training.learning_rate, "batch_size": 1}


def _solver(training: Training) -> Mapping[str, Any]:
    del training
    return {"warm_start": True}


_KINDS = {
    "SGDClassifier": _Kind(SGDClassifier, True, False, _sgd, ("sgd",)),
    "SGDRegressor": _Kind(SGDRegressor, False, False, _sgd, ("sgd",)),
    "LogisticRegression": _Kind(LogisticRegression, True, False, _solver, ("sgd",)),
    "MLPClassifier": _Kind(MLPClassifier, True, True, _perceptron, ("sgd", "adam")),
    "MLPRegressor": _Kind(MLPRegressor, False, True, _perceptron, ("sgd", "adam")),
}
_INSTEAD = {
    "LinearRegression": "SGDRegressor",
    "Ridge": "SGDRegressor",
    "Lasso": 'SGDRegressor with options = { penalty = "l1" }',
    "SVC": 'SGDClassifier with options = { loss = "hinge" }',
    "LinearSVC": 'SGDClassifier with options = { loss = "hinge" }',
}
_OURS = ("warm_start", "random_state", "early_stopping", "max_iter", "solver_options", "n_jobs")


def build(plan: Plan) -> Sklearn:
    """Build the learner of `[model] sklearn = "Class"`.

    Raises:
        PlanError: the class can't be trained in rounds, or an option or the optimiser is not its own.
    """
    name, training = str(plan.model.sklearn), plan.training
    if name not in _KINDS:
        mend = f"use {_INSTEAD[name]}" if name in _INSTEAD else f"this version trains {', '.join(_KINDS)}"
        raise PlanError(f"model.sklearn: '{name}' can't go on from weights it is given (no partial_fit): {mend}")
    if plan.inputs is None:
        raise PlanError("model.inputs: is missing: name data.features, or say how many numbers a row has")
    kind = _KINDS[name]
    if training.optimizer not in kind.optimizers:
        raise PlanError(f"training.optimizer: {name} knows {', '.join(kind.optimizers)}, not '{training.optimizer}'")
    if name == "LogisticRegression" and training.epochs is not None:
        raise PlanError("training.epochs: LogisticRegression has no mini-batches: say training.steps, its solver's iterations")
    if name == "LogisticRegression" and training.schedule:
        raise PlanError("training.schedule: LogisticRegression has no learning rate to change: use SGDClassifier")
    if kind.deep:
        _check_size(plan.inputs, plan.model.options.get("hidden_layer_sizes", (100,)), len(plan.model.classes))
    return Sklearn(kind, plan.inputs, plan.model.classes, {**_options(plan, kind), **kind.settings(training)})


def _step(estimator: Any, x: NDArray[np.float64], y: NDArray[Any]) -> None:
    try:
        estimator.partial_fit(x, y)
    except ValueError as error:  # rows are checked, so it is what scikit-learn says of weights that grew beyond all numbers
        reason = str(error).partition(".")[0]
        raise LayoutError(f"training gave NaN or infinity ({reason}); lower training.learning_rate, or scale the data") from error


def _check_size(inputs: int, hidden: Any, classes: int) -> None:
    layers = [hidden] if isinstance(hidden, int) else hidden
    if not isinstance(layers, (list, tuple)) or not all(type(one) is int and one > 0 for one in layers):
        raise PlanError("model.options.hidden_layer_sizes: is a list of whole numbers above 0")
    weights = sum(a * b for a, b in pairwise([inputs, *layers, classes]))
    memory.need(2 * weights * 8, f"model.sklearn: {weights:,} weights and their gradient")


def _options(plan: Plan, kind: _Kind) -> Mapping[str, Any]:
    taken = [option for option in inspect.signature(kind.make).parameters if option not in _OURS]
    given = kind.settings(plan.training)
    for option in plan.model.options:
        if option in given:
            raise PlanError(f"model.options.{option}: [training] says it already")
        if option not in taken:
            close = difflib.get_close_matches(option, taken, 1, 0.5)
            hint = f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(taken)}"
            raise PlanError(f"model.options.{option}: {plan.model.sklearn} has no such option{hint}")
    return plan.model.options


class Sklearn:
    """A scikit-learn estimator and how it is fitted.

    Args:
        kind: what its class is.
        inputs: numbers a row.
        classes: the labels, in rising order (classifiers only).
        options: of the estimator's constructor.
    """

    measure: Measure = staticmethod(nothing)
    count: Count = staticmethod(nothing)

    def __init__(self, kind: _Kind, inputs: int, classes: tuple[int, ...], options: Mapping[str, Any]) -> None:
        self._kind, self._inputs, self._options = kind, inputs, options
        # A perceptron's step is its learning rate times the gradient, if nothing of earlier steps is in it. What learns row by
        # row inside a mini-batch, as SGDClassifier does, has no such gradient.
        stepping = kind.deep and options["solver"] == "sgd" and options.get("momentum", 0.9) == 0
        self.can = frozenset({"correct", "sgd"} if stepping and options.get("learning_rate", "constant") == "constant" else ())
        self._classes = np.array(classes)
        blank = self._blank(0)
        self.task: Task = "numbers" if not kind.classifies else "binary" if len(classes) == 2 else "classes"
        self.chances = hasattr(blank, "predict_proba")
        self.layouts = {"parameters": Layout.of(self._arrays_of(blank), "float64")}

    def initial(self, seed: int) -> Groups:
        """Return a new model: zeros where it is linear, scikit-learn's own random weights where it is deep."""
        return self._group(self._arrays_of(self._blank(seed)))

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
        """See `Learner.fit`; `LogisticRegression` takes `steps` iterations over all rows instead of mini-batches."""
        estimator = self._filled(groups, int(rng.integers(1 << 31)))
        if isinstance(estimator, LogisticRegression):
            if rate != 1:
                raise LearnerError("LogisticRegression has no learning rate to change: use SGDClassifier")
            self._solve(estimator, *self._table(rows), steps)
            return Fit(self._group(self._arrays_of(estimator)), self._judge(estimator, rows))
        speed = "learning_rate_init" if self._kind.deep else "eta0"
        estimator.set_params(**{speed: getattr(estimator, speed) * rate})
        samples = 0
        for batch in batches(rng, len(rows), batch_size, steps):
            if self._kind.deep:
                estimator.set_params(batch_size=len(batch))  # one step for each of ours, short ones too
            before = self._vector(estimator) if correct else None
            _step(estimator, *self._table(Rows(rows.x[batch], rows.y[batch])))
            if correct and before is not None:
                far = getattr(estimator, speed)
                self._fill(estimator, before - far * correct((before - self._vector(estimator)) / far, before))
            samples += len(batch)
        judged = self._judge(estimator, rows)
        share = samples / len(rows)
        return Fit(self._group(self._arrays_of(estimator)), {"samples": float(samples), "loss": judged["loss"] * share})

    def evaluate(self, groups: Groups, rows: Rows) -> Metrics:
        """See `Learner.evaluate`; the loss is log loss, hinge loss, or half the squared error."""
        estimator = self._filled(groups, 0)

        def judge(part: Rows) -> Metrics:
            x, y = self._table(part)
            judged = {**self.evaluate_estimator(estimator, x, y), **self.measure(self._scores(estimator, x), y)}
            return judged if self.count is nothing else {**judged, **self.count(self._logits(estimator, x), y)}

        return by_blocks(judge, rows)

    def _judge(self, estimator: Any, rows: Rows) -> dict[str, float]:
        return by_blocks(lambda part: self.evaluate_estimator(estimator, *self._table(part)), rows)

    def _scores(self, estimator: Any, x: NDArray[np.float64]) -> NDArray[Any]:
        """What a plan's own metrics see: chances of the classes where the estimator gives them, or else its predictions."""
        return np.asarray(getattr(estimator, "predict_proba", estimator.predict)(x))

    def _logits(self, estimator: Any, x: NDArray[np.float64]) -> NDArray[Any]:
        """What counts see: a logit a class, whose ties go to the first class as in `predict`; or the predicted numbers."""
        if not self._kind.classifies:
            return np.asarray(estimator.predict(x))
        if self.chances:
            with np.errstate(divide="ignore"):  # minus infinity, of a chance of zero
                logits: NDArray[np.float64] = np.log(estimator.predict_proba(x))
            return logits
        scores = np.asarray(estimator.decision_function(x))
        return np.column_stack([np.zeros_like(scores), scores]) if scores.ndim == 1 else scores

    def evaluate_estimator(self, estimator: Any, x: NDArray[np.float64], y: NDArray[Any]) -> dict[str, float]:
        """Return the sums that judge an estimator."""
        predicted = estimator.predict(x)
        if not self._kind.classifies:
            return regressed(float(np.sum((predicted - y) ** 2)) / 2, predicted, y)
        return classified(self._loss(estimator, x, y), predicted, y, two=self._classes.tolist() == [0, 1])

    def _loss(self, estimator: Any, x: NDArray[np.float64], y: NDArray[Any]) -> float:
        if hasattr(estimator, "predict_proba"):
            chances = np.asarray(estimator.predict_proba(x))
            true = chances[np.arange(len(y)), np.searchsorted(self._classes, y)]
            return float(-np.log(np.maximum(true, np.finfo(np.float64).tiny)).sum())
        scores = estimator.decision_function(x).reshape(len(y), -1)
        sides = self._classes[1:][None] if scores.shape[1] == 1 else self._classes[None]
        return float(np.maximum(0.0, 1 - np.where(y[:, None] == sides, 1, -1) * scores).sum())

    def _solve(self, estimator: LogisticRegression, x: NDArray[np.float64], y: NDArray[Any], steps: int) -> None:
        missing = np.setdiff1d(self._classes, y)
        if missing.size:
            raise LearnerError(f"no training row has class {missing[0]}, which LogisticRegression needs: use SGDClassifier")
        estimator.set_params(max_iter=steps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a round is meant to end early
            estimator.fit(x, y)

    def _blank(self, seed: int) -> Any:
        """Return an estimator that has its shapes and first weights, made without any data."""
        make, options = self._kind.make, dict(self._options)
        try:
            estimator = make(**options, random_state=seed)
            zeros = np.zeros((len(self._classes), self._inputs))
            if isinstance(estimator, LogisticRegression):
                return self._shaped_logistic(estimator)
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if not self._kind.classifies:
                    estimator.partial_fit(zeros[:1], np.zeros(1))
                else:
                    estimator.partial_fit(zeros, self._classes, classes=self._classes)
        except (TypeError, ValueError) as error:
            raise PlanError(f"model.options: {error}") from error
        if self._kind.deep:
            self._restart(estimator, seed)
        else:
            estimator.coef_[...] = 0.0
            estimator.intercept_[...] = 0.0
        return estimator

    def _shaped_logistic(self, estimator: Any) -> Any:
        outputs = 1 if len(self._classes) == 2 else len(self._classes)
        estimator.coef_ = np.zeros((outputs, self._inputs))
        estimator.intercept_ = np.zeros(outputs)
        estimator.classes_ = self._classes
        estimator.n_features_in_ = self._inputs
        return estimator

    def _restart(self, estimator: Any, seed: int) -> None:
        """Draw weights as Glorot and Bengio 2010 do, eq. 16, so that no step on blank rows is left in them."""
        rng = np.random.default_rng(seed)
        for weights, bias in zip(estimator.coefs_, estimator.intercepts_, strict=True):
            bound = np.sqrt(6.0 / sum(weights.shape))
            weights[...] = rng.uniform(-bound, bound, weights.shape)
            bias[...] = 0.0
        del estimator._optimizer  # noqa: SLF001  it begins anew with each fit, as any learner's does

    def _filled(self, groups: Groups, seed: int) -> Any:
        estimator = self._blank(seed)
        self._fill(estimator, groups["parameters"].values)
        return estimator

    def _fill(self, estimator: Any, vector: Flat) -> None:
        arrays = self.layouts["parameters"].views(vector)
        for name, array in self._arrays_of(estimator).items():
            array[...] = arrays[name]

    def _vector(self, estimator: Any) -> Flat:
        return self.layouts["parameters"].flatten(self._arrays_of(estimator))

    def _arrays_of(self, estimator: Any) -> Arrays:
        """The estimator's own arrays, not copies."""
        if not self._kind.deep:
            return {"coef": estimator.coef_, "intercept": estimator.intercept_}
        layers = zip(estimator.coefs_, estimator.intercepts_, strict=True)
        return {
            f"{name}_{k}": array for k, pair in enumerate(layers) for name, array in zip(("coef", "intercept"), pair, strict=True)
        }

    def _group(self, arrays: Arrays) -> Groups:
        layout = self.layouts["parameters"]
        return {"parameters": Group(layout, layout.flatten(arrays))}

    def _table(self, rows: Rows) -> tuple[NDArray[np.float64], NDArray[Any]]:
        x = np.asarray(rows.x, np.float64)
        if x.ndim != 2 or x.shape[1] != self._inputs:
            raise LearnerError(f"rows of shape {x.shape[1:]}: the plan's model takes {self._inputs} numbers a row")
        if not self._kind.classifies:
            return x, np.asarray(rows.y, np.float64)
        if unknown := set(np.unique(rows.y)) - set(self._classes.tolist()):
            raise LearnerError(f"class {min(unknown)} is in the rows but not in model.classes = {self._classes.tolist()}")
        return x, np.asarray(rows.y).astype(self._classes.dtype)
