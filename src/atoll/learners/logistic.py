"""Logistic regression in plain numpy: two classes, float64, with curvature."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from atoll.errors import LearnerError, PlanError
from atoll.learner import Correct, Fit, Measure, Rows, batches, blocks, by_blocks, classified, nothing
from atoll.metrics import Count, Task
from atoll.plan import Plan
from atoll.vector import Flat, Group, Groups, Layout, Metrics, Tensor

_OPTIMIZER = "sgd"
_ROOM = 1 - 2.0**-30
"""Of a bound on lengths, what is used: a length is rounded."""


def build(plan: Plan) -> Logistic:
    """Build the learner of `[model] logistic = true`.

    Raises:
        PlanError: the number of inputs isn't known, or another optimiser than SGD is asked for.
    """
    if plan.inputs is None:
        raise PlanError("model.inputs: is missing: name data.features, or say how many numbers a row has")
    if plan.training.optimizer != _OPTIMIZER:
        raise PlanError(f"training.optimizer: logistic knows '{_OPTIMIZER}', not '{plan.training.optimizer}'; keras has more")
    return Logistic(plan.inputs, plan.training.learning_rate)


class Logistic:
    """σ(x·kernel + bias), fitted by SGD on the mean binary cross-entropy of each mini-batch.

    Args:
        inputs: numbers a row.
        learning_rate: the step along a mini-batch's mean gradient.
    """

    can = frozenset({"correct", "sgd", "curvature", "per_example"})
    task: Task = "binary"
    chances = True
    moving = ()
    measure: Measure = staticmethod(nothing)
    count: Count = staticmethod(nothing)

    def __init__(self, inputs: int, learning_rate: float) -> None:
        self.inputs = inputs
        self.learning_rate = learning_rate
        self.layouts = {"parameters": Layout((Tensor("kernel", (inputs,)), Tensor("bias", (1,))), "float64")}

    def initial(self, seed: int) -> Groups:
        """Return the zero model: the loss is convex, so every seed starts there."""
        del seed
        layout = self.layouts["parameters"]
        return {"parameters": Group(layout, np.zeros(layout.size))}

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
        """See `Learner.fit`; `fit.loss` is summed as the rows went by."""
        theta = groups["parameters"].values.copy()
        loss = samples = 0.0
        for batch in batches(rng, len(rows), batch_size, steps):
            x, y = self._table(Rows(rows.x[batch], rows.y[batch]))
            logits = x @ theta
            loss += float(_cross_entropy(logits, y).sum())
            samples += len(batch)
            gradient = x.T @ (_sigmoid(logits) - y) / len(batch)
            theta -= self.learning_rate * rate * (gradient if correct is None else correct(gradient, theta))
        return Fit({"parameters": groups["parameters"].with_values(theta)}, {"samples": samples, "loss": loss})

    def evaluate(self, groups: Groups, rows: Rows) -> Metrics:
        """See `Learner.evaluate`; a row counts as 1 from a probability of one half up."""
        return by_blocks(lambda part: self._judge(groups, *self._table(part)), rows)

    def _judge(self, groups: Groups, x: NDArray[np.float64], y: NDArray[np.float64]) -> Metrics:
        logits = x @ groups["parameters"].values
        judged = classified(float(_cross_entropy(logits, y).sum()), (logits >= 0).astype(int), y, two=True)
        return {**judged, **self.count(logits, y), **self.measure(_sigmoid(logits), y)}

    def curvature(self, groups: Groups, rows: Rows) -> tuple[Flat, NDArray[np.float64]]:
        """Return gradient Xᵀ(σ − y) and Hessian Xᵀ diag(σ(1 − σ)) X of the summed loss (Bishop 2006, eq. 4.96–4.97)."""
        size = self.layouts["parameters"].size
        gradient, hessian = np.zeros(size), np.zeros((size, size))
        for x, y in map(self._table, blocks(rows)):
            chance = _sigmoid(x @ groups["parameters"].values)
            gradient += x.T @ (chance - y)
            hessian += (x.T * (chance * (1 - chance))) @ x
        return gradient, hessian

    def clipped(self, groups: Groups, rows: Rows, bound: float, steps: int) -> NDArray[np.float64]:
        """See `PerExample.clipped`; a row's gradient is (σ − y)·x, and |σ − y|·‖x‖ long."""
        vector = groups["parameters"].values
        total = np.zeros(vector.size)
        for x, y in map(self._table, blocks(rows)):
            residual = _sigmoid(x @ vector) - y
            lengths = np.abs(residual) * np.sqrt(np.square(x).sum(axis=1))
            short = np.minimum(1.0, bound * _ROOM / np.maximum(lengths, np.finfo(np.float64).tiny))
            total += np.trunc(x * (residual * short * steps / bound)[:, None]).sum(axis=0)
        return total

    def _table(self, rows: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        x, y = np.asarray(rows.x, np.float64), np.asarray(rows.y, np.float64).reshape(-1)
        if x.ndim != 2 or x.shape[1] != self.inputs:
            raise LearnerError(f"rows of shape {x.shape[1:]}: the plan's model takes {self.inputs} numbers a row")
        if not ((y == 0) | (y == 1)).all():
            raise LearnerError("the target of a logistic model is 0 or 1 in every row; data.positive says which values mean 1")
        return np.column_stack([x, np.ones(len(x))]), y


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0.0, -logits))


def _cross_entropy(logits: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.logaddexp(0.0, logits) - y * logits
