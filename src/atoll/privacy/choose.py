"""The link that a plan asks for, and the terms of each of its sums."""

from __future__ import annotations

from atoll.plan import Plan
from atoll.privacy.graph import graph
from atoll.privacy.link import Link
from atoll.privacy.secagg.link import secagg
from atoll.privacy.secagg.terms import Terms
from atoll.vector import Layouts

_JUDGED = (
    *("samples", "loss", "correct", "true_positive", "false_positive", "false_negative"),
    *("squared_error", "absolute_error", "target", "target_squared"),
)
_RANGE, _WEIGHT = 1024.0, 1e6
"""What 64 bits have room for, far beyond what a number of an update and a number of rows are, where a plan names no bounds."""


def link(plan: Plan, layouts: Layouts) -> Link | None:
    """Return the link of a plan whose updates have these layouts; None where nothing hides them.

    Raises:
        PlanError: the plan's smallest cohort can't bear what the plan has it bear.
    """
    guard = plan.privacy
    if not guard.secure_aggregation:
        return None
    graph(plan.cohort.minimum, guard.dropout, guard.corrupt)
    names = (*_JUDGED, *(f"fit.{name}" for name in ("samples", "loss")))
    clip = guard.clip if isinstance(guard.clip, float) else _RANGE  # it is longer than any of an update's numbers
    return secagg(layouts, names, clip, guard.largest_weight or _WEIGHT, guard.bits)


def protected(plan: Plan, layouts: Layouts) -> tuple[Link | None, Layouts]:
    """Return the plan's link, and the layouts of updates as they leave a node; see `link`."""
    found = link(plan, layouts)
    return found, found.updates(layouts) if found else layouts


def terms(plan: Plan, run: str, round_: int, attempt: int) -> Terms:
    """Return what every party of one try of a round's sum knows."""
    guard = plan.privacy
    roster = None if guard.roster is None else frozenset(guard.roster)
    return Terms(run, round_, attempt, plan.digest, plan.cohort.minimum, guard.dropout, guard.corrupt, roster)
