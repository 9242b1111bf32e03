"""What comes from nodes by the log: each update is verified on arrival, handed to the machine, and judged as that decides."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from atoll.drive import Drive
from atoll.errors import AtollError, LayoutError, LogError, RefusedError, StoreError, WireError
from atoll.logs import Reader, Record
from atoll.server import events, offences, quarantine
from atoll.server.agreed import Agreed
from atoll.server.book import Book
from atoll.server.channel import Channel
from atoll.server.door import Door
from atoll.server.state import State, admits
from atoll.vector import Update, check, check_layouts
from atoll.wire import Envelope, decode

_LOG = logging.getLogger("atoll.server")


class Intake:
    """Between the log and the machine.

    Args:
        agreed: the plan, and what it comes to.
        log: what brings updates.
        drive: the machine in motion.
        book, channel, door: the server's.
        aside: where refused updates are kept: a directory, and what makes room there.
        tell: told of each thing that a person would like to see.
        closed: so many rounds another server closed.
    """

    def __init__(  # noqa: PLR0913  parts of a server, by their names
        self,
        agreed: Agreed,
        log: Reader,
        *,
        drive: Drive[State],
        book: Book,
        channel: Channel,
        door: Door,
        aside: tuple[Path, Callable[[int], str | None]],
        tell: Callable[..., None],
        closed: int,
    ) -> None:
        self._plan, self._layouts, self._press, self._log, self._drive = agreed.plan, agreed.layouts, agreed.press, log, drive
        self._book, self._channel, self._door = book, channel, door
        self._aside, self._tell, self._closed = aside, tell, closed
        further = agreed.algorithm.verify  # the method's own look at an update's groups, where it has one
        self._further = further and partial(further, agreed.learner.layouts)

    async def take(self, record: Record) -> None:
        """Verify an update and hand it to the machine."""
        envelope = record.envelope
        run = self._drive.state
        if envelope.address.round <= self._closed and admits(run, envelope.address):
            return  # in the other server's time; but a late one of then may count yet
        try:
            envelope.verify()
            if gone := self._door.refuses(envelope.address.node):
                raise RefusedError(gone)
        except (WireError, RefusedError) as error:  # anybody may have written this: the named node isn't to blame
            await self._reject(record, str(error))
            return
        what, length, self._at_hand = (envelope.address, envelope.digest, envelope.size), None, envelope
        if admits(run, envelope.address) is None:
            try:
                update, norm = await asyncio.to_thread(self._verify, record, run.tasks[envelope.address.node].model)
            except (WireError, LayoutError) as error:  # so it was signed
                await self._drive.happen(events.Refused(self._drive.now(), *what, str(error)))
                return
            except AtollError as error:
                await self._reject(record, str(error))
                await self._drive.happen(events.Declined(self._drive.now(), envelope.address, str(error)))
                return
            self._book.arrived(record, update.weight, update.metrics, norm, self._drive.now())
            length = offences.length_of(self._plan, norm, update.weight, envelope.address.round)
        await self._drive.happen(events.Appended(self._drive.now(), *what, length))

    def _verify(self, record: Record, model: str) -> tuple[Update, float | None]:
        if record.refused:
            raise RefusedError(record.refused)
        if record.envelope.plan != self._plan.digest:
            raise WireError(f"the update is for plan {record.envelope.plan[:12]}, this run's is {self._plan.digest[:12]}")
        update = decode(self._log.body(record.envelope), self._press.layouts(self._layouts), model)
        if self._plan.privacy.sums:  # whatever words they are: they look random
            check_layouts(update.groups, self._layouts)
            return update, None
        groups = self._press.decode(update.groups, self._layouts, record.envelope.address.round)
        norm = check(groups, self._layouts)
        if self._further:
            self._further(groups)
        # Under noise no update's length is told, nor does it say which others count: that would be no part of any ε.
        return update, None if self._plan.privacy.noise else norm

    async def _reject(self, record: Record, reason: str) -> None:
        envelope = record.envelope
        await self.judge(events.Judge(envelope.address, envelope.digest, False, reason, envelope.size))

    async def judge(self, command: events.Judge) -> None:
        """Tell a node whether its update counts, and store it where it doesn't."""
        address = command.address
        if not command.digest:
            await self._book.refused("declined", command)
            self._tell("declined", node=address.node, name=self._book.names.get(address.node), reason=command.reason)
            return
        if not command.accepted:
            _LOG.warning("round %d: %s: %s", address.round, self._book.names.get(address.node, address.node), command.reason)
            late = not (command.offence or command.lost) and admits(self._drive.state, address) is not None
            try:
                await self._book.refused("late" if late else "rejected", command)
            except StoreError as error:
                if self._drive.state.outcome is None:
                    raise
                _LOG.warning("that isn't stored: %s", error)  # no reason to leave without goodbye
            self._tell("rejected", node=address.node, name=self._book.names.get(address.node), reason=command.reason)
        await self._channel.tell(address.node, self._book.judged(address, command.digest, command.accepted, command.reason))
        if command.offence:
            await asyncio.to_thread(self._set_aside, command)

    async def spoilt(self, envelope: Envelope, reason: str) -> None:
        """Record a body that the log refused. The node hears why in the answer; that the network altered it is no offence."""
        address = envelope.address
        if await self._book.spoilt(events.Judge(address, envelope.digest, False, reason, envelope.size)):
            self._tell("rejected", node=address.node, name=self._book.names.get(address.node), reason=reason)

    def _set_aside(self, command: events.Judge) -> None:
        """Keep a refused update where the operator can look at it: it is the one that the log has just brought."""
        directory, room = self._aside
        with contextlib.suppress(LogError):
            body = self._log.body(self._at_hand)
            quarantine.set_aside(directory, command.address, command.digest, body, room)
