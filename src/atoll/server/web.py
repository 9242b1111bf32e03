"""Listening: a port taken from the first moment, and a web server that nobody can hold up.

It leaves signals to the run. A connection gets a slot for as long as it does something: a request's head has to come within
`PATIENCE` and fit into `HEAD`, what is sent has to be taken within `STUCK`, and no address holds more than half of all slots.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.wsproto_impl import WSProtocol
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection, Request

from atoll.errors import AtollError
from atoll.tls import Certificate

log = logging.getLogger("atoll.server")
PATIENCE = 15.0
"""Seconds until a request's head is there: from when the connection opened, or the response before was sent."""
HEAD = 64 << 10
"""The longest head of a request, in bytes."""
STUCK = 120.0
"""Seconds in which a peer takes nothing of what waits for it until its connection is broken off."""
_SPARE = 128
"""Files that a server needs for itself: store, log, models."""


class Web(uvicorn.Server):
    """A web server for one application; its small messages are not worth compressing.

    Args:
        app: the application.
        certificate: speak TLS by it.
        message: the longest message of a websocket, in bytes.
        farewell: how long responses on their way may still take when it stops, in seconds.
        clients: a file of CAs; who shows no certificate of theirs doesn't get past the handshake.
    """

    def __init__(
        self,
        app: Any,
        certificate: Certificate | None = None,
        message: int = 1 << 20,
        farewell: float = 600.0,
        clients: Path | None = None,
    ) -> None:
        shown: Any = {"ssl_certfile": certificate.chain, "ssl_keyfile": certificate.key} if certificate else {}
        if clients:
            shown |= {"ssl_ca_certs": str(clients), "ssl_cert_reqs": ssl.CERT_REQUIRED}
        super().__init__(
            _Config(
                app,
                http=_Http,
                ws=_Socket,
                lifespan="off",
                log_config=None,
                access_log=False,  # an address may hold a token, once
                ws_per_message_deflate=False,
                ws_max_size=message,
                ws_ping_interval=None,  # the channel has pings of its own
                timeout_graceful_shutdown=max(1, round(farewell)),
                **shown,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class _Config(uvicorn.Config):
    """Settings, and what all connections of a server have in common: how many there are, by address."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.peers: Counter[str] = Counter()
        self.slots = max(_SPARE, files() - _SPARE)

    def enter(self, transport: asyncio.Transport) -> Callable[[], None]:
        """Give a slot to a connection, or hang up; return how it is given back."""
        peer = str((transport.get_extra_info("peername") or ("?",))[0])
        if self.peers.total() >= self.slots or self.peers[peer] >= self.slots // 2:
            log.warning("a connection of %s is refused: %d of %d are its own", peer, self.peers[peer], self.slots)
            transport.abort()
        self.peers[peer] += 1

        def leave() -> None:
            self.peers[peer] -= 1
            if not self.peers[peer]:
                del self.peers[peer]

        return leave


def files() -> int:
    """How many files this process may have open at a time."""
    try:
        import resource
    except ImportError:  # Windows, which counts otherwise
        return 8192
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def open_more() -> int:
    """Let this process have as many files as the system allows it, for each node takes one or two; return how many."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return files()


class _Deadline:
    """Something that happens unless something else comes first."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._timer: asyncio.TimerHandle | None = None

    @property
    def runs(self) -> bool:
        """Whether something is waited for."""
        return self._timer is not None

    def within(self, seconds: float) -> None:
        """Wait so many seconds from now."""
        self.met()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._act)

    def met(self) -> None:
        """What was waited for is here."""
        if self._timer:
            self._timer.cancel()
            self._timer = None


class _Slot(asyncio.Protocol):
    """What every connection does, whatever it speaks: it holds a slot, and loses it when its peer takes nothing for too long."""

    config: uvicorn.Config

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._leave = cast("_Config", self.config).enter(cast("asyncio.Transport", transport))
        self._taken = _Deadline(cast("asyncio.Transport", transport).abort)

    def pause_writing(self) -> None:
        self._taken.within(STUCK)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._taken.met()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        self._taken.met()
        super().connection_lost(exc)


class _Http(_Slot, HttpToolsProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._head = _Deadline(self.transport.close)
        self._next()

    def _next(self) -> None:
        self._came = 0
        self._head.within(PATIENCE)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head.runs and not self.transport.is_closing():
            self._came += len(data)
            if self._came > HEAD:
                self.send_400_response(f"The head of the request is longer than {HEAD} bytes.")

    def on_headers_complete(self) -> None:
        self._head.met()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        if not self.pipeline:
            self._next()
        super().on_response_complete()

    def handle_websocket_upgrade(self) -> None:
        self._leave()
        super().handle_websocket_upgrade()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head.met()
        super().connection_lost(exc)


class _Socket(_Slot, WSProtocol):
    """A websocket whose application may write frames of its own at once: see `lines.Wire`."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._whole, self.heard = True, self.loop.time()

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        cast("dict[str, Any]", self.scope["extensions"])["wire"] = self

    def data_received(self, data: bytes) -> None:
        self.heard = self.loop.time()
        if self.handshake_complete:
            if self._whole and _is_pong(data):
                return  # it has said what it is for: a queue and a task's turn would cost ten times as much
            self._whole = self._whole and _ends_whole(data)
        super().data_received(data)

    def is_open(self) -> bool:
        return not (self.transport.is_closing() or self.close_sent)

    def write(self, frame: bytes) -> None:
        if self.is_open():
            self.transport.write(frame)

    def close(self) -> None:
        if self.conn.state is ConnectionState.OPEN:
            self.write(self.conn.send(CloseConnection(1000)))
        self.close_sent = True
        self.transport.close()

    def abort(self) -> None:
        self.transport.abort()


def _is_pong(data: bytes) -> bool:
    """Say whether bytes are one client's frame with the text "3": Engine.IO's answer to a ping."""
    return len(data) == 7 and data[:2] == b"\x81\x81" and data[2] ^ data[6] == 0x33


def _ends_whole(data: bytes) -> bool:
    """Say whether bytes that begin with a client's frame end with one, too."""
    start = 0
    while start + 2 <= len(data):
        size = data[start + 1] & 0x7F
        if size == 127:  # longer than any message here
            return False
        more = 2 if size == 126 else 0
        start += 6 + more + (int.from_bytes(data[start + 2 : start + 4], "big") if more else size)
    return start == len(data)


def bind(host: str, port: int) -> socket.socket:
    """Take a port; port 0 takes a free one.

    Raises:
        AtollError: it can't be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)  # from now on the port is taken, and who comes early waits
    except OSError as error:
        listener.close()
        raise AtollError(
            f"can't listen on {host} port {port} ({error.strerror}): choose another --port, or 0 for a free one"
        ) from error
    return listener
