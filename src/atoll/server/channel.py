"""The control channel's server end: Socket.IO events in, machine events out, and messages to nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Protocol, TypeVar

from starlette.types import ASGIApp

from atoll.errors import AtollError, RefusedError, StoreError, UnreachableError
from atoll.keys import node_of, signed_by
from atoll.messages import NAMESPACE, Connect, Decline, FlUpdate, Letter, Message, SessionEnded, Slowed
from atoll.server.challenge import Challenges
from atoll.server.lines import PING, Line, Lines, NotWelcomeError
from atoll.server.pace import HANDSHAKE, RATE, Pace

M = TypeVar("M", bound=Message)
MESSAGE_LIMIT = 512 << 10
"""No message of the control channel is longer, in bytes."""
_STRANGER = 15.0
"""Seconds until whoever opened a connection and didn't come in as a node is hung up on: twice as many at most."""
_PING_EVERY, _PING_PATIENCE = 5.0, 15.0
"""Seconds between pings, and without an answer to one until a silent connection counts as lost."""
_TELL_EVERY = 10.0
"""Seconds between the lines that tell a node that it is slowed."""
_NOTICED = 3.0
"""Seconds that an answer to a ping may take until a connection is said to be silent: a look at it comes every second."""


class Host(Protocol):
    """What the channel asks of the server behind it."""

    async def connected(self, node: str, name: str) -> None:
        """The node is in and can be told things."""
        ...

    async def disconnected(self, node: str) -> None:
        """The node's connection is gone."""
        ...

    async def fl_update(self, node: str, message: FlUpdate) -> None:
        """The node says that its update is in the log."""
        ...

    async def decline(self, node: str, message: Decline) -> None:
        """The node says that nothing will come from it in this round."""
        ...

    async def link(self, node: str, message: Letter) -> None:
        """The node says something to the plan's link."""
        ...

    def slowed(self, node: str, reason: str) -> None:
        """The node says more than it may."""
        ...

    async def session_ended(self, node: str, message: SessionEnded) -> None:
        """The node has taken the final model."""
        ...


class Channel:
    """Who is connected, and how to reach them.

    Args:
        admit: admits a node, and gives the answer to it; refuses one with RefusedError.
        host: what the nodes that are in come to.
        run: its id.
    """

    def __init__(self, admit: Callable[[Connect, str], Awaitable[Message]], host: Host, run: str) -> None:
        self._admit, self._host, self._run = admit, host, run
        self.challenges = Challenges()
        self._nodes: dict[str, Line] = {}
        self._paces: dict[str, Pace] = {}
        self._lines = Lines(self, NAMESPACE, MESSAGE_LIMIT, _PING_EVERY, _PING_PATIENCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: Mapping[str, Callable[[str, object], Awaitable[None]]] = {
            FlUpdate.event: _read(FlUpdate, host.fl_update),
            Decline.event: _read(Decline, host.decline),
            Letter.event: _read(Letter, host.link),
            SessionEnded.event: _read(SessionEnded, host.session_ended),
        }

    def over(self, app: ASGIApp) -> ASGIApp:
        """Return an application that takes the channel's connections, and leaves everything else to another."""
        return self._lines.over(app)

    async def tell(self, node: str, message: Message) -> None:
        """Send a message to a node; nothing happens where it isn't connected: it hears on its return."""
        await self.tell_all([node], message)

    async def tell_all(self, nodes: Iterable[str], message: Message) -> None:
        """Send a message to nodes, as `tell` does to one."""
        said = self._lines.event(message.event, message.payload())
        for node in nodes:
            if line := self._nodes.get(node):
                line.wire.write(said)

    async def hang_up(self, node: str) -> bool:
        """Close a node's connection; return whether it had one."""
        if line := self._nodes.get(node):
            self._lines.hang_up(line)
        return line is not None

    async def close(self) -> None:
        """Hang up on everybody."""
        for line in tuple(self._lines.open):
            self._lines.hang_up(line)

    def silent(self) -> dict[str, float]:
        """Return for how many seconds nothing was heard of nodes that should have answered a ping by now."""
        now = asyncio.get_running_loop().time()
        quiet = {node: now - line.wire.heard for node, line in self._nodes.items()}
        return {node: seconds for node, seconds in quiet.items() if seconds > _PING_EVERY + _NOTICED}

    async def pulse(self) -> None:
        """Ping everybody for as long as the server runs; hang up on who doesn't answer, or doesn't come in."""
        now = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(min(1.0, _PING_EVERY / 2))
            for line in tuple(self._lines.open):
                if (
                    line.node is None and now() - line.since > _STRANGER
                ) or now() - line.wire.heard > _PING_EVERY + _PING_PATIENCE:
                    line.wire.abort()
                elif now() >= line.due:
                    line.due = now() + _PING_EVERY
                    line.wire.write(PING)

    async def welcome(self, line: Line, auth: object) -> None:
        """See `lines.Talk`."""
        try:
            message = Connect.read(auth)
            key = bytes.fromhex(message.key)
            if not signed_by(key, bytes.fromhex(message.signature), message.signed(self._run)):
                raise RefusedError("the handshake's signature doesn't fit its key: is it for another run?")
            self.challenges.take(message.challenge)
            node = node_of(key)
            if wait := self.spare(node, HANDSHAKE):
                raise UnreachableError(f"the node comes and goes too often: come back in {wait:.0f} s")
            welcome = await self._admit(message, node)
        except AtollError as error:
            raise NotWelcomeError(str(error), {"again": isinstance(error, UnreachableError | StoreError)}) from None
        before = self._nodes.get(node)
        self._nodes[node], line.node = line, node
        line.pace = self._paces.setdefault(node, line.pace)  # it outlives the connection
        if before:  # the same node on a new connection: the old one is dead or a twin
            self._lines.hang_up(before)
        # In a task, since the line takes nothing in before this has returned.
        task = asyncio.create_task(self._come_in(line, message.name, welcome))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _come_in(self, line: Line, name: str, welcome: Message) -> None:
        if line.node and self._nodes.get(line.node) is line:
            await self.tell(line.node, welcome)
            await self._host.connected(line.node, name)

    def spare(self, node: str, cost: float) -> float:
        """Return 0 where a node may do what costs so much, or in how many seconds it may."""
        pace = self._paces.get(node)
        return pace.spare(cost, asyncio.get_running_loop().time()) if pace else 0.0

    def slowed(self, line: Line) -> None:
        """See `lines.Talk`; the node is told now and then."""
        now = asyncio.get_running_loop().time()
        if line.node and now - line.told > _TELL_EVERY:
            line.told = now
            why = f"more than {RATE:.0f} messages a second, or as much in bytes: what comes beyond is read later"
            line.wire.write(self._lines.event(Slowed.event, Slowed(run=self._run, reason=why).payload()))
            self._host.slowed(line.node, why)

    async def gone(self, line: Line) -> None:
        """See `lines.Talk`."""
        if line.node and self._nodes.get(line.node) is line:
            del self._nodes[line.node]
            await self._host.disconnected(line.node)

    async def hear(self, line: Line, event: str, payload: object) -> str | None:
        """See `lines.Talk`."""
        if line.node is None or self._nodes.get(line.node) is not line or event not in self._answers:
            return "not connected as a node, or no event of this channel"
        try:
            await self._answers[event](line.node, payload)
        except AtollError as error:
            return str(error)
        return None


def _read(kind: type[M], act: Callable[[str, M], Awaitable[None]]) -> Callable[[str, object], Awaitable[None]]:
    async def read(node: str, payload: object) -> None:
        await act(node, kind.read(payload))

    return read
