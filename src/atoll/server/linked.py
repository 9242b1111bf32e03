"""The server's end of a plan's link: its state, the nodes' letters, and what it says to each of them; of one try at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from atoll.algorithms.algorithm import Bodies
from atoll.algorithms.folds import mean
from atoll.drive import Drive
from atoll.errors import PrivacyError
from atoll.letters import Desk, written
from atoll.messages import UPDATE, Letter
from atoll.plan import Plan
from atoll.privacy.choose import terms
from atoll.privacy.link import Letters, Link, Own, Undone
from atoll.server.channel import Channel
from atoll.server.close import Guard
from atoll.server.events import Abandoned, Answered, Collect, Collected, Say, Steps
from atoll.server.state import State
from atoll.store.models import Models
from atoll.vector import Layouts, Total
from atoll.wire import Address


class Linked:
    """Relays between the nodes and the link.

    Args:
        link: the plan's.
        plan: what everyone agreed to.
        layouts: of a protected update's groups.
        run: its id.
        drive: the machine in motion.
        channel: how to reach nodes.
        add: adds up the updates that are in, as `guard` says, where nodes are to see the total before it is made out.
        models: where such a total is kept for them to fetch.

    Attributes:
        steps: the link's phases.
        undone: what came of the last total.
    """

    undone: Undone

    def __init__(
        self,
        link: Link,
        plan: Plan,
        layouts: Layouts,
        run: str,
        drive: Drive[State],
        channel: Channel,
        add: Callable[[Guard], Total],
        models: Models,
    ) -> None:
        self.steps = Steps(link.before, link.after)
        self._link, self._plan, self._layouts, self._run = link, plan, layouts, run
        self._drive, self._channel, self._add, self._models = drive, channel, add, models
        self._try = (0, 0)
        self._own: Own = None
        self._inbox: dict[str, bytes] = {}
        self._outbox: Letters = {}
        self._desks: dict[str, Desk] = {}
        self._total: Total | None = None
        self._shown = ""

    def opens(self, round_: int, attempt: int) -> None:
        """Begin a try of a round."""
        self._try, self._inbox, self._outbox, self._desks = (round_, attempt), {}, {}, {}
        self._total = None
        self._own = self._link.begin(terms(self._plan, self._run, round_, attempt))

    async def hear(self, node: str, message: Letter) -> None:
        """Take a part of a node's answer; a letter that comes again before its phase is over takes the first one's place."""
        run, relay = self._drive.state, self._drive.state.relay
        if relay is None or relay.collecting or node not in relay.asked - relay.silent:
            return
        if (message.run, message.round, message.attempt, message.phase) != (run.run, run.round, run.attempt, relay.phase):
            return
        letter = self._desks.setdefault(node, Desk()).take(message)
        if letter is not None:
            self._inbox[node] = letter
            address = Address(self._run, message.round, message.attempt, node)
            await self._drive.happen(Answered(self._drive.now(), address, message.phase))

    async def collect(self, command: Collect) -> None:
        """Make the next phase's messages, beside what else happens."""
        self._drive.spawn(self._collect(command, self._try))

    async def _collect(self, command: Collect, of: tuple[int, int]) -> None:
        inbox = {node: self._inbox[node] for node in command.nodes if node in self._inbox}
        try:
            own, said = await asyncio.to_thread(self._next, command, inbox)
        except PrivacyError as error:
            if self._try == of:
                await self._drive.happen(Abandoned(self._drive.now(), str(error)))
            return
        if self._try == of:
            self._own, self._outbox, self._inbox, self._desks = own, said, {}, {}
            await self._drive.happen(Collected(self._drive.now(), command.phase, frozenset(said)))

    def _next(self, command: Collect, inbox: Mapping[str, bytes]) -> tuple[Own, Letters]:
        if command.phase == UPDATE:
            closed = self._link.close(self._own, command.nodes)
            if self._link.opens:
                total = self._add(Guard(self._layouts, mean, self._undo))
                self._shown = self._models.put(total.groups)
                self._total = replace(total, groups=self._models.get(self._shown, self._layouts))  # from its file
            return closed
        return self._link.collect(self._own, command.phase, inbox)

    async def say(self, command: Say) -> None:
        """Tell nodes what is for them."""
        shown = bytes.fromhex(self._shown) if command.phase == self._link.opens else b""
        for node in command.nodes:
            for part in written(self._run, *self._try, command.phase, shown + self._outbox[node]):
                await self._channel.tell(node, part)

    def guard(self) -> Guard:
        """Return how this try's updates are read, added up and made out."""
        return Guard(self._layouts, self._fold, self._undo)

    def _fold(self, bodies: Bodies, weights: Sequence[float], registered: int) -> Total:
        return self._total or mean(bodies, weights, registered)

    def _undo(self, total: Total) -> Total:
        self.undone = self._link.undo(self._own, self._inbox, total)
        return self.undone.total
