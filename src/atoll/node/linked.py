"""The node's end of a plan's link: its state, in memory only, and what was answered; of one try of a round at a time.

What a try's secrets were goes with the process: a node that was started again has no part in it any more.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from atoll.errors import PrivacyError
from atoll.keys import Identity
from atoll.letters import DIGEST, Desk
from atoll.messages import Letter, StartTraining
from atoll.plan import Plan
from atoll.privacy.choose import protect, terms
from atoll.privacy.link import Link, Own
from atoll.store.ledger import Gift, Ledger
from atoll.vector import Groups, Layouts, Update

_Try = tuple[str, int, int]


class Linked:
    """Answers for one node. Its methods may be called in any thread; they take turns.

    Args:
        link: the plan's.
        plan: what everyone agreed to.
        identity: the node's.
        ledger: where it stands that a round's sum was given away.
        layouts: of a protected update's groups.
        roster: returns the only nodes that the owner lets be in a sum, where the plan names none.
    """

    def __init__(
        self,
        link: Link,
        plan: Plan,
        identity: Identity,
        ledger: Ledger,
        layouts: Layouts,
        roster: Callable[[], Collection[str] | None] = lambda: None,
    ) -> None:
        self._roster = roster
        self.layouts = layouts
        self.first = link.before[0] if link.before else None
        self._link, self._plan, self._identity, self._ledger = link, plan, identity, ledger
        self._desk, self._turn = Desk(), threading.Lock()
        self._try: _Try | None = None
        self._model = ""
        self._own: Own = None
        self._answered: dict[str, tuple[bytes, bytes]] = {}
        self._numbers = ""

    def shown(self, phase: str, body: bytes) -> tuple[str, bytes]:
        """Return the digest of the total that a node is shown in a phase, or an empty text; and what else is said."""
        return (body[:DIGEST].hex(), body[DIGEST:]) if phase == self._link.opens else ("", body)

    def take(self, part: Letter) -> tuple[_Try, str, bytes] | None:
        """Take a part of what the server says; return which try and phase it is for, and all of it, with the last part."""
        body = self._desk.take(part)
        return None if body is None else ((part.run, part.round, part.attempt), part.phase, body)

    def answer(self, task: StartTraining, phase: str, body: bytes, sums: Groups | None = None) -> bytes:
        """Return the answer to what the server says in a phase; to the very same again the same.

        `sums` are the groups of the total, in the phase in which nodes see it.

        Raises:
            PrivacyError: it is refused, or the node has no part in this try, or none any more.
        """
        with self._turn:
            if phase == self.first:
                self._joins(task)
            self._here(task)
            if phase in self._answered:
                said, answer = self._answered[phase]
                if said != body:
                    raise PrivacyError(f"the server says in phase '{phase}' something else than before")
                return answer
            if sums is not None:
                self._own = self._link.see(self._own, sums)
            own, answer = self._link.answer(self._own, phase, body)
            if phase == self._link.gives and not self._plan.privacy.distributed_noise:  # before the answer leaves
                self._gives(task, self._link.whose(self._own) or self._link.whose(own))
            self._own = own
            self._answered[phase] = body, answer
            return answer

    def protect(self, task: StartTraining, body: bytes, update: Update) -> Update:
        """Return an update as it may leave; it is used up.

        Raises:
            PrivacyError, LayoutError: it can't be hidden, or the node has no part in this try.
        """
        with self._turn:
            if self.first is None:
                self._joins(task)
            self._here(task)
            self._numbers = _hash(update)
            self._own, hidden = protect(self._plan, self._link, self._own, body, update)
            return hidden

    def _gives(self, task: StartTraining, nodes: Sequence[str]) -> None:
        cohort = hashlib.sha256("\n".join(sorted(nodes)).encode()).hexdigest()
        gift = Gift(task.run, task.round, task.attempt, self._plan.digest, task.model, cohort, self._numbers)
        self._ledger.gives(gift, time.time())

    def _joins(self, task: StartTraining) -> None:
        tried = (task.run, task.round, task.attempt)
        if tried == self._try:
            return
        self._try, self._model, self._answered = tried, task.model, {}
        agreed = terms(self._plan, *tried, task.model)
        known = self._roster()
        mine = agreed if agreed.roster is not None or known is None else replace(agreed, roster=frozenset(known))
        self._own = self._link.join(mine, self._identity)

    def _here(self, task: StartTraining) -> None:
        if self._try != (task.run, task.round, task.attempt):
            raise PrivacyError("this node was started again, or asked for something else, in the middle of this try")
        if self._model != task.model:  # its keys say that it trains the first one, as all others' do
            raise PrivacyError("the server asks in the middle of this try for another model than before")


def _hash(update: Update) -> str:
    """Return a hash of all that an update says."""
    said = hashlib.sha256(repr((update.weight, sorted(update.metrics.items()))).encode())
    for name in sorted(update.groups):
        said.update(update.groups[name].values.data)
    return said.hexdigest()
