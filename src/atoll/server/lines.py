"""The server's end of Socket.IO, as much of it as the control channel needs: 10,000 connections have to be cheap.

Socket.IO 5 over Engine.IO 4, by websocket only, in one namespace, without binary packets::

    0{…}            → sid and how often to expect a ping       2 → 3           a ping and its answer
    40/fl,{…}       ← a handshake                              41/fl,          goodbye, by either side
    40/fl,{"sid"}   → it may come in                           44/fl,{…}       → it may not, and why
    42/fl,[event, …]  an event, by either side; a number before the [ asks for 43/fl,number[answer]

A connection is one task that waits for what comes. What goes out is written at once, whether its peer takes it or not: the
web server breaks off who doesn't. One loop pings all of them; the answer is a line's newest sign of life, and goes no further.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from atoll.server.pace import BYTES, Pace

_PATH = "/socket.io"


class Wire(Protocol):
    """What the web server gives of a websocket, as `scope["extensions"]["wire"]`.

    Attributes:
        heard: when the last bytes came, in the event loop's time.
    """

    heard: float

    def is_open(self) -> bool:
        """Say whether anything may still come and go."""
        ...

    def write(self, frame: bytes) -> None:
        """Send a frame; nothing happens where the connection is gone."""
        ...

    def close(self) -> None:
        """Hang up once everything is sent."""
        ...

    def abort(self) -> None:
        """Hang up at once."""
        ...


class NotWelcomeError(Exception):
    """A handshake is refused: a sentence, and data that goes with it."""

    def __init__(self, message: str, data: Any) -> None:
        super().__init__(message)
        self.data = data


class Line:
    """One connection.

    Args:
        wire: the websocket.
        now: in the event loop's time.

    Attributes:
        node: whose it is, once its handshake is through.
        pace: what it has left of the server.
        told: when its node was last told that it is slowed.
        since: when it was opened.
        due: when it is to be pinged next.
    """

    __slots__ = ("due", "node", "pace", "since", "told", "wire")

    def __init__(self, wire: Wire, now: float) -> None:
        self.wire, self.since, self.due, self.told = wire, now, now, -math.inf
        self.pace = Pace(now)
        self.node: str | None = None


class Talk(Protocol):
    """What is done about what comes."""

    async def welcome(self, line: Line, auth: object) -> None:
        """A handshake.

        Raises:
            NotWelcomeError: it may not come in.
        """
        ...

    async def hear(self, line: Line, event: str, payload: object) -> str | None:
        """An event of a line that is welcome: None, or the one line that refuses it."""
        ...

    def slowed(self, line: Line) -> None:
        """A connection says more than it may: what it says is read later."""
        ...

    async def gone(self, line: Line) -> None:
        """A connection is no more."""
        ...


class Lines:
    """Every connection there is.

    Args:
        talk: what is done about what comes.
        namespace: the one that there is.
        limit: the longest message, in bytes, as clients are told; the web server enforces it.
        every, patience: seconds between pings, and without an answer until a client gives its server up.
    """

    def __init__(self, talk: Talk, namespace: str, limit: int, every: float, patience: float) -> None:
        self.open: set[Line] = set()
        self._talk, self._namespace = talk, f"{namespace},"
        self._pace = {"pingInterval": int(1000 * every), "pingTimeout": int(1000 * patience), "maxPayload": limit}

    def over(self, app: ASGIApp) -> ASGIApp:
        """Return an application that takes the websockets at Socket.IO's path, and leaves everything else to another."""

        async def both(scope: Scope, receive: Receive, send: Send) -> None:
            mine = scope["type"] == "websocket" and scope["path"].rstrip("/") == _PATH
            await (self._serve if mine else app)(scope, receive, send)

        return both

    def event(self, name: str, payload: dict[str, Any]) -> bytes:
        """Return the frame of an event: made once, it may be written to many."""
        return frame(f"42{self._namespace}{_json([name, payload])}")

    def hang_up(self, line: Line) -> None:
        """Say goodbye."""
        line.wire.write(frame(f"41{self._namespace}"))
        line.wire.close()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (await receive())["type"] != "websocket.connect" or _foreign(scope):
            await send({"type": "websocket.close"})  # before it is accepted: HTTP 403
            return
        await send({"type": "websocket.accept"})
        wire: Wire = scope["extensions"]["wire"]
        scope["headers"] = ()  # what was said to get here is of no more use, and there are many who said it
        now = asyncio.get_running_loop().time
        line = Line(wire, now())
        self.open.add(line)
        try:
            line.wire.write(frame(f"0{_json({'sid': secrets.token_hex(8), 'upgrades': [], **self._pace})}"))
            while (message := await receive())["type"] == "websocket.receive":
                said = message.get("text") or ""
                if wait := line.pace.take(1 + len(said) // BYTES, now()):
                    self._talk.slowed(line)
                    await asyncio.sleep(wait)  # the web server reads no more meanwhile, so a flood stays where it comes from
                    if not wire.is_open():
                        break
                if not await self._take(line, said):
                    break
            wire.close()
        finally:
            self.open.discard(line)
            await self._talk.gone(line)

    async def _take(self, line: Line, packet: str) -> bool:
        """Take a packet; return whether more may come."""
        kind, rest = packet[:2], packet[2:].removeprefix(self._namespace)
        if packet == "3":
            return True
        if len(rest) == len(packet) - 2 or kind not in ("40", "42"):  # another namespace; a goodbye, or no packet of ours
            return False
        try:
            if kind == "40":
                return line.node is None and await self._welcome(line, json.loads(rest or "null"))
            number, _, event = rest.partition("[")
            name, *payload = json.loads(f"[{event}")
        except (ValueError, RecursionError):
            return False
        if line.node is None or not (number == "" or number.isdecimal()) or not isinstance(name, str):
            return False
        answer = await self._talk.hear(line, name, payload[0] if payload else None)
        if number:
            line.wire.write(frame(f"43{self._namespace}{number}{_json([] if answer is None else [answer])}"))
        return True

    async def _welcome(self, line: Line, auth: object) -> bool:
        try:
            await self._talk.welcome(line, auth)
        except NotWelcomeError as error:
            line.wire.write(frame(f"44{self._namespace}{_json({'message': str(error), 'data': error.data})}"))
        else:
            line.wire.write(frame(f"40{self._namespace}{_json({'sid': secrets.token_hex(8)})}"))
        return True


def _foreign(scope: Scope) -> bool:
    """Whether a page of another site asks, in somebody's browser; or a client that speaks another version."""
    headers = Headers(scope=scope)
    origin = headers.get("origin", "")
    asked = scope["query_string"].split(b"&")
    return bool(origin and origin.partition("://")[2] != headers.get("host")) or b"EIO=4" not in asked


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def frame(text: str) -> bytes:
    """Return a text as one frame of a server's websocket (RFC 6455, section 5.2)."""
    body = text.encode()
    if len(body) < 126:
        return bytes((0x81, len(body))) + body
    length = b"\x7e" + len(body).to_bytes(2, "big") if len(body) < 1 << 16 else b"\x7f" + len(body).to_bytes(8, "big")
    return b"\x81" + length + body


PING = frame("2")
