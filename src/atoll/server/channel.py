"""The control channel's server end: Socket.IO events in, machine events out, and messages to nodes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import socketio

from atoll.errors import AtollError, RefusedError, UnreachableError
from atoll.keys import node_of, signed_by
from atoll.messages import NAMESPACE, Connect, Decline, FlUpdate, Message, SessionEnded
from atoll.server.challenge import Challenges

M = TypeVar("M", bound=Message)
MESSAGE_LIMIT = 512 << 10
"""No message of the control channel is longer, in bytes."""
_STRANGER = 15.0
"""Seconds until whoever opened a connection and didn't come in as a node is hung up on: twice as many at most."""
_GOODBYE = 5.0
"""Seconds for hanging up on everybody: who doesn't take it finds out anyway."""
_PING_EVERY, _PING_PATIENCE = 10, 15
"""Seconds between signs of life, and without one until a silent connection counts as lost."""


class Host(Protocol):
    """What the channel asks of the server behind it."""

    async def connect(self, message: Connect, node: str) -> Message:
        """Admit a node: the answer to it.

        Raises:
            RefusedError: it may not come in.
        """
        ...

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

    async def session_ended(self, node: str, message: SessionEnded) -> None:
        """The node has taken the final model."""
        ...


class Channel:
    """Who is connected, and how to reach them."""

    def __init__(self, host: Host, run: str) -> None:
        self._host, self._run = host, run
        self.challenges = Challenges()
        self._sids: dict[str, str] = {}
        self._nodes: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        quiet = logging.getLogger("atoll.server.channel")  # a stranger's garbage is no news, and no page of it is
        quiet.setLevel(logging.CRITICAL)
        self.sio = socketio.AsyncServer(
            engineio_logger=quiet,
            async_mode="asgi",
            namespaces=[NAMESPACE],
            max_http_buffer_size=MESSAGE_LIMIT,
            ping_interval=_PING_EVERY,
            ping_timeout=_PING_PATIENCE,
            transports=["websocket"],
        )
        self.sio.on("connect", self._connect, namespace=NAMESPACE)
        self.sio.on("disconnect", self._disconnect, namespace=NAMESPACE)
        self._answer(FlUpdate, host.fl_update)
        self._answer(Decline, host.decline)
        self._answer(SessionEnded, host.session_ended)

    async def tell(self, node: str, message: Message) -> None:
        """Send a message to a node; nothing happens where it isn't connected: it hears on its return."""
        if sid := self._sids.get(node):
            await self.sio.emit(message.event, message.payload(), to=sid, namespace=NAMESPACE)

    async def hang_up(self, node: str) -> bool:
        """Close a node's connection; return whether it had one."""
        if sid := self._sids.get(node):
            await self.sio.disconnect(sid, namespace=NAMESPACE)
        return sid is not None

    async def close(self) -> None:
        """Hang up on everybody."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE):
                for sid in list(self._nodes):
                    await self.sio.disconnect(sid, namespace=NAMESPACE)
        await self.sio.shutdown()

    async def sweep(self) -> None:
        """Hang up, for as long as the server runs, on whoever opens a connection and doesn't come in."""
        before: set[str] = set()
        while True:
            await asyncio.sleep(_STRANGER)
            here = self.sio.eio.sockets
            strangers = here.keys() - {self.sio.manager.eio_sid_from_sid(sid, NAMESPACE) for sid in self._nodes}
            for sid in strangers & before:
                await here[sid].close(wait=False)
            before = strangers

    async def _connect(self, sid: str, environ: dict[str, Any], auth: object = None) -> None:
        del environ
        try:
            message = Connect.read(auth)
            key = bytes.fromhex(message.key)
            if not signed_by(key, bytes.fromhex(message.signature), message.signed(self._run)):
                raise RefusedError("the handshake's signature doesn't fit its key: is it for another run?")
            self.challenges.take(message.challenge)
            node = node_of(key)
            welcome = await self._host.connect(message, node)
        except AtollError as error:
            again = {"again": isinstance(error, UnreachableError)}
            raise socketio.exceptions.ConnectionRefusedError(str(error), again) from None
        # In a task, since the node hears nothing before this handler has returned.
        task = asyncio.create_task(self._welcome(sid, node, message.name, welcome))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _welcome(self, sid: str, node: str, name: str, welcome: Message) -> None:
        before = self._sids.get(node)
        self._sids[node], self._nodes[sid] = sid, node
        if before:  # the same node on a new connection: the old one is dead or a twin
            del self._nodes[before]
            await self.sio.disconnect(before, namespace=NAMESPACE)
        await self.tell(node, welcome)
        await self._host.connected(node, name)

    async def _disconnect(self, sid: str, *reason: object) -> None:
        del reason
        if node := self._nodes.pop(sid, None):
            del self._sids[node]
            await self._host.disconnected(node)

    def _answer(self, kind: type[M], act: Callable[[str, M], Awaitable[None]]) -> None:
        """Route one kind of message; what comes back to the node is None, or the one line that refuses it."""

        async def answer(sid: str, payload: object = None) -> str | None:
            try:
                if not (node := self._nodes.get(sid)):
                    raise RefusedError("not connected as a node")
                await act(node, kind.read(payload))
            except AtollError as error:
                return str(error)
            return None

        self.sio.on(kind.event, answer, namespace=NAMESPACE)
