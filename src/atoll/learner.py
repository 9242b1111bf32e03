"""The learner protocol: a model and how it is fitted, behind one narrow door.

Enters: groups of flat vectors and rows. Leaves: fitted groups, and metrics as sums over rows.
Every framework stays behind an implementation in `learners/`; nothing else imports one.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from atoll import metrics
from atoll.errors import LearnerError
from atoll.vector import Flat, Groups, Layouts, Metrics, add

_VALUES = 1 << 19

How = Literal["scan", "vmap"]
"""How many clients are fitted in one call: one after the other, or side by side."""
Call = Callable[..., tuple[Mapping[str, NDArray[Any]], NDArray[Any]]]
"""Fits clients: `((shared, even), count, flats, owns, x, y, masks, steps)`, as `simulate.loops` explains them, → their
fitted flat vectors `[clients, …]` by group, and their losses `[clients]`."""

Correct = Callable[[Flat, Flat], Flat]
"""`correct(gradient, vector)`: what an algorithm makes of a local gradient (FedProx, SCAFFOLD, FedDyn)."""


class Lean(NamedTuple):
    """A further loss on what a layer makes of the rows, by its slope alone: how MOON enters.

    Args:
        layer: whose output stands for a row; None for what the model's last layer with weights takes.
        slope: `(x, z)` → the gradient of that loss, of a mini-batch, by its representations `z` `[rows, width]`.
    """

    layer: str | None
    slope: Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]


Measure = Callable[[NDArray[Any], NDArray[Any]], Metrics]
"""`measure(predictions, y)`: more sums over rows than a learner's own."""


def nothing(predictions: NDArray[Any], y: NDArray[Any]) -> Metrics:
    """Measure nothing more."""
    del predictions, y
    return {}


class Rows(NamedTuple):
    """Rows of data: `x` of shape [rows, …] and `y` of shape [rows]."""

    x: NDArray[Any]
    y: NDArray[Any]

    def __len__(self) -> int:  # rows, not fields
        return len(self.x)


class Data(NamedTuple):
    """What a node holds: rows to fit on, and rows of its own to judge a model by (may be empty)."""

    train: Rows
    test: Rows

    @property
    def judge(self) -> Rows:
        """The rows that a received model is judged by: the test rows, or without any the training rows."""
        return self.test if len(self.test.x) else self.train


class Fit(NamedTuple):
    """What fitting gives: the fitted groups, and sums over the rows seen (`samples`, `loss`).

    The groups' values are the caller's own to write into where they are writeable; those of a vectorised fit are not.
    """

    groups: Groups
    metrics: Metrics


CAN: Mapping[str, str] = {
    "correct": "let a method change each gradient",
    "sgd": "take plain steps, the learning rate times the gradient (training.optimizer = 'sgd', without options)",
    "curvature": "give gradient and Hessian of its loss",
    "per_example": "give the gradient of each row",
    "scan": "train clients one after the other in one call",
    "vmap": "train many clients in one call",
    "represent": "give what a layer makes of each row",
    "slopes": "grow trees from sums",
    "boost": "boost trees on its rows",
}


class Learner(Protocol):
    """A model and how it is fitted. `check_learner` in `atoll.testing` is the suite every one passes."""

    @property
    def layouts(self) -> Layouts:
        """The layouts of the model's groups: `parameters`, and where it has any `buffers` (averaged) and `counts` (added up)."""
        ...

    @property
    def can(self) -> frozenset[str]:
        """What it can do beyond fitting: a subset of `CAN`; its values say each in words."""
        ...

    def initial(self, seed: int) -> Groups:
        """Return a new model: the same groups for the same seed."""
        ...

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
        """Fit for `steps` mini-batches, in the order that `batches(rng, …)` draws them; the groups given stay as they are.

        `rate` multiplies the learning rate in this fit; a learner without one refuses any but 1.
        """
        ...

    def evaluate(self, groups: Groups, rows: Rows) -> Metrics:
        """Judge a model: sums over rows (`samples`, `loss`, `correct`, …), so that metrics over nodes are exact."""
        ...


@runtime_checkable
class Curved(Protocol):
    """A learner whose loss has a curvature that can be had whole (`curvature` in `can`)."""

    def curvature(self, groups: Groups, rows: Rows) -> tuple[Flat, NDArray[np.float64]]:
        """Return the gradient `[p]` and the Hessian `[p, p]` of the summed loss over the rows."""
        ...


@runtime_checkable
class Boosting(Protocol):
    """A learner of boosted trees whose next one can be grown from sums over rows (`slopes` in `can`)."""

    def slopes(self, groups: Groups, rows: Rows) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return the rows as trees take them, and gradient and curvature of each row's loss `[rows, outputs]`."""
        ...


@runtime_checkable
class Representing(Protocol):
    """A learner whose model has a layer that stands for a row (`represent` in `can`); `fit` takes one keyword more."""

    def represent(self, groups: Groups, layer: str | None) -> Callable[[NDArray[Any]], NDArray[Any]]:
        """Return what makes representations `[rows, width]` of rows with this model, as they are judged: without dropout.

        Raises:
            PlanError: there is no such layer.
        """
        ...

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
        lean: Lean | None = None,
    ) -> Fit:
        """Do as `Learner.fit`, with a further loss; the metrics hold the learner's own loss alone."""
        ...


