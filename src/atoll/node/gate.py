"""Where the owner's policy is asked, with what the node's ledger knows: before anything is read, and before each round."""

from __future__ import annotations

import time
from pathlib import Path

from atoll.errors import PolicyError
from atoll.messages import StartTraining
from atoll.node.policy import Asked, Policy, guard_said, guards_of, refuses
from atoll.plan import Plan
from atoll.privacy.dp.account import Account
from atoll.store.ledger import Ledger, Spent, bounds, own_noise
from atoll.vector import Metrics

_READ = "plans: its owner is asked about each plan, and nobody sits at a terminal here; read it with `atoll plan show`, "


class Gate:
    """What a node may do.

    Args:
        policy: the owner's, or the file that holds it; None: everything that a plan says.
        ledger: the node's.

    Attributes:
        plan: whose run it is about.
        rows, judged: how many the node would train on, and judge by.
        account: what the plan's noise costs, where this node knows it.
        shut: why nothing of this plan will ever be done here; None where some of it may.

    Raises:
        PolicyError: the file can't be read as a policy.
    """

    def __init__(self, policy: Policy | str | Path | None, ledger: Ledger) -> None:
        self.policy = Policy.load(policy) if isinstance(policy, (str, Path)) else policy or Policy()
        self._where = f"{policy}: " if isinstance(policy, (str, Path)) else "the owner's policy: "
        self._ledger = ledger
        self.rows = self.judged = 0
        self.account: Account | None = None
        self.shut: str | None = None

    def meets(self, plan: Plan) -> str | None:
        """Return why nothing of a plan may be done here, or None; from now on it is this plan."""
        self.plan = plan
        why = refuses(self.policy, plan, None, time.time())
        if not why and self.policy.plans == "ask" and not self._ledger.agreed(plan.digest):
            why = f'{_READ}then write plans = ["{plan.digest}"], or join once from a terminal'
        self.shut = self._where + why if why else None
        return self.shut

    def check(self, task: StartTraining) -> None:
        """Check that a round's task may be done now.

        Raises:
            PolicyError: it may not.
        """
        if self.shut:
            raise PolicyError(self.shut)
        place = task.run, task.round, task.attempt
        left, of_all = (self._ledger.left(plan, place) for plan in (self.plan.digest, None))
        asked = Asked(task.round, self.rows, self.judged, of_all)
        if self.account:
            if over := self.account.over(self.released(task, left)):
                raise PolicyError(over)
            asked = asked._replace(epsilon=self._in_all(task), epsilon_round=self.account.spent(1))
        if why := refuses(self.policy, self.plan, asked, time.time()):
            raise PolicyError(self._where + why)

    def released(self, task: StartTraining, left: int) -> int:
        """Return how many releases there were before a task: each closed round's model; of a node's own noise each update."""
        shared = self.plan.privacy.central_noise or self.plan.privacy.tree_noise
        return task.round - 1 if shared else left

    def spent(self, task: StartTraining) -> Spent | None:
        """Return what the run has cost with a task's update; None where no noise bounds it."""
        if self.account is None:
            return None
        left = self._ledger.left(self.plan.digest, (task.run, task.round, task.attempt))
        return Spent(self.account.spent(self.released(task, left) + 1), self.account.delta)

    def _in_all(self, task: StartTraining) -> float | None:
        """Return ε of all that ever left with bounds, a task's update included: of other plans, or other runs, it adds up."""
        spent = self.spent(task)
        scope = self.plan.digest if own_noise(guard_said(self.plan)) else task.run
        before = sum(one.epsilon for key, one in bounds(self._ledger.entries()).items() if key != scope)
        return spent and before + spent.epsilon

    def tells(self, figures: Metrics) -> Metrics:
        """Return what may be told of how the final model does on this node's rows: no guard hides these sums, nor any noise."""
        mine = self.policy
        spent = mine.updates is not None and self._ledger.left(None) > mine.updates
        few = mine.rows is not None and self.judged < mine.rows
        guarded = mine.guards or mine.noise or guards_of(self.plan) or self.plan.privacy.noise
        return {} if guarded or spent or few else figures
