"""Models that a node fetches: once, whoever asks, and never cut under somebody who is looking at one."""

from __future__ import annotations

import asyncio
import hashlib

import aiohttp

from atoll.logs import contents
from atoll.logs.bodies import Incoming
from atoll.node.download import Downloads

MODEL = bytes(range(256)) * 4000
DIGEST = hashlib.sha256(MODEL).hexdigest()


def test_two_who_ask_for_the_same_model_at_once_get_one_file(tmp_path):
    """As when a run is stopped, and the final model is the very one that a round is fetching."""
    answered = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal answered
        await reader.readuntil(b"\r\n\r\n")
        answered += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(MODEL))
        writer.write(MODEL)
        await writer.drain()
        writer.close()

    async def both() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, aiohttp.ClientSession() as session:
            downloads = Downloads(url, tmp_path)
            got = await asyncio.gather(*(downloads.get(session, DIGEST, len(MODEL)) for _ in range(2)))
            assert [bytes(one) for one in got] == [MODEL] * 2

    asyncio.run(asyncio.wait_for(both(), 20))
    assert answered == 1


def test_what_is_written_anew_leaves_the_maps_of_what_was_there_whole(tmp_path):
    path = tmp_path / "model"
    path.write_bytes(MODEL)
    mapped = contents(path)
    incoming = Incoming(path, 0)
    incoming.write([b"other"])
    incoming.close()
    assert path.stat().st_nlink == 1
    assert path.read_bytes() == b"other"
    assert mapped.obj.size() == len(MODEL), "the file behind a map was cut: to look at it would end the process"  # type: ignore[attr-defined]
    assert bytes(mapped) == MODEL
