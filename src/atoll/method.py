"""A plan's method under its guards: the algorithm that it names, clipped at the node, and noised before the server's step.

Enters: a plan and a learner. Leaves: an `Algorithm` like any other, and what comes between its fold and its step. Between
ranks 2 and 3: algorithms know no guards, and guards no algorithms; here they meet.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from atoll import algorithms
from atoll.algorithms import Algorithm, Memory, State
from atoll.algorithms.folds import mean
from atoll.algorithms.local import uniformly
from atoll.errors import LayoutError, PlanError
from atoll.keys import new_secret
from atoll.learner import CAN, Learner, PerExample, Rows
from atoll.plan import Plan
from atoll.privacy.dp import central, distributed, tree
from atoll.privacy.dp.account import Account, account
from atoll.privacy.dp.clip import clipped
from atoll.privacy.dp.example import Private
from atoll.privacy.dp.local import noisy
from atoll.training import Pace
from atoll.vector import Group, Groups, Layout, Layouts, Tensor, Total, Update, finite

log = logging.getLogger("atoll.node")

CLIP = "clip"
"""The group of a state, and of what nodes are sent, with an adaptive bound."""
_BOUND = Layout((Tensor("bound", (1,)),), "float64")
_FINEST = 2.0**-14
"""The least bound whose grid the words of a secure sum have for what isn't the model's own parameters, too."""
_OF_ROWS = frozenset({"correct", "sgd"})
"""What a learner can whose steps may be noisy sums of rows' gradients."""
_LEAST = 2.0**-60
"""The least adaptive bound that a node takes; the largest is the inverse."""
FIRST, RATE, QUANTILE = 0.1, 0.2, 0.5
"""Of adaptive clipping: where the bound begins, how fast it moves, and which part of the updates it is to leave whole."""


def find(plan: Plan, learner: Learner) -> Algorithm:
    """Return the method that a plan names, under the plan's guards.

    Raises:
        PlanError: as `algorithms.find`; or the method and the guards don't go together.
    """
    algorithm, guards = algorithms.find(plan, learner), plan.privacy
    clip, largest = guards.clip, guards.largest_weight
    if guards.example_noise:
        algorithm = _by_rows(plan, algorithm, learner)
    if guards.noise:
        _check(plan, algorithm, learner.layouts, algorithm.updates(learner.layouts))
    if guards.local_noise or guards.distributed_noise:
        algorithm = _whatever_rows_do(algorithm, algorithm.updates(learner.layouts))
    if clip == "adaptive":
        algorithm = _adaptive(algorithm)
    elif clip is not None and not (guards.local_noise or guards.distributed_noise):
        algorithm = _after(algorithm, partial(_clipped, clip))
    if (guards.central_noise or guards.tree_noise) and clip is not None:
        late = (
            None if plan.cohort.draw == "poisson" or plan.cohort.turns else algorithm.late
        )  # a late update would be in a round that didn't draw it
        algorithm = algorithm._replace(fold=central.summed(guards.unit, largest), late=late)
    if guards.local_noise and isinstance(clip, float) and (own := account(plan)):
        algorithm = _after(algorithm, partial(_noisy, clip, own.multiplier))
    if guards.distributed_noise and (own := account(plan)):
        for part in central.shares(own.multiplier, algorithm.updates(learner.layouts)).values():
            distributed.share(guards.unit, part, _shares(plan))
        algorithm = _after(algorithm, partial(_shared, guards.unit, own.multiplier, _shares(plan)))
    return _after(algorithm, partial(_quiet, largest))._replace(silent=True) if guards.noise else algorithm


