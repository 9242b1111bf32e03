"""A TCP relay between nodes and their server that behaves as networks do: late, narrow, cut off, or silently dead."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

Way = tuple[asyncio.StreamReader, asyncio.StreamWriter]
"""Where the bytes of one direction come from, and go to."""


@dataclass
class Line:
    """What becomes of one connection.

    Args:
        latency: seconds that every piece is late.
        rate: bytes a second.
        dies: seconds until it is cut off, if ever.
        silent: seconds before that in which it swallows everything.
    """

    latency: float
    rate: float
    dies: float | None = None
    silent: float = 0.0
    swallows: bool = False


class Weather:
    """A relay whose connections meet a fate drawn from a seed.

    Args:
        seed: of all fates.
        longest: the most seconds that a connection may be silently dead.
    """

    def __init__(self, seed: int, longest: float = 1.5) -> None:
        self._random, self._longest = random.Random(seed), longest
        self.fair = False
        self.cut = self.swallowed = 0

    def _fate(self) -> Line:
        draw = self._random
        line = Line(draw.uniform(0, 0.02), draw.uniform(2e5, 5e6))
        if not self.fair and draw.random() < 0.5:
            line.dies, line.silent = draw.uniform(0, 4), draw.choice([0.0, draw.uniform(0, self._longest)])
        return line

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: Line) -> None:
        while data := await reader.read(1 << 14):
            await asyncio.sleep(line.latency + len(data) / line.rate)
            if line.swallows:
                self.swallowed += len(data)
                continue
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    async def _end(self, line: Line) -> None:
        if line.dies is None:
            await asyncio.Event().wait()
        await asyncio.sleep(line.dies or 0)
        line.swallows = True
        await asyncio.sleep(line.silent)
        self.cut += 1
        raise ConnectionError

    @contextlib.asynccontextmanager
    async def over(self, port: int) -> AsyncIterator[str]:
        """Relay to a port for the time of the block; give the address that nodes connect to."""

        async def both(up: Way, down: Way) -> None:
            line = self._fate()
            ways = asyncio.gather(self._pass_on(*up, line), self._pass_on(*down, line))
            fate = asyncio.create_task(self._end(line))
            await asyncio.wait([ways, fate], return_when=asyncio.FIRST_COMPLETED)
            ways.cancel()
            fate.cancel()
            await asyncio.gather(ways, fate, return_exceptions=True)

        async with relayed(port, both) as url:
            yield url


@contextlib.asynccontextmanager
async def relayed(port: int, both: Callable[[Way, Way], Awaitable[object]]) -> AsyncIterator[str]:
    """Relay connections to a port for the time of the block; `both` carries each one's bytes up and down while it lasts."""

    async def meet(near: asyncio.StreamReader, near_end: asyncio.StreamWriter) -> None:
        ends = [near_end]
        with contextlib.suppress(OSError, asyncio.CancelledError):
            far, far_end = await asyncio.open_connection("127.0.0.1", port)
            ends.append(far_end)
            await both((near, far_end), (far, near_end))
        for end in ends:
            end.transport.abort()

    relay = await asyncio.start_server(meet, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{relay.sockets[0].getsockname()[1]}"
    finally:
        relay.close()
