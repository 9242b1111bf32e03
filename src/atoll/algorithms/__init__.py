"""Federated algorithms: one file a method, both halves in it, cut where the network cuts.

Enters: a model's groups, a learner and a node's rows. Leaves: updates on the node's side, the next
state on the server's. Rank 2: knows vectors, learners and plans, and no network; rank 4 and up import it.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

import numpy as np

from atoll.algorithms.algorithm import Algorithm, Bodies, Fold, Memory, State
from atoll.algorithms.apfl import apfl
from atoll.algorithms.clipping import centered_clipping, norm_clipping
from atoll.algorithms.ditto import ditto
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.fedavgm import fedavgm
from atoll.algorithms.fedbn import fedbn
from atoll.algorithms.feddyn import feddyn
from atoll.algorithms.fednova import fednova
from atoll.algorithms.fedopt import fedadagrad, fedadam, fedyogi
from atoll.algorithms.fedper import fedper
from atoll.algorithms.fedprox import fedprox
from atoll.algorithms.fedsgd import fedsgd
from atoll.algorithms.finetune import finetune
from atoll.algorithms.fltrust import fltrust
from atoll.algorithms.geometric_median import geometric_median
from atoll.algorithms.ifca import ifca
from atoll.algorithms.krum import bulyan, krum, multi_krum
from atoll.algorithms.local import only
from atoll.algorithms.median import median, trimmed_mean
from atoll.algorithms.mime import mime_lite
from atoll.algorithms.newton import newton
from atoll.algorithms.qffl import qffl
from atoll.algorithms.scaffold import scaffold
from atoll.errors import LayoutError, PlanError
from atoll.learner import CAN, Data, Learner, Rows
from atoll.plan import Plan
from atoll.vector import Groups, Update, finite

__all__ = ["Algorithm", "Bodies", "Fold", "Memory", "State", "find", "known", "own", "reference", "train", "work"]

_OWN: Mapping[str, Callable[..., Algorithm]] = {
    "fedavg": fedavg,
    "fedsgd": fedsgd,
    "fedavgm": fedavgm,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "fedadagrad": fedadagrad,
    "fedprox": fedprox,
    "scaffold": scaffold,
    "fednova": fednova,
    "feddyn": feddyn,
    "mime_lite": mime_lite,
    "qffl": qffl,
    "finetune": finetune,
    "ditto": ditto,
    "apfl": apfl,
    "fedper": fedper,
    "fedbn": fedbn,
    "ifca": ifca,
    "newton": newton,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "multi_krum": multi_krum,
    "bulyan": bulyan,
    "geometric_median": geometric_median,
    "norm_clipping": norm_clipping,
    "centered_clipping": centered_clipping,
    "fltrust": fltrust,
}


def known() -> dict[str, Callable[..., Algorithm]]:
    """Return the factories of every method by name: Atoll's own, and installed ones (entry point `atoll.algorithms`)."""
    return {**{found.name: found.load() for found in entry_points(group="atoll.algorithms")}, **_OWN}


def find(plan: Plan, learner: Learner) -> Algorithm:
    """Return the method that a plan names, with its options.

    Raises:
        PlanError: no such rule or option, or the learner can't do what the rule needs.
    """
    rule, options = plan.aggregation.rule, plan.aggregation.options
    rules = known()
    if rule not in rules:
        raise PlanError(f"aggregation.rule: '{rule}' is not known{_nearest(rule, list(rules))}")
    taken = list(inspect.signature(rules[rule]).parameters)
    for option in options:
        if option not in taken:
            raise PlanError(f"aggregation.options.{option}: '{rule}' has no such option{_nearest(option, taken)}")
    try:
        algorithm = rules[rule](**options)
    except TypeError as error:
        raise PlanError(f"aggregation.options: '{rule}' can't take {options}: {error}") from error
    if missing := algorithm.needs - learner.can:
        said = " and ".join(CAN.get(what, what) for what in sorted(missing))
        mend = "logistic = true can" if "curvature" in missing else "logistic, jax, keras and torch can"
        raise PlanError(
            f"aggregation.rule: '{rule}' needs a learner that can {said}; '{plan.model.kind}' as planned can't ({mend})"
        )
    algorithm.updates(learner.layouts)  # a method that can't have this model says so
    if plan.cohort.minimum < algorithm.least:
        raise PlanError(
            f"cohort.minimum: '{rule}' with these options needs at least {algorithm.least} nodes in every round; "
            f"it is {plan.cohort.minimum}"
        )
    return algorithm


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
    received = learner.evaluate(own(plan, algorithm, learner, brief, memory, data, round_, name), data.judge)
    memory, update = train(plan, algorithm, learner, brief, memory, data.train, round_, name)
    return memory, replace(update, metrics={**received, **update.metrics})


def rooted(plan: Plan, algorithm: Algorithm, rows: Rows | None) -> None:
    """Check that the server has rows of its own where its method trains on them.

    Raises:
        PlanError: it has none.
    """
    if algorithm.root and not rows:
        raise PlanError(
            f"aggregation.rule: '{plan.aggregation.rule}' trains on the server's own rows too: give it a holdout (--holdout FILE)"
        )


def reference(plan: Plan, algorithm: Algorithm, learner: Learner, state: State, rows: Rows | None, round_: int) -> Groups | None:
    """Do the local half on the server's own rows, where the method asks for it; seeded as a node with a name that no node has.

    Raises:
        LayoutError: the result is not finite.
    """
    if not algorithm.root or rows is None:
        return None
    return train(plan, algorithm, learner, algorithm.brief(state), {}, rows, round_, "the server")[1].groups


def train(
    plan: Plan, algorithm: Algorithm, learner: Learner, brief: Groups, memory: Memory, rows: Rows, round_: int, name: str
) -> tuple[Memory, Update]:
    """Do the algorithm's local half alone; see `work`."""
    rng, pace = _drawing(plan, round_, name), plan.training.pace(len(rows), round_, plan.plan.rounds)
    memory, update = algorithm.local(learner, brief, memory, rows, pace, rng)
    if not all(finite(group.values) for group in update.groups.values()):
        raise LayoutError("training gave NaN or infinity; lower training.learning_rate, or look for huge values in the data")
    return memory, replace(update, metrics={f"fit.{key}": value for key, value in update.metrics.items()})


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


def _nearest(word: str, words: list[str]) -> str:
    close: list[Any] = difflib.get_close_matches(word, words, 1, 0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(words) or 'none'}"