@runtime_checkable
class PerExample(Protocol):
    """A learner that gives many rows' gradients in one call (`per_example` in `can`)."""

    @property
    def moving(self) -> tuple[str, ...]:
        """The names of what training may change beside the parameters, such as batch-norm statistics: no noise hides that."""
        ...

    def clipped(self, groups: Groups, rows: Rows, bound: float, steps: int) -> NDArray[np.float64]:
        """Return the sum of the rows' gradients by the parameters of a model, each made no longer than the bound, `[p]`.

        Each row's gradient is that of a batch of this row alone, and so depends on no other row. In whole steps of bound/steps:
        each number of each row is cut towards zero. A gradient that isn't finite adds nothing.
        """
        ...


class Pure(NamedTuple):
    """A learner's fitting and judging as pure functions on JAX arrays: what strategies compile whole cohorts from.

    Args:
        own: `(rng, rate)` → the arrays that a fit draws before its batches, and its learning rate. On the host.
        arrays: `(rows, which)` → `x` and `y` as `step` takes them. On the host.
        begin: `(flats, own)` → what is carried from step to step; `flats` are the groups' flat vectors by name.
        step: `(carry, own, x, y, mask, number)` → what is carried on, and the loss summed over the rows. `mask` `[rows]` is 1
            for true rows and 0 for those that fill up a short batch; None where all are true.
        end: what was carried → the fitted flat vectors by name.
        judge: `(flats, x, y)` → outputs `[rows, …]` and losses `[rows]`.
        sums: `(outputs, losses, y)` → the metrics of these rows. On the host.
        apart: `(x)` → whether in training each row's output depends on no other row and on no draw, so that a short batch
            may be filled up: batch norm and dropout are not. On the host.
    """

    own: Callable[[np.random.Generator, float], tuple[NDArray[Any], ...]]
    arrays: Callable[[Rows, NDArray[np.intp] | slice], tuple[NDArray[Any], NDArray[Any]]]
    begin: Callable[[dict[str, Any], Any], Any]
    step: Callable[[Any, Any, Any, Any, Any, Any], tuple[Any, Any]]
    end: Callable[[Any], dict[str, Any]]
    judge: Callable[[dict[str, Any], Any, Any], tuple[Any, Any]]
    sums: Callable[[NDArray[Any], NDArray[Any], NDArray[Any]], Metrics]
    apart: Callable[[NDArray[Any]], bool]


class Together(NamedTuple):
    """A learner's fitting and judging of many clients at once, whatever they are made with. All arrays are on the host.

    Args:
        own, arrays, sums, apart: as `Pure` has them.
        fits: a strategy → its `Call`.
        judge: `(flats, x, y)` → outputs `[rows, …]` and losses `[rows]`.
    """

    own: Callable[[np.random.Generator, float], tuple[NDArray[Any], ...]]
    arrays: Callable[[Rows, NDArray[np.intp] | slice], tuple[NDArray[Any], NDArray[Any]]]
    fits: Callable[[How], Call]
    judge: Callable[[dict[str, Any], Any, Any], tuple[Any, Any]]
    sums: Callable[[NDArray[Any], NDArray[Any], NDArray[Any]], Metrics]
    apart: Callable[[NDArray[Any]], bool]


@runtime_checkable
class Compiled(Protocol):
    """A learner that is compiled together with many clients' rows (`scan` and `vmap` in `can`)."""

    def pure(self) -> Pure:
        """Return its parts as pure functions."""
        ...


@runtime_checkable
class SideBySide(Protocol):
    """A learner that fits many clients in one call by means of its own (`vmap` in `can`)."""

    def together(self) -> Together:
        """Return what fits and judges many clients."""
        ...


OWN = "metric."
"""What the names of the sums of a plan's own metrics begin with."""


def batches(rng: np.random.Generator, rows: int, batch_size: int, steps: int) -> Iterator[NDArray[np.intp]]:
    """Draw the row numbers of `steps` mini-batches: shuffled anew for each pass, the last of a pass may be short.

    >>> [len(batch) for batch in batches(np.random.default_rng(0), 5, 2, 4)]
    [2, 2, 1, 2]
    """
    while steps > 0:
        order = np.arange(rows, dtype=np.uint32 if rows < 1 << 32 else np.int64)  # rows that are on disk may be very many
        rng.shuffle(order)  # the draws, and so the order, of `rng.permutation(rows)`
        for start in range(0, rows, batch_size):
            yield order[start : start + batch_size].astype(np.intp)
            steps -= 1
            if steps == 0:
                return


