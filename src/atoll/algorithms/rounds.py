"""A round's work beside the data: judge the model as received, then the method's local half, all chance from the plan's seed."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np

from atoll.algorithms.algorithm import Algorithm, Memory, State
from atoll.algorithms.local import only
from atoll.errors import LayoutError
from atoll.learner import Data, Learner, Rows
from atoll.plan import Plan
from atoll.vector import Groups, Metrics, Update, finite


def _quietly() -> np.errstate:
    """What grows beyond all numbers is told in one line when it is there, and not by numpy on the way."""
    return np.errstate(over="ignore", invalid="ignore")


def work(
    plan: Plan,
    algorithm: Algorithm,
    learner: Learner,
    brief: Groups,
    memory: Memory,
    data: Data,
    round_: int,
    name: str,
) -> tuple[Memory, Update]:
    """Do a node's part of a round: judge the model as received, then the algorithm's local half.

    The generator is seeded by (plan seed, round, node's name), so a repeated round draws the same batches.

    Raises:
        LayoutError: the result is not finite.
    """
    if algorithm.silent:
        return train(plan, algorithm, learner, brief, memory, data.train, round_, name)
    with _quietly():
        received = judged(learner.evaluate(own(plan, algorithm, learner, brief, memory, data, round_, name), data.judge))
    memory, update = train(plan, algorithm, learner, brief, memory, data.train, round_, name)
    return memory, replace(update, metrics={**received, **update.metrics})


def judged(received: Metrics) -> Metrics:
    """Return the sums that judge a received model, once they are known to be numbers.

    Raises:
        LayoutError: one is not finite.
    """
    if bad := [name for name, value in received.items() if not math.isfinite(value)]:
        raise LayoutError(
            f"the model as received gives NaN or infinity here (the sum '{bad[0]}'); lower training.learning_rate, "
            "or look for huge values in the data"
        )
    return received


def reference(plan: Plan, algorithm: Algorithm, learner: Learner, state: State, rows: Rows | None, round_: int) -> Groups | None:
    """Do the local half on the server's own rows, where the method asks for it; seeded as a node with a name that no node has.

    Raises:
        LayoutError: the result is not finite.
    """
    if not algorithm.root or rows is None:
        return None
    return train(plan, algorithm, learner, algorithm.brief(state), {}, rows, round_, "the server")[1].groups


def taught(
    plan: Plan, algorithm: Algorithm, learner: Learner, before: State, after: State, rows: Rows | None, round_: int
) -> Groups | None:
    """Do what the server makes of a round's outcome on its own rows, where the method asks for it.

    Raises:
        LayoutError: the result is not finite.
    """
    if algorithm.teach is None or rows is None:
        return None
    pace = plan.training.pace(len(rows), round_, plan.plan.rounds)
    found = algorithm.teach(learner, before, after, rows, pace, _drawing(plan, round_, "the server"))
    _check(found)
    return found


def train(
    plan: Plan, algorithm: Algorithm, learner: Learner, brief: Groups, memory: Memory, rows: Rows, round_: int, name: str
) -> tuple[Memory, Update]:
    """Do the algorithm's local half alone; see `work`."""
    rng, pace = _drawing(plan, round_, name), plan.training.pace(len(rows), round_, plan.plan.rounds)
    with _quietly():
        memory, update = algorithm.local(learner, brief, memory, rows, pace, rng)
    _check(update.groups)
    if algorithm.silent:
        return memory, replace(update, metrics={})
    return memory, Update(update.groups, update.weight, {f"fit.{key}": value for key, value in update.metrics.items()})


def own(
    plan: Plan,
    algorithm: Algorithm,
    learner: Learner,
    brief: Groups,
    memory: Memory,
    data: Data,
    round_: int,
    name: str,
) -> Groups:
    """Return the model that a node itself uses: the received one, or what a personal method makes of it."""
    if algorithm.own is None:
        return only(brief, learner.layouts)
    rng, pace = _drawing(plan, round_, name, 1), plan.training.pace(len(data.train), round_, plan.plan.rounds)
    return algorithm.own(learner, brief, memory, data.train, pace, rng)


def _drawing(plan: Plan, round_: int, name: str, *more: int) -> np.random.Generator:
    return np.random.default_rng([plan.plan.seed, round_, *hashlib.sha256(name.encode()).digest()[:8], *more])


def _check(groups: Groups) -> None:
    if not all(finite(group.values) for group in groups.values()):
        raise LayoutError("training gave NaN or infinity; lower training.learning_rate, or look for huge values in the data")
