"""Models that a node fetches: once, whoever asks, and never cut under somebody who is looking at one."""

from __future__ import annotations

import asyncio
import hashlib
from functools import partial

import aiohttp
import numpy as np
import pytest

from atoll.compression import Down, Press, stages
from atoll.logs import contents
from atoll.logs.bodies import Incoming
from atoll.node.download import Downloads
from atoll.vector import Group, Layout, Tensor
from atoll.wire import pack

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


@pytest.mark.parametrize("kind", ["true", "none", "rubbish", "another", "no_round", "endless", "empty", "first"])
def test_a_step_that_does_not_lead_to_the_model_is_made_up_for_by_the_whole(tmp_path, kind):
    """What a server, or whoever stands between, says is a step: only the model by its digest counts."""
    layouts = {"parameters": Layout((Tensor("kernel", (400,)),))}
    way = Down(Press(stages(["topk:0.1"]), 1, "down"))
    rng = np.random.default_rng(0)
    old, own = ({"parameters": Group(layouts["parameters"], rng.normal(size=400).astype(np.float32))} for _ in range(2))
    new, step = way.next(own, old, 3)
    assert step
    other = way.next({"parameters": own["parameters"].with_values(own["parameters"].values + 1)}, old, 3)[1]
    before, model = (b"".join(pack(one)) for one in (old, new))
    sent = {
        "true": b"".join(pack(step, {"round": "3"})), "rubbish": b"x" * 900, "another": b"".join(pack(other, {"round": "3"})),
        "no_round": b"".join(pack(step)), "endless": b"x" * 3000, "empty": b"",
    }.get(kind)  # fmt: skip
    asked = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(path := (await reader.readuntil(b"\r\n\r\n")).split()[1].decode())
        body = sent if "/from/" in path else model
        status = "200 OK" if body is not None else "404 Not Found"
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body or b'')}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + (body or b""))
        await writer.drain()
        writer.close()

    async def fetch() -> bytes:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, aiohttp.ClientSession() as session:
            followed = partial(way.followed, layouts=layouts)
            return bytes(await Downloads(url, tmp_path).get(session, goal, 2500, followed=followed))

    goal, first = (hashlib.sha256(one).hexdigest() for one in (model, before))
    if kind != "first":
        (tmp_path / f"{first}.safetensors").write_bytes(before)
    assert asyncio.run(asyncio.wait_for(fetch(), 20)) == model
    assert [path.name for path in tmp_path.iterdir()] == [f"{goal}.safetensors"]
    whole, by_step = f"/v1/models/{goal}", f"/v1/models/{goal}/from/{first}"
    assert asked == {"true": [by_step], "first": [whole]}.get(kind, [by_step, whole])
