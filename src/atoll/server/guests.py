"""What nodes say to the server once they are let in, and how they come and go."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from atoll.drive import Drive
from atoll.errors import StoreError
from atoll.messages import Decline, FlUpdate, Letter, SessionEnded
from atoll.server import events
from atoll.server.book import Book
from atoll.server.channel import Channel
from atoll.server.linked import Linked
from atoll.server.state import Phase, State, admits
from atoll.wire import Address

_LOG = logging.getLogger("atoll.server")


class Site(Protocol):
    """The server that they come to."""

    drive: Drive[State]
    book: Book
    channel: Channel
    linked: Linked | None


class Guests:
    """Between the channel and the machine.

    Args:
        site: the server.
        tell: told of each thing that a person would like to see.
    """

    def __init__(self, site: Site, tell: Callable[..., None]) -> None:
        self._site, self._tell = site, tell
        self._coming = dict[str, str]()

    async def connected(self, node: str, name: str) -> None:
        """Count a node in."""
        self._tell("joined", node=node, name=name)
        self._coming[node] = name
        await asyncio.sleep(0)  # thousands may come at once: those of one turn of the loop are counted in together
        if self._coming:
            coming, self._coming = self._coming, {}
            await self._site.drive.happen(events.Joined(self._site.drive.now(), coming))

    async def disconnected(self, node: str) -> None:
        """Count a node out until it comes back."""
        self._site.book.lost[node] = time.time()
        self._coming.pop(node, None)
        if self._site.drive.state.outcome is None:
            self._tell("lost", node=node, name=self._site.book.names[node])
        await self._site.drive.happen(events.Lost(self._site.drive.now(), node))

    async def revoke(self, node: str) -> None:
        """Part with a node for good, also in mid-round."""
        if await self._site.channel.hang_up(node) or node in self._site.drive.state.present | set(self._site.drive.state.missing):
            self._tell("revoked", node=node, name=self._site.book.names.get(node))
        await self._site.book.revoked(node)
        await self._site.drive.happen(events.Revoked(self._site.drive.now(), node))

    async def fl_update(self, node: str, message: FlUpdate) -> None:
        """Hear that an update is durable; the log's reader brings it, so this only tells the node if it was judged already."""
        address = Address(message.run, message.round, message.attempt, node)
        if verdict := self._site.book.verdict(address, message.digest):
            await self._site.channel.tell(node, verdict)

    async def decline(self, node: str, message: Decline) -> None:
        """Hear that a node gives nothing in this round."""
        address = Address(message.run, message.round, message.attempt, node)
        unmasking = self._site.drive.state.phase is Phase.UNMASKING
        if admits(self._site.drive.state, address) or (self._site.drive.state.answered(node) and not unmasking):
            return  # said already, or of no round that is open: nothing to remember
        if address not in self._site.book.spoils:  # else that is why, and it is stored already
            await self._site.book.refused("declined", events.Judge(address, "", accepted=False, reason=message.reason))
        self._tell("declined", node=node, name=self._site.book.names[node], reason=message.reason)
        await self._site.drive.happen(events.Declined(self._site.drive.now(), address, message.reason))

    async def link(self, node: str, message: Letter) -> None:
        """Hear what a node says to the plan's link."""
        if self._site.linked:
            await self._site.linked.hear(node, message)

    def slowed(self, node: str, reason: str) -> None:
        """Hear that a node says more than it may, and is slowed."""
        _LOG.warning("%s is slowed: %s", self._site.book.names[node], reason)
        self._tell("slowed", node=node, name=self._site.book.names[node], reason=reason)

    async def session_ended(self, node: str, message: SessionEnded) -> None:
        """Hear how the final model does on a node's rows, and let it go."""
        try:
            await self._site.book.farewell(node, message.metrics)
        except StoreError as error:
            _LOG.warning("how the final model does at %s isn't stored: %s", self._site.book.names[node], error)
        await self._site.drive.happen(events.Left(self._site.drive.now(), node))
