"""What one node says too much is read later: its flood stays where it comes from, and the rounds of the others go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.federation import clients, plan, say
from tests.server.test_lines import masked

from atoll.errors import RefusedError, UnreachableError
from atoll.keys import Identity
from atoll.logs.upload import HttpAppender
from atoll.messages import Decline
from atoll.node.offer import greeting, offered
from atoll.node.runtime import Node
from atoll.server import ending
from atoll.server.pace import BURST, RATE, Pace
from atoll.server.runtime import Server
from atoll.simulate import simulate
from atoll.wire import Address, seal


class Rude:
    """A node that is let in, and then sends whatever it likes, by a websocket that is its own work."""

    def __init__(self, server: Server) -> None:
        self.server, self.identity = server, Identity.new()

    async def comes(self, session: aiohttp.ClientSession) -> str:
        """Come in, on a new connection; return the server's answer."""
        hello = greeting(self.identity, "rude", await offered(session, self.server.url))
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", int(self.server.url.rpartition(":")[2]))
        self.writer.write(
            b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await self.reader.readuntil(b"\r\n\r\n")
        self.writer.write(masked(f"40/fl,{json.dumps(hello.payload())}"))
        return await self.hears("4")

    async def hears(self, start: str) -> str:
        """The next text that begins so."""
        while True:
            head = await self.reader.readexactly(2)
            length = int.from_bytes(await self.reader.readexactly(2), "big") if head[1] == 126 else head[1]
            if (text := (await self.reader.readexactly(length)).decode()).startswith(start):
                return text

    async def flood(self) -> None:
        """Say more than anybody could take, a thousand at a time, until the server hangs up."""
        said = Decline(run=self.server.run, round=999, attempt=1, reason="x").payload()
        many = 1000 * masked(f'42/fl,["decline",{json.dumps(said)}]')
        with contextlib.suppress(OSError):
            while True:
                self.writer.write(many)
                await self.writer.drain()

    async def told(self) -> str:
        """The server's word for it."""
        return str(json.loads((await self.hears('42/fl,["slowed"'))[6:])[1]["reason"])


@pytest.fixture(autouse=True)
def short_farewell(monkeypatch):
    """A node that floods is gone without a word, and would be waited for."""
    monkeypatch.setattr(ending, "FAREWELL", 0.5)


@contextlib.asynccontextmanager
async def served(
    place: Path, minimum: int = 3, watch: Callable[[Any], None] | None = None
) -> AsyncIterator[tuple[Server, asyncio.Task[Any], aiohttp.ClientSession]]:
    given = plan(plan={"rounds": 1000}, cohort={"minimum": minimum, "quorum": 0.7, "grace": 0, "deadline": 60})
    server = Server(given, store=place / "store", port=0, watch=watch)
    running = asyncio.create_task(server.serve_async())
    async with aiohttp.ClientSession() as session:
        yield server, running, session
        server.stop()
        await running


def test_a_flood_does_not_hold_up_the_rounds_of_the_others(tmp_path):
    """What it says is read at the pace of a node, however fast it comes; the others' rounds close, with their own bits."""

    async def together() -> tuple[dict[str, Any], int, float, int]:
        now, heard, closed = asyncio.get_running_loop().time, 0, [asyncio.Event() for _ in range(1001)]

        def watch(event: Any) -> None:
            if event["what"] == "round":
                closed[event["round"]].set()

        async with served(tmp_path, watch=watch) as (server, running, session):
            rude = Rude(server)
            there = server.channel._answers[Decline.event]

            async def counted(node: str, payload: object) -> None:
                nonlocal heard
                heard += 1
                await there(node, payload)

            server.channel._answers = {**server.channel._answers, Decline.event: counted}
            nodes = [Node(server.url, data, name=name, directory=tmp_path / name) for name, data in clients().items()]
            working = [asyncio.create_task(node.start_async()) for node in nodes]
            await closed[1].wait()
            began = now()
            assert (await rude.comes(session)).startswith("40/fl,")
            flooding = asyncio.create_task(rude.flood())
            assert await rude.told() == "more than 100 messages a second, or as much in bytes: what comes beyond is read later"
            then = server.drive.state.round
            await closed[then + 20].wait()
            seconds, count = now() - began, heard
            flooding.cancel()
            await asyncio.wait([flooding])
            rude.writer.transport.abort()
            server.stop()
            history, *_ = await asyncio.gather(running, *working)
        return history, count, seconds, then

    history, heard, seconds, then = asyncio.run(asyncio.wait_for(together(), 60))
    assert BURST < heard <= BURST + RATE * seconds + 1
    assert all(row["answered"] == ["node-0", "node-1", "node-2"] for row in history["rounds"])
    alone = simulate(plan(plan={"rounds": len(history["rounds"])}), clients())
    assert len(history["rounds"]) >= then + 20
    assert history["last"] == alone.digest
    say(f"20 rounds and more beside a flood: {seconds:.1f} s in all, {heard} of its messages were read")


def test_who_has_nothing_left_is_put_off(tmp_path):
    """Uploads and handshakes are of the same allowance as messages."""

    async def together() -> str:
        async with served(tmp_path, minimum=1) as (server, _, session):
            rude = Rude(server)
            await rude.comes(session)
            while not server.drive.state.asked:
                await asyncio.sleep(0)
            body = [memoryview(b"what was signed")]
            envelope = seal(rude.identity, Address(server.run, 1, 1, rude.identity.node), server.plan.digest, body)
            appender = HttpAppender(server.url, session)
            with pytest.raises(RefusedError, match="isn't what its envelope says"):
                await appender.append(envelope, [memoryview(b"what was not 12")])
            flooding = asyncio.create_task(rude.flood())
            await rude.told()
            with pytest.raises(UnreachableError, match="HTTP 429: the node has begun too many uploads: try again in 1 s"):
                await appender.append(envelope, body)
            first = rude.writer
            answer = await rude.comes(session)
            flooding.cancel()
            await asyncio.wait([flooding])
            for one in (first, rude.writer):
                one.transport.abort()
            stranger = Rude(server)
            assert "another node of this run" in await stranger.comes(session), "who never came in has nothing counted against it"
            stranger.writer.transport.abort()
            return answer

    answer = asyncio.run(asyncio.wait_for(together(), 60))
    said = json.loads(answer.removeprefix("44/fl,"))
    assert said["data"] == {"again": True}
    assert said["message"].startswith("the node comes and goes too often: come back in")


def test_who_waits_has_it_all_again():
    pace = Pace(0.0)
    assert pace.take(BURST, 0.0) == 0
    assert pace.spare(1, 0.0) == pytest.approx(0.01)
    assert pace.spare(1, 0.02) == 0, "what is refused costs nothing"
    assert pace.take(BURST, 3600.0) == 0