def _by_rows(plan: Plan, algorithm: Algorithm, learner: Learner) -> Algorithm:
    """Let a node train by clipped gradients of single rows, with noise.

    Raises:
        PlanError: the learner can't.
    """
    key, rule, kind = "privacy.example_noise", plan.aggregation.rule, plan.model.sklearn or plan.model.kind
    if more := algorithm.needs - _OF_ROWS:
        said = " and ".join(CAN.get(what, what) for what in sorted(more))
        raise PlanError(f"{key}: '{rule}' has learners {said}, which no noise was planned for; take fedavg")
    if not learner.can >= _OF_ROWS:
        raise PlanError(f"{key}: takes plain steps, each row's gradient by itself; '{kind}' as planned can't: {_mend(plan)}")
    moving = learner.moving if isinstance(learner, PerExample) else [name for name in learner.layouts if name != "parameters"]
    if plan.data.standardise == "node":
        raise PlanError(
            f"{key}: data.standardise = 'node' has each row change what all others look like, which no noise hides; leave it "
            "out, and scale by numbers that are known without the rows (in the model, for instance)"
        )
    if moving:
        raise PlanError(
            f"{key}: training changes '{moving[0]}' of the model, which no noise hides; normalise by layer or group instead of "
            "by batch (buffers of PyTorch that nothing changes: persistent=False)"
        )

    def local(
        learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        about = account(plan, len(rows))
        pace = pace._replace(steps=about.steps) if about else pace
        return algorithm.local(Private(learner, plan), brief, memory, rows, pace, rng)

    return algorithm._replace(local=local)


def _mend(plan: Plan) -> str:
    if plan.model.sklearn is None:
        return "training.optimizer = 'sgd', without options"
    if plan.model.sklearn.startswith("MLP"):
        return "training.optimizer = 'sgd', and model.options = { momentum = 0.0 }"
    return "its steps are of many rows at a time; take [model] logistic = true, or an MLP with options = { momentum = 0.0 }"


def _whatever_rows_do(algorithm: Algorithm, layouts: Layouts) -> Algorithm:
    """Let zeros, to which noise is still to come, stand for an update that rows don't let be made: no noise covers a refusal."""

    def local(
        learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        try:
            after, update = algorithm.local(learner, brief, memory, rows, pace, rng)
            if all(finite(group.values) for group in update.groups.values()):
                return after, update
            log.warning("training gave NaN or infinity; zeros go into the round in its place, under the noise")
        except Exception:  # a framework's, whatever it is
            log.exception("training failed; zeros go into the round in its place, under the noise")
        return memory, Update({name: Group(layout, np.zeros(layout.size, layout.dtype)) for name, layout in layouts.items()}, 1.0)

    return algorithm._replace(local=local)


def _after(algorithm: Algorithm, act: Callable[[Update], Update]) -> Algorithm:
    """Let a node do something to its update before that leaves."""

    def local(
        learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        memory, update = algorithm.local(learner, brief, memory, rows, pace, rng)
        return memory, act(update)

    return algorithm._replace(local=local)


def _clipped(bound: float, update: Update) -> Update:
    return replace(update, groups=clipped(update.groups, bound)[0])


def _noisy(bound: float, multiplier: float, update: Update) -> Update:
    return replace(update, groups=noisy(update.groups, bound, multiplier, new_secret()))


def _shared(bound: float, multiplier: float, nodes: int, update: Update) -> Update:
    return replace(update, groups=distributed.noisy(update.groups, bound, multiplier, nodes, new_secret()))


def _shares(plan: Plan) -> int:
    """Return how many nodes' shares make the planned noise: the fewest in any sum, less those that may add none."""
    return plan.smallest_sum - plan.privacy.corrupt


def _quiet(largest: float | None, update: Update) -> Update:
    """Tell neither rows nor metrics, which no noise hides: one voice each, or a weight up to the largest."""
    return Update(update.groups, 1.0 if largest is None else min(update.weight, largest))


class Round(NamedTuple):
    """A round that is being closed: number and try, how many nodes were asked, belong to the run, and are in it."""

    number: int
    attempt: int
    cohort: int
    registered: int
    survivors: int


Made = Mapping[str, Any] | None
"""What a round's noise was made of, as `noise` gives it."""


def noise(plan: Plan, account: Account | None, here: Round, before: Sequence[Made]) -> dict[str, Any] | None:
    """Return what a round's noise is made of, that of the server fresh; None where the plan has none, or only nodes know it.

    Args:
        plan: the plan.
        account: its account.
        here: the round.
        before: that of the rounds before: a tree's noise is all of one key.

    Returns:
        `key` (hex) and its `digest`, `multiplier`, and the `voices` that the sum is divided by: as many as were asked, or as
        may be, whatever their rows are. Noise in shares has no key. Of a node's own noise, `multiplier` and how many `tries`
        the round took, each of which let an update out of a node.

    Raises:
        PrivacyError: there are too few survivors for the noise that was promised.
    """
    if account is not None and plan.privacy.distributed_noise:
        # Of buckets the smallest counts: a node is in one of them, and the others' sums tell nothing of it.
        fewest = plan.smallest_sum if plan.privacy.buckets else here.survivors
        real = distributed.actual(account.multiplier, fewest, plan.smallest_sum, plan.privacy.corrupt)
        return {"key": None, "digest": "", "multiplier": real, "voices": here.survivors}
    if account is not None and (plan.privacy.local_noise or plan.privacy.example_noise):
        return {"key": None, "digest": "", "multiplier": account.multiplier, "tries": here.attempt}
    if account is None or not (plan.privacy.central_noise or plan.privacy.tree_noise):
        return None
    rules = plan.cohort
    part = 1 / rules.turns if rules.turns else rules.fraction
    voices = part * here.registered if rules.turns or rules.draw == "poisson" else rules.buffer or here.cohort
    last = before[-1] if before and plan.privacy.tree_noise else None
    key = bytes.fromhex(last["key"]) if last else new_secret()
    about = {"multiplier": account.multiplier, "voices": voices, "round": here.number}
    return {"key": key.hex(), "digest": hashlib.sha256(key).hexdigest(), **about}


def noised(plan: Plan, layouts: Layouts, noise: Made) -> Callable[[Total], Total] | None:
    """Return what comes between fold and step: the server's noise that `noise` says; None where it adds none."""
    if noise is None or not noise["key"]:
        return None

    def undo(total: Total) -> Total:
        key, turns = bytes.fromhex(noise["key"]), plan.cohort.turns
        draw = tree.drawn(key, noise["round"], turns) if plan.privacy.tree_noise and turns else central.fresh(key)
        return central.noised(total, layouts, plan.privacy.unit, noise["multiplier"], draw, noise["voices"])

    return undo


def multipliers(account: Account | None, noises: Sequence[Made]) -> list[float]:
    """Return the noise multiplier of each release: of each closed round, or of each try that let updates out."""
    if account is None:
        return []
    known: list[Mapping[str, Any]] = [one or {"multiplier": account.multiplier} for one in noises]
    return [one["multiplier"] for one in known for _ in range(one.get("tries", 1))]


def spent(account: Account | None, noises: Sequence[Made]) -> float | None:
    """Return ε after the rounds with these noises; None where none bounds it."""
    return None if account is None else account.spent_by(multipliers(account, noises))


def over(account: Account | None, noises: Sequence[Made]) -> str:
    """Say why there can be no round after those with these noises, or nothing where there can."""
    return "" if account is None else account.over_by(multipliers(account, noises))


def _check(plan: Plan, algorithm: Algorithm, model: Layouts, layouts: Layouts) -> None:
    """Refuse what noise can't protect.

    Raises:
        PlanError: it.
    """
    rule, guards, key = plan.aggregation.rule, plan.privacy, f"privacy.{plan.privacy.mechanism}"
    for name, layout in layouts.items():
        if layout.total != "weighted" or not layout.dtype.startswith("float"):
            raise PlanError(f"{key}: the group '{name}' is added up whole, without a bound; take another rule or model")
        if name not in model and layout.size != model["parameters"].size:
            raise PlanError(f"{key}: '{rule}' sends '{name}' beside the model, which a bound on lengths means nothing to")
    if guards.distributed_noise and plan.compression.up:
        raise PlanError(f"{key}: compressed, its shares would be no such noise any more; leave compression.up out")
    if guards.distributed_noise and len(layouts) > 1 and guards.unit < _FINEST:
        raise PlanError(
            f"{key}: so small a clip leaves no room to write the noise of the model's buffers; raise clip to {_FINEST:g}"
        )
    if guards.noise and not guards.example_noise and guards.noise.delta >= 1 / plan.cohort.minimum:
        raise PlanError(
            f"{key}.delta: {guards.noise.delta:g} is no less than one in {plan.cohort.minimum} nodes (cohort.minimum): "
            "so likely a node may be given away whole; take one far below 1 / nodes"
        )
    if not (guards.central_noise or guards.tree_noise or guards.distributed_noise):
        return
    if algorithm.fold not in (mean, uniformly) and not guards.buckets:  # what a rule makes of noisy sums tells no more
        raise PlanError(f"{key}: '{rule}' makes no mean of updates, so one of them changes who knows how much; take fedavg")
    if not guards.distributed_noise and algorithm.fold is mean and guards.largest_weight is None:
        raise PlanError(
            f"{key}: '{rule}' weighs nodes by their rows, which noise of one size can't hide: set aggregation.options.weighted = "
            "false, or privacy.largest_weight = the rows that count at most"
        )


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
        if not _LEAST <= bound <= 1 / _LEAST:  # a float32 update in units of it would be none
            raise LayoutError(f"the server says a bound of {bound:g} on lengths: it lies between {_LEAST:g} and {1 / _LEAST:g}")
        groups, norm = clipped(update.groups, bound)
        groups = {name: group.with_values(group.values / bound) for name, group in groups.items()}
        within = np.array([0.5 if norm <= bound else -0.5], np.float32)
        return memory, replace(update, groups={**groups, central.WITHIN: Group(central.WITHIN_LAYOUT, within)})

    def step(state: State, total: Total) -> State:
        bound = float(state[CLIP].values[0])
        within = float(total.mean(central.WITHIN)[0]) + 0.5
        groups = {name: group.with_values(group.values * bound) for name, group in total.groups.items() if name != central.WITHIN}
        after = algorithm.step(_inner(state), replace(total, groups=groups))
        moved = np.clip([bound * math.exp(-RATE * (within - QUANTILE))], _LEAST, 1 / _LEAST)
        return {**after, CLIP: Group(_BOUND, moved)}

    return algorithm._replace(init=init, brief=brief, updates=updates, local=local, step=step)


def _inner(groups: Groups) -> dict[str, Group]:
    return {name: group for name, group in groups.items() if name != CLIP}
