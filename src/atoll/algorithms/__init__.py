"""Federated algorithms: one file a method, both halves in it, cut where the network cuts.

Enters: a model's groups, a learner and a node's rows. Leaves: updates on the node's side, the next
state on the server's. Rank 2: knows vectors, learners and plans, and no network; rank 4 and up import it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import entry_points

from atoll.algorithms.algorithm import Algorithm, Bodies, Fold, Memory, State
from atoll.algorithms.apfl import apfl
from atoll.algorithms.bagging import bagging
from atoll.algorithms.clipping import centered_clipping, norm_clipping
from atoll.algorithms.ditto import ditto
from atoll.algorithms.fedasync import fedasync
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
from atoll.algorithms.folds import mean
from atoll.algorithms.geometric_median import geometric_median
from atoll.algorithms.histograms import histograms
from atoll.algorithms.ifca import ifca
from atoll.algorithms.krum import bulyan, krum, multi_krum
from atoll.algorithms.local import uniformly
from atoll.algorithms.median import median, trimmed_mean
from atoll.algorithms.mime import mime_lite
from atoll.algorithms.moon import moon
from atoll.algorithms.newton import newton
from atoll.algorithms.one_shot import one_shot
from atoll.algorithms.qffl import qffl
from atoll.algorithms.rounds import judged, own, reference, taught, train, work
from atoll.algorithms.scaffold import scaffold
from atoll.errors import PlanError
from atoll.guards import BUCKETS
from atoll.learner import CAN, Learner, Rows
from atoll.plan import Plan
from atoll.sections import nearest
from atoll.vector import Update

__all__ = [
    "Algorithm",
    "Bodies",
    "Fold",
    "Memory",
    "State",
    "adds",
    "find",
    "judged",
    "known",
    "own",
    "reference",
    "rooted",
    "taught",
    "train",
    "voiced",
    "work",
]

_OWN: Mapping[str, Callable[..., Algorithm]] = {
    "fedavg": fedavg,
    "fedsgd": fedsgd,
    "fedavgm": fedavgm,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "fedadagrad": fedadagrad,
    "fedprox": fedprox,
    "fedasync": fedasync,
    "scaffold": scaffold,
    "fednova": fednova,
    "feddyn": feddyn,
    "mime_lite": mime_lite,
    "moon": moon,
    "qffl": qffl,
    "finetune": finetune,
    "ditto": ditto,
    "apfl": apfl,
    "fedper": fedper,
    "fedbn": fedbn,
    "ifca": ifca,
    "newton": newton,
    "one_shot": one_shot,
    "bagging": bagging,
    "histograms": histograms,
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

_GRADIENTS = "logistic, jax, keras and torch can, and sklearn's MLPs with options = { momentum = 0 }"
_ABLE: Mapping[str, str] = {
    "curvature": "logistic = true can",
    "boost": "trees = \"binary:logistic\" can, once XGBoost is installed: pip install 'atoll-fl[xgboost]'",
    "slopes": 'trees = "binary:logistic" can',
    "represent": "neural ones can: torch, keras on JAX, and jax functions with a `represent`",
}
"""Who can what not all can."""
_TREES = frozenset({"slopes", "boost"})


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
        raise PlanError(f"aggregation.rule: '{rule}' is not known{nearest(rule, rules)}")
    taken = list(inspect.signature(rules[rule]).parameters)
    for option in options:
        if option not in taken:
            raise PlanError(f"aggregation.options.{option}: '{rule}' has no such option{nearest(option, taken)}")
    try:
        algorithm = rules[rule](**options)
    except TypeError as error:
        raise PlanError(f"aggregation.options: '{rule}' can't take {options}: {error}") from error
    if missing := algorithm.needs - learner.can:
        said = " and ".join(CAN.get(what, what) for what in sorted(missing))
        mend = next((mend for what, mend in _ABLE.items() if what in missing), _GRADIENTS)
        raise PlanError(
            f"aggregation.rule: '{rule}' needs a learner that can {said}; '{plan.model.kind}' as planned can't ({mend})"
        )
    if learner.can & _TREES and not algorithm.needs & _TREES:
        raise PlanError(f"aggregation.rule: '{rule}' takes a mean of models, and trees have none: take 'bagging' or 'histograms'")
    if learner.can & _TREES and plan.privacy.clip is not None:
        raise PlanError("privacy.clip: it makes whole updates shorter, and of trees or sums nothing would be left: leave it out")
    _summed(plan, algorithm)
    algorithm.updates(learner.layouts)  # a method that can't have this model says so
    if algorithm.fits:
        algorithm.fits(learner)
    if plan.cohort.minimum < algorithm.least:
        raise PlanError(
            f"cohort.minimum: '{rule}' with these options needs at least {algorithm.least} nodes in every round; "
            f"it is {plan.cohort.minimum}"
        )
    if plan.cohort.buffer and algorithm.late is None:
        raise PlanError(f"cohort.buffer: '{rule}' can fold no late update, so its rounds are synchronous; leave buffer out")
    return algorithm


def _summed(plan: Plan, algorithm: Algorithm) -> None:
    """Check that a method makes do with sums, where the plan hides single updates.

    Raises:
        PlanError: it doesn't.
    """
    rule, guard, buckets = plan.aggregation.rule, plan.privacy.sums, plan.privacy.buckets
    if buckets is not None and adds(algorithm):
        raise PlanError(
            f"privacy.buckets: '{rule}' only adds up, and one sum of all hides a node among more; leave buckets out, or take a "
            "robust rule, such as median"
        )
    if guard and not adds(algorithm) and not (buckets and algorithm.robust):
        least = max(BUCKETS, algorithm.least)
        mend = (
            f"let it compare buckets of nodes: privacy.buckets = {least} or more, with secure_aggregation; or take a rule"
            if algorithm.robust
            else "take a rule"
        )
        raise PlanError(
            f"aggregation.rule: '{rule}' looks at single updates, and privacy.{guard} hides them; {mend} that only adds them up, "
            "such as fedavg"
        )
    if buckets is not None and buckets < algorithm.least:
        raise PlanError(
            f"privacy.buckets: '{rule}' with these options compares at least {algorithm.least}; it is {buckets}; raise it (and "
            f"cohort.minimum to {3 * algorithm.least} or more), or take a rule that compares fewer, such as median"
        )


def adds(algorithm: Algorithm) -> bool:
    """Say whether a method adds updates up, and looks at none by itself or beside others (as robust rules do)."""
    return algorithm.fold in (mean, uniformly)


def voiced(algorithm: Algorithm, update: Update) -> Update:
    """Return an update with the weight that it has in the method's sum: where each node has one voice, 1."""
    return replace(update, weight=1.0) if algorithm.fold is uniformly else update


def rooted(plan: Plan, algorithm: Algorithm, rows: Rows | None) -> None:
    """Check that the server has rows of its own where its method trains on them.

    Raises:
        PlanError: it has none.
    """
    if (algorithm.root or algorithm.teach) and not rows:
        raise PlanError(
            f"aggregation.rule: '{plan.aggregation.rule}' trains on the server's own rows too: give it a holdout (--holdout FILE)"
        )
