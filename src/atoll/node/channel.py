"""The control channel's node end: what the server says, read and checked; and what it is told."""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import socketio

from atoll.errors import AtollError, RefusedError, StoreError, UnreachableError
from atoll.messages import NAMESPACE, Connect, Message

log = logging.getLogger("atoll.node")


class Channel:
    """A connection that is opened as often as it takes.

    Args:
        url: the server's.
        tls: what aiohttp is given as `ssl`.
        hears: what to do about each kind of message.
        check: returns a message that may be believed, and raises `RefusedError` or `StoreError` for any other.
        lost: told that the connection is gone.
        failed: told why this server can't be talked to at all.
    """

    def __init__(
        self,
        url: str,
        tls: ssl.SSLContext | bool,
        *,
        hears: Mapping[type[Message], Callable[[Any], Awaitable[None]]],
        check: Callable[[Message], Message],
        lost: Callable[..., Awaitable[None]],
        failed: Callable[[AtollError], None],
    ) -> None:
        self._url, self._check, self._failed = url, check, failed
        quiet = logging.getLogger("atoll.node.channel")  # a connection that breaks is told as an event, not by the library
        quiet.setLevel(logging.CRITICAL)
        self._sio = socketio.AsyncClient(
            reconnection=False, handle_sigint=False, engineio_logger=quiet, websocket_extra_options={"ssl": tls}
        )
        for kind, act in hears.items():
            self._hear(kind, act)
        self._sio.on("disconnect", lost, namespace=NAMESPACE)
        self._sio.on("connect_error", self._not_connected, namespace=NAMESPACE)

    async def open(self, hello: Connect) -> None:
        """Connect and shake hands.

        Raises:
            UnreachableError: it can't be opened now.
        """
        try:
            await self._sio.connect(
                self._url, namespaces=[NAMESPACE], auth=hello.payload(), transports=["websocket"], wait_timeout=10
            )
        except socketio.exceptions.ConnectionError as error:
            raise UnreachableError(str(error)) from error

    async def say(self, message: Message) -> None:
        """Say something, if the server is there."""
        with contextlib.suppress(socketio.exceptions.SocketIOError):  # away: the machine says it again on return
            await self._sio.emit(message.event, message.payload(), namespace=NAMESPACE)

    async def say_last(self, message: Message) -> None:
        """Say something last: wait until the server has heard it."""
        with contextlib.suppress(socketio.exceptions.SocketIOError):
            await self._sio.call(message.event, message.payload(), namespace=NAMESPACE, timeout=10)

    async def close(self) -> None:
        """Hang up."""
        await self._sio.disconnect()

    def _hear(self, kind: type[Message], act: Callable[[Any], Awaitable[None]]) -> None:
        async def handle(payload: object = None) -> None:
            try:
                await act(self._check(kind.read(payload)))
            except (RefusedError, StoreError) as error:  # not the server that this node knows
                self._failed(error)
            except AtollError as error:
                log.warning("from the server: %s", error)

        self._sio.on(kind.event, handle, namespace=NAMESPACE)

    async def _not_connected(self, reason: object = None) -> None:
        """Hear why the channel could not be opened: a server that answers says it in a message, and means it."""
        if isinstance(reason, dict) and "message" in reason and reason.get("data") != {"again": True}:
            self._failed(RefusedError(f"{self._url}: {str(reason['message'])[:2000]}"))
