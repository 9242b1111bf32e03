"""The server's end of Socket.IO: what a line says, what it takes for a sign of life, and what ends it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.federation import plan

from atoll.keys import Identity
from atoll.node.offer import greeting
from atoll.server import channel, web
from atoll.server.lines import frame
from atoll.server.runtime import Server

MASK = b"\x01\x02\x03\x04"


def masked(text: str) -> bytes:
    """A client's frame."""
    plain = frame(text)
    body = text.encode()
    head = plain[: len(plain) - len(body)]
    return bytes((head[0], head[1] | 0x80)) + head[2:] + MASK + bytes(one ^ MASK[k % 4] for k, one in enumerate(body))


@given(st.lists(st.text(max_size=300), max_size=5), st.integers(0, 20))
def test_where_frames_end_is_known(texts, cut):
    data = b"".join(map(masked, texts))
    assert web._ends_whole(data)
    if 0 < cut < len(data):
        ends = {len(b"".join(map(masked, texts[:k]))) for k in range(len(texts) + 1)}
        assert web._ends_whole(data[:cut]) == (cut in ends)


def test_a_pong_is_known_whatever_its_mask():
    assert web._is_pong(masked("3"))
    assert web._is_pong(b"\x81\x81\0\0\0\x003")
    assert not any(web._is_pong(one) for one in (masked("2"), masked("33"), masked(""), b"\x89" + masked("3")[1:]))


@asynccontextmanager
async def opened(tmp_path: Any) -> AsyncIterator[tuple[Server, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A server, and a websocket to it by hand."""
    server = Server(plan(), store=tmp_path / "store", port=0)
    serving = asyncio.create_task(server.serve_async())
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    writer.write(
        b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    assert b"101" in await reader.readuntil(b"\r\n\r\n")
    try:
        yield server, reader, writer
    finally:
        writer.close()
        server.stop()
        await serving


async def said(reader: asyncio.StreamReader) -> str:
    """The next packet that is no ping."""
    while True:
        head = await reader.readexactly(2)
        size = int.from_bytes(await reader.readexactly(2), "big") if head[1] == 126 else head[1]
        if (text := (await reader.readexactly(size)).decode()) != "2":
            return text


def greet(server: Server) -> str:
    offer = {"run": server.run, "digest": server.plan.digest, "challenge": server.challenge()}
    return f"40/fl,{json.dumps(greeting(Identity.new(), 'a', offer).payload())}"


def test_a_node_comes_in_asks_and_is_answered_however_its_bytes_are_cut(tmp_path):
    async def talk() -> list[str]:
        async with opened(tmp_path) as (server, reader, writer):
            said_so = [await said(reader)]
            update = {"run": server.run, "round": 1, "attempt": 1, "digest": "0" * 64}
            words = [greet(server), "3", f"42/fl,7{json.dumps(['fl_update', update])}", '42/fl,8["fl_update",{}]']
            for byte in b"".join(map(masked, words)):
                writer.write(bytes((byte,)))
                await writer.drain()
            said_so += [await said(reader) for _ in range(4)]
            writer.write(masked("41/fl,"))
            assert not (await reader.read(100))[4:]  # a close frame and the end
            return said_so

    hello, sid, *rest = asyncio.run(asyncio.wait_for(talk(), 20))
    assert json.loads(hello[1:]).keys() == {"sid", "upgrades", "pingInterval", "pingTimeout", "maxPayload"}
    assert hello[0] == "0"
    assert sid.startswith('40/fl,{"sid"')
    assert sum('["connection_received"' in one for one in rest) == 1
    assert "43/fl,7[]" in rest
    assert any(one.startswith("43/fl,8[\"no 'fl_update' message") for one in rest)


def test_a_frozen_node_is_said_to_be_silent_and_then_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(channel, "_PING_EVERY", 0.2)
    monkeypatch.setattr(channel, "_PING_PATIENCE", 1.0)
    monkeypatch.setattr(channel, "_NOTICED", 0.2)

    async def freeze() -> tuple[dict[str, float], bytes]:
        async with opened(tmp_path) as (server, reader, writer):
            await said(reader)
            writer.write(masked(greet(server)))
            silent: dict[str, float] = {}
            while not silent:  # it answers no ping
                await asyncio.sleep(0.01)
                silent = server.channel.silent()
            ended = await reader.read()
            while server.drive.state.present:
                await asyncio.sleep(0.01)
            return silent, ended

    silent, _ = asyncio.run(asyncio.wait_for(freeze(), 20))
    assert all(0.4 < seconds < 2 for seconds in silent.values())


@pytest.mark.parametrize(
    "head",
    [b"GET /socket.io/?transport=websocket HTTP/1.1\r\n", b"GET /socket.io/?EIO=4 HTTP/1.1\r\nOrigin: http://elsewhere\r\n"],
)
def test_other_versions_and_other_sites_pages_are_refused(tmp_path, head):
    async def ask() -> bytes:
        async with opened(tmp_path) as (server, _, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
            writer.write(
                head + b"Host: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
            )
            line = await reader.readline()
            writer.close()
            return line

    assert b"403" in asyncio.run(asyncio.wait_for(ask(), 20))
