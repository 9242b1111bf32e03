"""Nobody holds a server up: slow, stuck, endless and countless clients lose their connection, and the run beside them goes on."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import numpy as np
import pytest
from tests.federation import clients, plan

from atoll.node.runtime import Node
from atoll.server import channel, web
from atoll.server.runtime import Server
from atoll.simulate import simulate

Attack = Callable[[str, int], Awaitable[None]]
"""Given the host and the port of a server; returns once the server has put an end to it."""


def attacked(tmp_path: Any, attack: Attack, **options: Any) -> None:
    """Attack a server before a run, and go on during it: the run has the same bits, and ends."""
    agreed = plan(cohort={"quorum": 1.0}, **options)

    async def together() -> dict[str, Any]:
        server = Server(agreed, store=tmp_path / "store", port=0)
        host, port = "127.0.0.1", int(server.url.rpartition(":")[2])
        serving = asyncio.create_task(server.serve_async())
        await attack(host, port)
        again = asyncio.create_task(attack(host, port))
        nodes = [Node(server.url, data, name=name, directory=tmp_path / name) for name, data in clients().items()]
        history, *_ = await asyncio.gather(serving, *(node.start_async() for node in nodes))
        again.cancel()
        await asyncio.wait([again])
        return history

    history = asyncio.run(asyncio.wait_for(together(), 40))
    assert history["last"] == simulate(agreed, clients()).digest


async def ended(reader: asyncio.StreamReader) -> bytes:
    """Everything that comes until the server hangs up."""
    came = b""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(1 << 16):
            came += piece
    return came


async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, what: bytes, every: float) -> None:
    """Send a byte now and then until the server hangs up."""
    left = asyncio.create_task(ended(reader))
    while not left.done():
        with contextlib.suppress(ConnectionError):
            writer.write(what)
        await asyncio.wait([left], timeout=every)
    writer.close()


@pytest.mark.parametrize("head", [b"", b"GET /v1/status HTTP/1.1\r\nHost: x\r\nX-Slow: "], ids=["silent", "a byte now and then"])
def test_a_slow_head_of_a_request_loses_its_slot(tmp_path, monkeypatch, head):
    monkeypatch.setattr(web, "PATIENCE", 0.4)

    async def attack(host: str, port: int) -> None:
        lines = [await asyncio.open_connection(host, port) for _ in range(20)]
        for _, writer in lines:
            writer.write(head)
        await asyncio.gather(*(drips(*line, head[-1:], 0.05) for line in lines))

    attacked(tmp_path, attack)


def test_a_request_whose_body_never_ends_loses_its_slot(tmp_path, monkeypatch):
    monkeypatch.setattr(web, "PATIENCE", 0.4)

    async def attack(host: str, port: int) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"POST /v1/status HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        await drips(reader, writer, b"x", 0.05)

    attacked(tmp_path, attack)


def test_a_head_without_end_is_refused(tmp_path):
    async def attack(host: str, port: int) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET /v1/status HTTP/1.1\r\n")
        said = asyncio.create_task(ended(reader))
        sent = 0
        with contextlib.suppress(ConnectionError):
            while not said.done() and sent < 64 << 20:
                writer.write(b"X: " + b"x" * 8000 + b"\r\n")
                sent += 8000
                await writer.drain()
        await said
        writer.close()
        assert sent < 32 << 20

    attacked(tmp_path, attack)


def test_who_takes_nothing_of_a_model_loses_its_slot(tmp_path, monkeypatch):
    monkeypatch.setattr(web, "STUCK", 0.4)

    async def stuck() -> int:
        inputs = 2_000_000  # 16 MB, more than the system keeps on its way
        agreed = plan(model={"inputs": inputs}, cohort={"minimum": 1})
        server = Server(agreed, store=tmp_path / "store", port=0)
        serving = asyncio.create_task(server.serve_async())
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]), limit=1 << 10)
        writer.write(f"GET /v1/models/{server.drive.state.model} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await reader.read(10)
        x = np.zeros((2, inputs), np.float32)
        node = Node(server.url, (x, np.array([0.0, 1.0])), name="a", directory=tmp_path / "a")
        await asyncio.gather(serving, node.start_async())  # the server's end waits for nobody who is stuck
        came = len(await ended(reader))
        writer.close()
        return came

    assert asyncio.run(asyncio.wait_for(stuck(), 40)) < 16_000_000


def test_one_address_does_not_take_all_connections(tmp_path, monkeypatch):
    monkeypatch.setattr(web, "_SPARE", 10)
    monkeypatch.setattr(web, "files", lambda: 50)

    async def attack(host: str, port: int) -> None:
        there, kept = 0, []
        for _ in range(40):
            reader, writer = await asyncio.open_connection(host, port, local_addr=("127.0.0.2", 0))
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                there += (await reader.read(12)).startswith(b"HTTP/1.1 200")
            kept.append(writer)
        assert there == 20, "half of 40"
        for writer in kept:
            writer.close()

    attacked(tmp_path, attack)


@pytest.mark.parametrize(
    "frames",
    [
        ["x" * (channel.MESSAGE_LIMIT + 1)],
        ["40/fl," + "[" * 100_000],
        ["40/fl,", "9", "", "\x00", "42/fl,", '42/fl,["fl_update"]', '42["x"', '459-/fl,["x",{"_placeholder":true,"num":7}]'],
        ["40/fl," + '{"v":1,"name":"' + "\\ud800" + '"}', '42/fl,["start_training",{}]', '43/fl,7["a"]'],
        [b"\x00" * 1000, b"", "41/fl,", "1"],
        [],
    ],
    ids=["too long", "too deep", "no packets", "no names", "bytes", "silent"],
)
def test_a_stranger_on_the_control_channel_is_hung_up_on(tmp_path, monkeypatch, frames, caplog):
    monkeypatch.setattr(channel, "_STRANGER", 0.3)

    async def attack(host: str, port: int) -> None:
        address = f"ws://{host}:{port}/socket.io/?transport=websocket&EIO=4"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as line:
            for frame in frames:
                with contextlib.suppress(ConnectionError):
                    await (line.send_bytes(frame) if isinstance(frame, bytes) else line.send_str(frame))
            async for message in line:
                if message.data == "2":  # it lives: it answers every ping
                    await line.send_str("3")

    monkeypatch.setattr(channel, "_PING_EVERY", 0.2)
    monkeypatch.setattr(channel, "_PING_PATIENCE", 0.4)
    attacked(tmp_path, attack)


def test_a_server_takes_as_many_files_as_it_may():
    """In a process of its own: each node holds one or two open, and the usual limit is 1,024."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 5000));"
        "from atoll.server import web; print(web.files(), web.open_more())"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert told.stdout.split() == ["200", "5000"]
