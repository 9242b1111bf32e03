"""What a plan comes to on the server: who trains, how updates are folded, what makes them small and what hides them."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from atoll import algorithms, compression, learners, method
from atoll.algorithms import Algorithm
from atoll.compression import Down, Press
from atoll.learner import Learner, Rows
from atoll.plan import Plan
from atoll.privacy import choose as privacy
from atoll.privacy.dp.account import Account, account
from atoll.privacy.link import Link
from atoll.vector import Layouts


class Agreed(NamedTuple):
    """A plan, and what it comes to.

    Args:
        plan: what everyone agreed to.
        learner, algorithm: the plan's.
        press, down: what made updates small, and how models get to nodes.
        link: what hides updates, if anything does.
        layouts: of an update's groups, as a fold gets them.
        account: what the plan's noise promises, if there is any.
    """

    plan: Plan
    learner: Learner
    algorithm: Algorithm
    press: Press
    down: Down
    link: Link | None
    layouts: Layouts
    account: Account | None

    @property
    def size(self) -> int:
        """How many bytes an update's numbers take on their way."""
        return sum(layout.nbytes for layout in self.press.layouts(self.layouts).values())

    @property
    def opened_size(self) -> int:
        """How many bytes the numbers of an update take that nothing hides or makes small."""
        return sum(layout.nbytes for layout in self.algorithm.updates(self.learner.layouts).values())


def agreed(plan: Plan, learner: Learner | None, allow: Collection[str], holdout: Rows | None) -> Agreed:
    """Return what a plan comes to.

    Args:
        plan: what everyone agreed to.
        learner: one to take in place of the one that the plan names.
        allow: functions that the plan may name here, beside those of installed packages.
        holdout: the server's own test rows.

    Raises:
        AtollError: the plan can't be carried out.
    """
    spending = account(plan)
    learner = learner or learners.build(plan, allow)
    algorithm = method.find(plan, learner)
    algorithms.rooted(plan, algorithm, holdout)
    updates = algorithm.updates(learner.layouts)
    press = compression.find(plan, updates, sums=algorithms.adds(algorithm))
    link, layouts = privacy.protected(plan, updates, press.layouts(updates), algorithm.least)
    return Agreed(plan, learner, algorithm, press, compression.down(plan, learner.layouts), link, layouts, spending)
