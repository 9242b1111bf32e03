"""The server's end of a plan's link: its state, the nodes' letters, and what it says to each of them; of one try at a time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from atoll.algorithms.algorithm import Bodies
from atoll.algorithms.folds import mean
from atoll.drive import Drive
from atoll.errors import PrivacyError
from atoll.letters import Desk, written
from atoll.logs.embedded import EmbeddedLog
from atoll.messages import UPDATE, Letter
from atoll.privacy import bucketing
from atoll.privacy.choose import terms
from atoll.privacy.link import Letters, Link, Own
from atoll.server import transcript
from atoll.server.agreed import Agreed
from atoll.server.channel import Channel
from atoll.server.close import Guard
from atoll.server.events import Abandoned, Answered, Collect, Collected, Past, Say, Steps
from atoll.server.patience import Patience
from atoll.server.state import State
from atoll.server.transcript import Said, Transcript
from atoll.store.models import Models
from atoll.vector import Metrics, Total, add
from atoll.wire import Address


class Linked:
    """Relays between the nodes and the link.

    Args:
        link: the plan's.
        agreed: the plan, and what it comes to.
        run: its id.
        drive: the machine in motion.
        channel: how to reach nodes.
        add: adds up the updates that are in, as `guard` says, where nodes are to see the total before it is made out.
        models: where such a total is kept for them to fetch.
        directory: of the store.
        patience: how a store that fails is waited for.
        tell: told of each phase.
        sums: where sums come that nodes opened, if the link has them do so.

    Attributes:
        steps: the link's phases.
        metrics: the sums of the metrics of all updates that could be opened.
        lost: the nodes whose updates couldn't be, in buckets that were left out; and why.
    """

    def __init__(  # noqa: PLR0913, PLR0917  parts of a server
        self,
        link: Link,
        agreed: Agreed,
        run: str,
        drive: Drive[State],
        channel: Channel,
        add: Callable[[Guard], Total],
        models: Models,
        directory: Path,
        patience: Patience,
        tell: Callable[..., None],
        sums: EmbeddedLog | None = None,
    ) -> None:
        gives = "" if agreed.plan.privacy.distributed_noise else link.gives  # what noise covers, may be summed again
        self.steps = Steps(link.before, link.after, link.opens, link.few, link.least, gives)
        self.metrics: Metrics = {}
        self.lost: Mapping[str, str] = {}
        self._link, self._plan, self._layouts, self._run = link, agreed.plan, agreed.layouts, run
        self._drive, self._channel, self._add, self._models = drive, channel, add, models
        self._directory, self._patience, self._tell, self._sums = directory, patience, tell, sums
        self._kept: Transcript | None = None
        self._said: tuple[Said, ...] = ()
        self._try, self._model = (0, 0), ""
        self._own: Own = None
        self._inbox: dict[str, bytes] = {}
        self._outbox: Letters = {}
        self._desks: dict[str, Desk] = {}
        self._total: Total | None = None
        self._shown = ""

    def opens(self, round_: int, attempt: int, model: str) -> None:
        """Begin a try of a round, in which this model is trained."""
        self._model = model
        self._try, self._inbox, self._outbox, self._desks = (round_, attempt), {}, {}, {}
        self._total = None
        self._own, self._kept, self._said = self._link.begin(terms(self._plan, self._run, round_, attempt, model)), None, ()

    def takes_up(self, past: Past) -> Past:
        """Go on with a round that another server left when nodes may have given what reveals its sum; else it is tried again.

        Raises:
            StoreError: what nodes said can't be read.
        """
        round_ = past.closed + 1
        kept = transcript.read(self._path(round_))
        if kept is None or not kept.summed:
            return past
        if kept.attempt != past.attempt:
            return past._replace(sealed=kept.summed)
        self.opens(round_, kept.attempt, kept.model)
        self._kept, self._said = kept, tuple(itertools.takewhile(lambda said: said[0] != UPDATE, kept.said))
        self._own, self._outbox = transcript.after(self._link, self._own, self._said)
        return past._replace(summed=kept.summed, sealed=kept.summed)

    def _path(self, round_: int) -> Path:
        return transcript.path_of(self._directory, self._run, round_)

    async def hear(self, node: str, message: Letter) -> None:
        """Take a part of a node's answer; a letter that comes again before its phase is over takes the first one's place."""
        run, relay = self._drive.state, self._drive.state.relay
        if relay is None or relay.collecting or node not in relay.asked - relay.silent:
            return
        if (message.run, message.round, message.attempt, message.phase) != (run.run, run.round, run.attempt, relay.phase):
            return
        letter = self._desks.setdefault(node, Desk()).take(message)
        address = Address(self._run, message.round, message.attempt, node)
        if letter is not None and (message.phase != self._link.opens or self._is_here(address, letter.hex())):
            self._inbox[node] = letter
            await self._drive.happen(Answered(self._drive.now(), address, message.phase))

    def _is_here(self, address: Address, digest: str) -> bool:
        """Say whether the opened sum that a letter speaks of came."""
        return bool(self._sums and self._sums.holds(address, digest))

    async def collect(self, command: Collect) -> None:
        """Make the next phase's messages, beside what else happens."""
        self._drive.spawn(self._collect(command, self._try))

    async def _collect(self, command: Collect, of: tuple[int, int]) -> None:
        inbox = {node: self._inbox[node] for node in command.nodes if node in self._inbox}
        try:
            own, out, said = await self._patience.until_stored(partial(asyncio.to_thread, self._next, command, inbox))
        except PrivacyError as error:
            if self._try == of:
                await self._drive.happen(Abandoned(self._drive.now(), str(error)))
            return
        if self._try == of:
            known = bucketing.lost(self._link, self._own)
            lost = {node: why for node, why in bucketing.lost(self._link, own).items() if node not in known}
            self._own, self._outbox, self._said, self._inbox, self._desks = own, out, said, {}, {}
            await self._drive.happen(Collected(self._drive.now(), command.phase, frozenset(out), lost))

    def _next(self, command: Collect, inbox: Letters) -> tuple[Own, Letters, tuple[Said, ...]]:
        phase = command.phase
        letters = dict.fromkeys(command.nodes, b"") if phase == UPDATE else inbox
        if self._kept and (before := self._kept.of(phase)) is not None:  # another server asked the next phase of just these
            if phase == UPDATE and before.keys() != letters.keys():
                raise PrivacyError("another server has begun to reveal a sum of other nodes")
            letters = before
        own, out = transcript.after(self._link, self._own, [(phase, letters)])
        if phase == UPDATE and self._link.opens:
            total = self._add(Guard(self._layouts, mean, self._undo))
            self._shown = self._models.put(total.groups)
            self._total = replace(total, groups=self._models.get(self._shown, self._layouts))  # from its file
        said = (*self._said, (phase, letters))
        after = self.steps.after
        if self._link.gives in (*after[: after.index(phase) + 1 if phase in after else 0], self.steps.next(phase)):
            transcript.write(self._path(self._try[0]), Transcript(self._try[1], self._model, said))
        return own, out, said

    async def say(self, command: Say) -> None:
        """Tell nodes what is for them."""
        self._tell("phase", round=self._try[0], attempt=self._try[1], phase=command.phase, nodes=command.nodes)
        shown = bytes.fromhex(self._shown) if command.phase == self._link.opens else b""
        for node in command.nodes:
            for part in written(self._run, *self._try, command.phase, shown + self._outbox.get(node, b"")):
                await self._channel.tell(node, part)

    def guard(self) -> Guard:
        """Return how this try's updates are read, added up and made out."""
        self.metrics, self.lost = {}, bucketing.lost(self._link, self._own)
        return Guard(self._layouts, self._fold, self._undo, bucketing.apart(self._link, self._own))

    def _fold(self, bodies: Bodies, weights: Sequence[float], registered: int) -> Total:
        return self._total or mean(bodies, weights, registered)

    def _undo(self, total: Total, nodes: Sequence[str]) -> Total:
        answers = transcript.whole(self._link, self._path(self._try[0]), self._try, self._inbox)
        try:
            undone = bucketing.undo(self._link, self._own, answers, total, nodes)
        except PrivacyError as error:
            self.lost = {**self.lost, **dict.fromkeys(nodes, str(error))}
            raise
        self.metrics = add([self.metrics, undone.metrics])
        said = (*self._said, (self.steps.last, self._inbox))
        transcript.write(self._path(self._try[0]), Transcript(self._try[1], self._model, said))
        return undone.total
