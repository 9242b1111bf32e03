"""The link that a plan asks for, and the terms of each of its sums."""

from __future__ import annotations

from dataclasses import replace

from atoll.errors import LayoutError
from atoll.guards import BUCKETS
from atoll.learner import SLOTS, slot
from atoll.metrics import binned, names
from atoll.plan import Plan
from atoll.privacy import ckks
from atoll.privacy.bucketing import bucketed
from atoll.privacy.dp import central, distributed
from atoll.privacy.dp.account import account
from atoll.privacy.encryption.link import encryption
from atoll.privacy.encryption.update import RING
from atoll.privacy.fixed import Fixed
from atoll.privacy.graph import graph
from atoll.privacy.link import Link, Own
from atoll.privacy.secagg.link import secagg
from atoll.privacy.secagg.terms import Terms
from atoll.vector import Layouts, Update

_JUDGED = (
    *("samples", "loss", "correct", "true_positive", "false_positive", "false_negative"),
    *("squared_error", "absolute_error", "target", "target_squared"),
)
_RANGE, _WEIGHT = 1024.0, 1e6
"""What 64 bits have room for, far beyond what a number of an update and a number of rows are, where a plan names no bounds."""
_ENCRYPTED, _ROWS = 64.0, 1e5
"""The same for real numbers under encryption, which are the less exact the larger they may be."""


def link(plan: Plan, layouts: Layouts, least: int = 1) -> Link | None:
    """Return the link of a plan whose updates have these layouts; None where nothing hides them.

    `least` is how few updates, or means of buckets, the plan's rule takes.

    Raises:
        PlanError: the plan's smallest cohort can't bear what the plan has it bear.
    """
    guard = plan.privacy
    if not guard.sums:
        return None
    graph(plan.smallest_sum, guard.dropout, guard.corrupt)
    names = known(plan)
    clip = guard.clip if isinstance(guard.clip, float) else None  # it is longer than any of an update's numbers
    if guard.distributed_noise and (own := account(plan)):
        most = central.shares(own.multiplier, layouts)["parameters"]
        noisy = distributed.widest(guard.unit, most, plan.smallest_sum - guard.corrupt)
        one = secagg(layouts, names, noisy, 1.0, guard.bits)  # one voice each; and steps so fine that noise is written exactly
    elif guard.encryption:
        return encryption(layouts, names, clip or _ENCRYPTED, guard.largest_weight or _ROWS)
    else:
        largest = clip or _RANGE, guard.largest_weight or _WEIGHT
        Fixed(largest[0], plan.smallest_sum, guard.bits, largest[1])
        one = secagg(layouts, names, *largest, guard.bits)
    return bucketed(one, guard.buckets, max(BUCKETS, least), plan.smallest_sum) if guard.buckets else one


def known(plan: Plan) -> tuple[str, ...]:
    """Return the names of all metrics that any node of a plan may have; and slots for those of its own functions."""
    slots = (f"#{number}" for number in range(SLOTS if plan.model.own_metrics else 0))
    return (*_JUDGED, "fit.samples", "fit.loss", *names(plan.model.known_metrics, plan.labels), *slots)


def protect(plan: Plan, link: Link, own: Own, message: bytes, update: Update) -> tuple[Own, Update]:
    """Do as `Link.protect`, with the metrics of the plan's own functions in their slots.

    Names stay open, with zeros, but for those of counts in bins: they would say where a node's rows lie.

    Raises:
        PrivacyError, LayoutError: the update can't be hidden.
    """
    mine, open_ = set(known(plan)), dict.fromkeys((name for name in update.metrics if not binned(name)), 0.0)
    metrics = {name if name in mine else slot(name): value for name, value in update.metrics.items()}
    if len(metrics) < len(update.metrics):
        raise LayoutError("two metrics can't be told apart once they are hidden: rename one of the plan's own")
    own, hidden = link.protect(own, message, replace(update, metrics=metrics))
    return own, replace(hidden, metrics=open_)


def protected(plan: Plan, layouts: Layouts, small: Layouts, least: int = 1) -> tuple[Link | None, Layouts]:
    """Return the plan's link, and the layouts that a fold gets; see `link`.

    Args:
        plan: the plan.
        layouts: of an update's groups.
        small: the same after compression, which comes before what hides them.
        least: as for `link`.
    """
    found = link(plan, small, least)
    return found, found.updates(small) if found else layouts


def prepare(plan: Plan) -> None:
    """Load what a node of a plan needs for its part in the link.

    Raises:
        PlanError: it isn't installed.
    """
    if plan.privacy.encryption:
        ckks.room_for(RING, 1)


def terms(plan: Plan, run: str, round_: int, attempt: int, model: str) -> Terms:
    """Return what every party of one try of a round's sum knows; `model` is the digest of the one that is trained."""
    guard = plan.privacy
    roster = None if guard.roster is None else frozenset(guard.roster)
    return Terms(run, round_, attempt, plan.digest, plan.smallest_sum, guard.dropout, guard.corrupt, roster, model)
