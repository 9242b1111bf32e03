"""Many idle nodes on one server process: what each costs, and how quickly a round reaches them all.

The server is the real one, in a process of its own. Its nodes are bare: they sign their challenge, answer pings, and
say `fl_update` to a `start_training`, to which the server's answer counts as the acknowledgement. They train nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import aiohttp

from atoll.cli.bench.aggregate import processor_time, rss_anon
from atoll.cli.bench.rounds import Noise, spawned
from atoll.drive import new_loop
from atoll.errors import AtollError
from atoll.keys import Identity
from atoll.messages import NAMESPACE, Connect, FlUpdate
from atoll.plan import Plan

ROLE = "atoll.cli.bench.connect"
_EACH = 2500
"""Nodes of one client process: from an address of its own, for no address may hold more than half of a server's connections."""
_AT_ONCE = 32
"""Nodes of one client process that are on their way in at a time."""
_SETTLED = 30.0
"""Seconds after the last node came in until the idle server is measured: three rounds of pings."""


def measure(nodes: int, idle: float = 60.0) -> dict[str, Any]:
    """Return what a node costs the server in memory and idle processor time, and how long a round takes to reach all.

    Args:
        nodes: how many; the last of them comes alone, and begins the round.
        idle: seconds for which the idle server is measured.

    Raises:
        AtollError: this system doesn't allow as many open files.
    """
    _check_files(nodes)
    with tempfile.TemporaryDirectory(prefix="atoll-bench-") as place, contextlib.ExitStack() as stack:
        plan = Path(place) / "plan.json"
        plan.write_text(_plan(nodes).to_json())
        server = stack.enter_context(spawned(ROLE, "server", str(plan), str(Path(place) / "store")))
        url = json.loads(_line(server))["url"]

        def crowd(first: int, count: int) -> subprocess.Popen[str]:
            words = url, f"127.0.0.{2 + first // _EACH}", str(first), str(count)
            return stack.enter_context(spawned(ROLE, "clients", *words))

        alone, began = rss_anon(server.pid), time.monotonic()
        crowds = [crowd(first, min(_EACH, nodes - 1 - first)) for first in range(0, nodes - 1, _EACH)]
        for one in crowds:
            _line(one)
        joined = time.monotonic() - began
        time.sleep(min(_SETTLED, idle))
        cpu = _load(server.pid, idle)
        each, spent = (rss_anon(server.pid) - alone) / max(1, nodes - 1), processor_time(server.pid)
        crowds.append(crowd(nodes - 1, 1))
        _line(crowds[-1])
        asked = float(_line(server))
        reached = max(json.loads(_line(one))["last"] for one in crowds) - asked
        spent = processor_time(server.pid) - spent
        for process in (*crowds, server):
            process.kill()
    return {
        "nodes": nodes,
        "kb_per_node": round(each / 1e3, 1),
        "broadcast_s": round(reached, 3),
        "cpu": round(cpu, 4),
        "broadcast_cpu_s": round(spent, 2),
        "joined_per_s": round((nodes - 1) / joined, 1),
        "idle_s": idle,
    }


def _check_files(nodes: int) -> None:
    from atoll.server import web

    if (files := web.open_more()) < nodes + 1000:
        raise AtollError(f"--nodes: {nodes} nodes and a thousand more open files are over this system's {files} (`ulimit -Hn`)")


def _plan(nodes: int) -> Plan:
    return Plan.of(
        {
            "plan": {"name": "connect", "rounds": 1},
            "model": {"logistic": True},
            "cohort": {"minimum": nodes, "quorum": 1.0, "deadline": "1h"},
        }
    )


def _line(process: subprocess.Popen[str]) -> str:
    if line := process.stdout.readline() if process.stdout else "":
        return line
    raise RuntimeError("a process of the benchmark ended early")


def _load(pid: int, seconds: float) -> float:
    """The share of one core that a process takes, over so many seconds."""
    before, began = processor_time(pid), time.monotonic()
    time.sleep(seconds)
    return (processor_time(pid) - before) / (time.monotonic() - began)


def _server(plan: str, store: str) -> None:
    """Serve, and print the address and the moment at which the round begins."""
    from atoll.server import web
    from atoll.server.runtime import Server

    def watch(event: Mapping[str, Any]) -> None:
        if event["what"] == "listening":
            print(json.dumps({"url": event["url"]}), flush=True)
        if event["what"] == "asked":
            print(time.monotonic(), flush=True)

    web.open_more()
    Server(Plan.load(plan), store=store, port=0, learner=Noise(10), watch=watch).serve()


