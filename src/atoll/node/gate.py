"""Where the owner's policy is asked, with what the node's ledger knows: before anything is read, and before each round."""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast

from atoll.errors import PolicyError
from atoll.messages import StartTraining
from atoll.node.policy import Asked, Policy, guard_said, guards_of, refuses
from atoll.plan import Plan
from atoll.privacy.dp.account import Account
from atoll.privacy.dp.accountant import Release
from atoll.store.ledger import Ledger, Spent, bounds, own_noise
from atoll.vector import Metrics

_READ = "plans: its owner is asked about each plan, and nobody sits at a terminal here; read it with `atoll plan show`, "


TRIES = 10
"""How many updates of one round leave a node, each for another try: a server that is whole asks for three."""


class Gate:
    """What a node may do. A policy in a file is read again before a task, where the file changed.

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
        self._file = Path(policy) if isinstance(policy, (str, Path)) else None
        self._stamp = _stamp(self._file) if self._file else None  # before it is read: what changes meanwhile is read again
        self.policy = Policy.load(policy) if isinstance(policy, (str, Path)) else policy or Policy()
        self._where = f"{policy}: " if self._file else "the owner's policy: "
        self._ledger = ledger
        self.rows = self.judged = 0
        self.account: Account | None = None
        self.shut: str | None = None
        self._seen: tuple[StartTraining, int] | None = None

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
        self._read_again()
        if self.shut:
            raise PolicyError(self.shut)
        asked = Asked(task.round, self.rows, self.judged, self._others(task))
        if self.account:
            if over := self.account.over_with(self._before(task)) if self.release else self.account.over(task.round - 1):
                raise PolicyError(over)
            asked = asked._replace(epsilon=self._in_all(task), epsilon_round=self.account.spent(1))
        if why := refuses(self.policy, self.plan, asked, time.time()):
            raise PolicyError(self._where + why)

    def _others(self, task: StartTraining) -> int:
        """Return how many updates left but a task's own, once the ledger has nothing against the task.

        It is asked once for all of a task's phases: meanwhile nothing comes to it but what this task makes.

        Raises:
            PolicyError: it lacks an update that the server counts, or the round was tried too often.
        """
        if self._seen and self._seen[0] == task:
            return self._seen[1]
        place = task.run, task.round, task.attempt
        if task.counted and not self._ledger.knows(task.counted):
            raise PolicyError(
                f"the server counts update {task.counted[:12]} of this node, which its ledger lacks: an old copy of it was "
                "put back, or the key is used elsewhere; what left isn't all known here, so nothing leaves to this run"
            )
        if self._ledger.tries(*place) >= TRIES:
            raise PolicyError(f"{TRIES} updates of round {task.round} left already, each for another try; a node makes no more")
        self._seen = task, self._ledger.left(None, place)
        return self._seen[1]

    @property
    def release(self) -> Release | None:
        """What an update tells by itself, under noise of the node's own; None where each closed round's model does."""
        return self.account.release if self.account and own_noise(guard_said(self.plan)) else None

    def _before(self, task: StartTraining) -> list[Release]:
        """Return what left before a task, each update with the noise that it had."""
        place = task.run, task.round, task.attempt
        return [one or cast("Release", self.release) for one in self._ledger.releases(self.plan.digest, place)]

    def _read_again(self) -> None:
        """Go by the policy's file as it is now.

        Raises:
            PolicyError: it changed, and can't be read as a policy.
        """
        if self._file and (stamp := _stamp(self._file)) != self._stamp:
            self.policy = Policy.load(self._file)
            self._stamp, refused = stamp, self.shut
            if not self.meets(self.plan) and refused:  # nothing was read or built for it
                self.shut = f"{self._where}the plan was refused as it stood before; by now it isn't: start the node again"

    def spent(self, task: StartTraining) -> Spent | None:
        """Return what the run has cost with a task's update; None where no noise bounds it."""
        if self.account is None:
            return None
        after = self.account.spent_with(self._before(task)) if self.release else self.account.spent(task.round)
        return Spent(after, self.account.delta)

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


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """Return what tells whether a file changed; None where it is gone."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
