"""A node's half, as most methods have it: fit on the rows, and send how far the model moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from atoll.algorithms.algorithm import Bodies, Memory
from atoll.algorithms.folds import mean
from atoll.learner import Correct, Lean, Learner, Rows
from atoll.training import Pace
from atoll.vector import Flat, Group, Groups, Layouts, Total, Update, check_layouts


def only(groups: Groups, layouts: Layouts) -> dict[str, Group]:
    """Return the groups of a model, without what an algorithm has beside them."""
    return {name: groups[name] for name in layouts}


def trained(
    learner: Learner,
    brief: Groups,
    rows: Rows,
    pace: Pace,
    rng: np.random.Generator,
    correct: Correct | None = None,
    *,
    lean: Lean | None = None,
) -> Update:
    """Fit the received model on the rows: new minus received, weighted by rows; `lean` for a learner that can represent."""
    received = only(brief, learner.layouts)
    more: Any = {} if lean is None else {"lean": lean}
    fit = learner.fit(received, rows, pace.steps, pace.batch_size, rng, correct, rate=pace.rate, **more)
    check_layouts(fit.groups, learner.layouts)
    moved = {name: group.with_values(_moved(group.values, received[name].values)) for name, group in fit.groups.items()}
    return Update(moved, float(len(rows)), fit.metrics)


def pulling(strength: float, to: Flat) -> Correct:
    """Return what pulls a fit back: the gradient of (strength/2) ‖w − to‖² comes to the loss's own."""

    def correct(gradient: Flat, vector: Flat) -> Flat:
        pulled: Flat = gradient + strength * (vector - to)
        return pulled

    return correct


def plainly(
    learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
) -> tuple[Memory, Update]:
    """Fit, and remember nothing."""
    return memory, trained(learner, brief, rows, pace, rng)


def gradient(learner: Learner, brief: Groups, rows: Rows, pace: Pace, rng: np.random.Generator) -> tuple[Flat, Groups]:
    """Return the gradient of the mean loss over all rows at the received model, and the model's other groups after the pass.

    One pass in mini-batches, at each of which `correct` sees the gradient and stands still. The learner has to know `correct`.
    """
    received = only(brief, learner.layouts)
    sizes = [min(pace.batch_size, len(rows) - lo) for lo in range(0, len(rows), pace.batch_size)]
    total = np.zeros_like(received["parameters"].values)
    left = iter(sizes)

    def see(found: Flat, vector: Flat) -> Flat:
        del vector
        np.add(total, found * (next(left) / len(rows)), out=total)
        return np.zeros_like(found)

    fit = learner.fit(received, rows, len(sizes), pace.batch_size, rng, see, rate=pace.rate)
    return total, fit.groups


def rest(total: Total, *apart: str) -> Total:
    """Return a total without some groups: what is left meets only the mean (buffers) or the sum (counts)."""
    groups = {name: group for name, group in total.groups.items() if name not in apart}
    return Total(groups, total.weight, total.participants, total.registered)


def uniformly(bodies: Bodies, weights: Sequence[float], registered: int) -> Total:
    """Add updates up with one voice each, however many rows stand behind it."""
    return mean(bodies, [1.0] * len(weights), registered)


def _moved(fitted: Flat, received: Flat) -> Flat:
    """Into the fitted vector itself, where it is the learner's own: one model less in memory."""
    into = fitted if fitted.flags.writeable and not np.may_share_memory(fitted, received) else None
    return np.subtract(fitted, received, out=into)