def blocks(rows: Rows) -> Iterator[Rows]:
    """Cut rows that may be on disk into parts that fit into memory, of some 4 MB as float64."""
    step = max(1, _VALUES // max(1, math.prod(rows.x.shape[1:])))
    for lo in range(0, max(1, len(rows)), step):
        yield Rows(rows.x[lo : lo + step], rows.y[lo : lo + step])


def filled(arrays: Sequence[NDArray[Any]], most: int) -> list[NDArray[Any]]:
    """Fill arrays up with their first row to a power of two of rows, or to `most`: what is compiled for each size sees few sizes.

    >>> [len(part) for part in filled([np.zeros((5, 2)), np.zeros(5)], 4096)], len(filled([np.zeros(7)], 7)[0])
    ([8, 8], 7)
    """
    lack = min(most, 1 << (len(arrays[0]) - 1).bit_length()) - len(arrays[0])
    return [np.concatenate([part, np.repeat(part[:1], lack, axis=0)]) if lack > 0 else part for part in arrays]


def by_blocks(judge: Callable[[Rows], Metrics], rows: Rows) -> dict[str, float]:
    """Judge rows block by block: the sums of those names that every block gives."""
    parts = [judge(part) for part in blocks(rows)]
    return {name: value for name, value in add(parts).items() if all(name in part for part in parts)}


def scores(learner: Learner, groups: Groups, rows: Rows) -> NDArray[np.float64]:
    """Return a model's scores of rows, as `metrics.Count` has them: what the learner counts is all that it is asked for.

    Raises:
        LearnerError: the learner counts nothing by rows, as of rows with many targets.
    """
    seen: list[NDArray[Any]] = []

    def see(scores: NDArray[Any], y: NDArray[Any]) -> Metrics:
        del y
        seen.append(np.asarray(scores, np.float64))
        return {}

    twin: Any = copy.copy(learner)  # others may judge with it meanwhile
    twin.count = see
    twin.evaluate(groups, rows)
    if sum(map(len, seen)) != len(rows):
        raise LearnerError("the model's outputs can't be had row by row, so they have no mean over an ensemble")
    return np.concatenate(seen)


def classified(loss: float, predicted: NDArray[Any], y: NDArray[Any], *, two: bool) -> dict[str, float]:
    """Return the sums that judge a classification; a model of two classes, 0 and 1, also gives the confusion counts.

    Args:
        loss: the loss summed over the rows.
        predicted: the predicted classes `[rows]`.
        y: the true classes `[rows]`.
        two: whether the model knows no others, whatever these rows hold: all nodes have to give the same sums.
    """
    sums = {"samples": float(len(y)), "loss": float(loss), "correct": float(np.sum(predicted == y))}
    if two:
        sums |= {
            "true_positive": float(np.sum((predicted == 1) & (y == 1))),
            "false_positive": float(np.sum((predicted == 1) & (y == 0))),
            "false_negative": float(np.sum((predicted == 0) & (y == 1))),
        }
    return sums


def regressed(loss: float, predicted: NDArray[Any], y: NDArray[Any]) -> dict[str, float]:
    """Return the sums that judge a regression, in float64; arguments as in `classified`."""
    predicted, y = np.asarray(predicted, np.float64), np.asarray(y, np.float64)
    return {
        "samples": float(len(y)),
        "loss": float(loss),
        "squared_error": float(np.sum((predicted - y) ** 2)),
        "absolute_error": float(np.sum(np.abs(predicted - y))),
        "target": float(np.sum(y)),
        "target_squared": float(np.sum(np.square(y))),
    }


def pooled(parts: Iterable[Metrics]) -> dict[str, float]:
    """Add up the sums of many nodes, as if their rows lay in one place; those of training itself (`fit.`) are left out."""
    return {name: value for name, value in add(list(parts)).items() if not name.startswith("fit.")}


SLOTS = 256
"""Places for the sums of metrics of a plan's own functions, which name them as they please."""


def named(hidden: Metrics, parts: Iterable[Metrics]) -> dict[str, float]:
    """Of sums that are only known together, return those that some node had a part in: `parts` have their names alone.

    A name that isn't known beforehand is in its `slot`; two of them in one slot can't be told apart, and are left out. Of
    counts in bins no name is told; those that are zero are left out.
    """
    names = {name for one in parts for name in one}
    slots = Counter(slot(name) for name in names - hidden.keys())
    apart = {name for name in names - hidden.keys() if slots[slot(name)] == 1}
    return {name: value for name, value in hidden.items() if name in names or (value and metrics.binned(name))} | {
        name: hidden[slot(name)] for name in apart if slot(name) in hidden
    }


def slot(name: str) -> str:
    """Return where the sum of a metric lies, among sums that are only known together, whose name only its node knows."""
    return f"#{int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], 'little') % SLOTS}"


def summary(sums: Metrics) -> dict[str, float]:
    """Turn sums over rows into the figures people read, see `metrics.figures`; of a plan's own metrics the mean.

    >>> summary({"samples": 4.0, "loss": 2.0, "correct": 3.0, "metric.half": 1.0})
    {'loss': 0.5, 'accuracy': 0.75, 'half': 0.25}
    """
    rows = sums.get("samples", 0.0)
    own = {name.removeprefix(OWN): value / rows for name, value in sums.items() if rows and name.startswith(OWN)}
    return metrics.figures(sums) | own