def _clients(url: str, address: str, first: str, count: str) -> None:
    """Be so many nodes: print a line when all are in, and one when the last has its acknowledgement."""
    from atoll.server import web

    web.open_more()
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_crowd(url, address, int(first), int(count)))


async def _crowd(url: str, address: str, first: int, count: int) -> None:
    told = asyncio.Semaphore(_AT_ONCE)
    loop = asyncio.get_running_loop()
    host, port = url.removeprefix("http://").split(":")
    nodes: list[_Bare] = []

    async def come_in(number: int, session: aiohttp.ClientSession) -> None:
        async with told:
            async with session.get(f"{url}/v1/plan") as response:
                offer = await response.json()
            node = _Bare(_hello(f"node-{number:05}", offer))
            await loop.create_connection(lambda: node, host, int(port), local_addr=(address, 0))
            await node.welcome
            nodes.append(node)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(local_addr=(address, 0), force_close=True)) as session:
        await asyncio.gather(*(come_in(first + k, session) for k in range(count)))
    print(json.dumps({"in": len(nodes)}), flush=True)
    times = await asyncio.gather(*(node.acknowledged for node in nodes))
    print(json.dumps({"last": max(times)}), flush=True)
    await asyncio.Event().wait()  # still connected, until the benchmark ends this process


def _hello(name: str, offer: Mapping[str, Any]) -> str:
    """The handshake of a new node."""
    identity = Identity.new()
    said = Connect(name=name, key=identity.public.hex(), plan=offer["digest"], challenge=offer["challenge"])
    signed = said.model_copy(update={"signature": identity.sign(said.signed(offer["run"])).hex()})
    return f"40{NAMESPACE},{json.dumps(signed.payload())}"


class _Bare(asyncio.Protocol):
    """A node's control channel by hand: a websocket whose frames are short, and the few packets of Socket.IO that it needs.

    Args:
        hello: the packet that it comes in with.
    """

    def __init__(self, hello: str) -> None:
        self._hello, self._came, self._open = hello, bytearray(), False
        loop = asyncio.get_running_loop()
        self.welcome: asyncio.Future[None] = loop.create_future()
        self.acknowledged: asyncio.Future[float] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(
            b"GET /socket.io/?transport=websocket&EIO=4 HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )

    def connection_lost(self, exc: Exception | None) -> None:
        for wait in (self.welcome, self.acknowledged):
            if not wait.done():
                wait.set_exception(RuntimeError(f"the server hung up ({exc})"))

    def data_received(self, data: bytes) -> None:
        self._came += data
        if not self._open:
            head, end, rest = bytes(self._came).partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 101"):
                raise RuntimeError(head.decode(errors="replace"))
            self._open, self._came = True, bytearray(rest)
        while (frame := _frame(self._came)) is not None:
            self._packet(frame)

    def _packet(self, packet: str) -> None:
        if packet == "2":
            self._send("3")
        elif packet.startswith("0"):
            self._send(self._hello)
        elif packet.startswith(f'42{NAMESPACE},["connection_received"'):
            self.welcome.set_result(None)
        elif packet.startswith(f'42{NAMESPACE},["start_training"'):
            task = json.loads(packet.partition(",")[2])[1]
            update = FlUpdate(run=task["run"], round=task["round"], attempt=task["attempt"], digest=task["model"])
            self._send(f"42{NAMESPACE},0{json.dumps([FlUpdate.event, update.payload()])}")
        elif packet.startswith(f"43{NAMESPACE},0"):
            self.acknowledged.set_result(time.monotonic())
        elif packet.startswith("44"):
            raise RuntimeError(packet)

    def _send(self, packet: str) -> None:
        """Send a text frame; its mask is zeros, which leaves the bytes as they are."""
        body = packet.encode()
        length = bytes([0x80 | len(body)]) if len(body) < 126 else b"\xfe" + len(body).to_bytes(2, "big")
        self._transport.write(b"\x81" + length + bytes(4) + body)


def _frame(came: bytearray) -> str | None:
    """Take the next whole text frame from what came, if it is there."""
    if len(came) < 2:
        return None
    start, size = (4, int.from_bytes(came[2:4], "big")) if came[1] == 126 else (2, came[1])
    if len(came) < start + size:
        return None
    body = came[start : start + size].decode()
    del came[: start + size]
    return body


if __name__ == "__main__":
    (_server if sys.argv[1] == "server" else _clients)(*sys.argv[2:])
