"""A plan's method under its guards: the algorithm that it names, clipped at the node, and noised before the server's step.

Enters: a plan and a learner. Leaves: an `Algorithm` like any other, and what comes between its fold and its step. Between
ranks 2 and 3: algorithms know no guards, and guards no algorithms; here they meet.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from atoll import algorithms
from atoll.algorithms import Algorithm, Memory, State
from atoll.algorithms.folds import mean
from atoll.algorithms.local import uniformly
from atoll.errors import PlanError
from atoll.keys import new_secret
from atoll.learner import Learner, Rows
from atoll.plan import Plan
from atoll.privacy.dp import central
from atoll.privacy.dp.account import Account
from atoll.privacy.dp.clip import clipped
from atoll.training import Pace
from atoll.vector import Group, Groups, Layout, Layouts, Tensor, Total, Update

CLIP = "clip"
"""The group of a state, and of what nodes are sent, with an adaptive bound."""
_BOUND = Layout((Tensor("bound", (1,)),), "float64")
FIRST, RATE, QUANTILE = 0.1, 0.2, 0.5
"""Of adaptive clipping: where the bound begins, how fast it moves, and which part of the updates it is to leave whole."""


def find(plan: Plan, learner: Learner) -> Algorithm:
    """Return the method that a plan names, under the plan's guards.

    Raises:
        PlanError: as `algorithms.find`; or the method and the guards don't go together.
    """
    algorithm, guards = algorithms.find(plan, learner), plan.privacy
    layouts = algorithm.updates(learner.layouts)
    if guards.clip is None:
        return algorithm
    if guards.noise:
        _check(plan, algorithm, learner.layouts, layouts)
    algorithm = _adaptive(algorithm) if guards.clip == "adaptive" else _clipping(algorithm, guards.clip)
    if not guards.central_noise:
        return algorithm
    bound = 1.0 if guards.clip == "adaptive" else guards.clip
    late = None if plan.cohort.draw == "poisson" else algorithm.late  # a late update would be in a round that didn't draw it
    largest = guards.largest_weight
    return algorithm._replace(
        fold=central.summed(bound, largest), local=partial(_voice, algorithm.local, largest), silent=True, late=late
    )


def noise(plan: Plan, account: Account | None, cohort: int, registered: int) -> dict[str, Any] | None:
    """Return what a round's noise at the server is made of, fresh; None where the plan has none.

    Args:
        plan: the plan.
        account: its account.
        cohort: how many nodes were asked.
        registered: how many belong to the run.

    Returns:
        `key` (hex) and its `digest`, `multiplier`, and the `voices` that the sum is divided by: as many as were asked, or as
        may be, whatever their rows are.
    """
    if account is None or plan.privacy.central_noise is None:
        return None
    secret = plan.cohort.draw == "poisson"
    voices = plan.cohort.fraction * registered if secret else plan.cohort.buffer or cohort
    key = new_secret()
    digest = hashlib.sha256(key).hexdigest()
    return {"key": key.hex(), "digest": digest, "multiplier": account.multiplier, "voices": voices}


def noised(plan: Plan, layouts: Layouts, noise: Mapping[str, Any]) -> Callable[[Total], Total]:
    """Return what comes between fold and step: the noise that `noise` says."""
    clip = plan.privacy.clip
    bound = clip if isinstance(clip, float) else 1.0

    def undo(total: Total) -> Total:
        return central.noised(total, layouts, bound, noise["multiplier"], bytes.fromhex(noise["key"]), noise["voices"])

    return undo


def _check(plan: Plan, algorithm: Algorithm, model: Layouts, layouts: Layouts) -> None:
    """Refuse what noise can't protect.

    Raises:
        PlanError: it.
    """
    rule, guards, key = plan.aggregation.rule, plan.privacy, f"privacy.{plan.privacy.mechanism}"
    if algorithm.fold not in (mean, uniformly):
        raise PlanError(
            f"{key}: '{rule}' makes no mean of updates, so no bound is known on what one of them changes; take fedavg"
        )
    if algorithm.fold is mean and guards.largest_weight is None:
        raise PlanError(
            f"{key}: '{rule}' weighs nodes by their rows, which noise of one size can't hide: set aggregation.options.weighted = "
            "false, or privacy.largest_weight = the rows that count at most"
        )
    size = model["parameters"].size
    for name, layout in layouts.items():
        if layout.total != "weighted" or not layout.dtype.startswith("float"):
            raise PlanError(f"{key}: the group '{name}' is added up whole, without a bound; take another rule or model")
        if name not in model and layout.size != size:
            raise PlanError(f"{key}: '{rule}' sends '{name}' beside the model, which a bound on lengths means nothing to")
    if guards.noise and guards.noise.delta >= 1 / plan.cohort.minimum:
        raise PlanError(
            f"{key}.delta: {guards.noise.delta:g} is no less than one in {plan.cohort.minimum} nodes (cohort.minimum): with such "
            "a chance a node may be given away whole; take one far below 1 / nodes"
        )


def _voice(
    local: Callable[..., tuple[Memory, Update]],
    largest: float | None,
    learner: Learner,
    brief: Groups,
    memory: Memory,
    rows: Rows,
    pace: Pace,
    rng: np.random.Generator,
) -> tuple[Memory, Update]:
    """Tell neither rows nor metrics: one voice each, or a weight up to the largest."""
    memory, update = local(learner, brief, memory, rows, pace, rng)
    return memory, Update(update.groups, 1.0 if largest is None else min(update.weight, largest))


def _clipping(algorithm: Algorithm, bound: float) -> Algorithm:
    def local(
        learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        memory, update = algorithm.local(learner, brief, memory, rows, pace, rng)
        return memory, replace(update, groups=clipped(update.groups, bound)[0])

    return algorithm._replace(local=local)


def _adaptive(algorithm: Algorithm) -> Algorithm:
    """Let the bound follow the median of updates' lengths, as far as noise lets it be seen; updates are sent in units of it.

    Source: Andrew et al. 2021, algorithm 1: C ← C · exp(−η(b̄ − γ)), b̄ the noisy part of updates within C.
    """

    def init(model: Groups) -> State:
        return {**algorithm.init(model), CLIP: Group(_BOUND, np.array([FIRST]))}

    def brief(state: State) -> Groups:
        return {**algorithm.brief(_inner(state)), CLIP: state[CLIP]}

    def updates(layouts: Layouts) -> Layouts:
        return {**algorithm.updates(layouts), central.WITHIN: central.WITHIN_LAYOUT}

    def local(
        learner: Learner, told: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        memory, update = algorithm.local(learner, _inner(told), memory, rows, pace, rng)
        bound = float(told[CLIP].values[0])
        groups, norm = clipped(update.groups, bound)
        groups = {name: group.with_values(group.values / bound) for name, group in groups.items()}
        within = np.array([0.5 if norm <= bound else -0.5], np.float32)
        return memory, replace(update, groups={**groups, central.WITHIN: Group(central.WITHIN_LAYOUT, within)})

    def step(state: State, total: Total) -> State:
        bound = float(state[CLIP].values[0])
        within = float(total.mean(central.WITHIN)[0]) + 0.5
        groups = {name: group.with_values(group.values * bound) for name, group in total.groups.items() if name != central.WITHIN}
        after = algorithm.step(_inner(state), replace(total, groups=groups))
        return {**after, CLIP: Group(_BOUND, np.array([bound * math.exp(-RATE * (within - QUANTILE))]))}

    return algorithm._replace(init=init, brief=brief, updates=updates, local=local, step=step)


def _inner(groups: Groups) -> dict[str, Group]:
    return {name: group for name, group in groups.items() if name != CLIP}
