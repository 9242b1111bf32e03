"""Models on their way: broken off and resumed, onto a disk that fills, and in little memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from tests.faults.weather import relayed
from tests.federation import atoll, events, plan

from atoll.cli.bench.rounds import ROLE, Anonymous, Noise, spawned
from atoll.node.runtime import Node
from atoll.server.runtime import Server

PARAMETERS = 2_000_000
MODEL = 4 * PARAMETERS
ROWS = (np.zeros((1, 4)), np.zeros(1))


class Wire:
    """A TCP relay that counts what passes, and breaks off the first connection that carries so many bytes in one direction."""

    def __init__(self, up: int, down: int) -> None:
        self.limits, self.passed = {"up": up, "down": down}, {"up": 0, "down": 0}
        self.cut: list[str] = []

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        here = 0
        while data := await reader.read(1 << 16):
            here += len(data)
            self.passed[way] += len(data)
            writer.write(data)
            await writer.drain()
            if way not in self.cut and here > self.limits[way]:
                self.cut.append(way)
                raise ConnectionError
        writer.write_eof()

    def to(self, port: int) -> contextlib.AbstractAsyncContextManager[str]:
        return relayed(port, lambda up, down: asyncio.gather(self.relay(*up, "up"), self.relay(*down, "down")))


@pytest.mark.parametrize("log", ["embedded", "kafka"])
def test_what_broke_off_goes_on_where_it_was(tmp_path, log, request):
    broker = request.getfixturevalue("kafka") if log == "kafka" else None
    agreed = plan(plan={"rounds": 1}, cohort={"minimum": 1}, log={"kafka": broker, "prefix": f"{tmp_path.name}."})
    # The larger part of the model passes before the break: sent anew from its start, it would pass one and a half times.
    wire = Wire(up=MODEL // 4 * 3, down=MODEL // 4 * 3)

    async def together() -> dict:
        server = Server(agreed, store=tmp_path / "store", port=0, learner=Noise(PARAMETERS))
        async with wire.to(int(server.url.rpartition(":")[2])) as url:
            node = Node(url, ROWS, name="far", directory=tmp_path / "node", learner=Noise(PARAMETERS))
            history, _ = await asyncio.gather(server.serve_async(), node.start_async())
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    assert history["rounds"][0]["answered"] == ["far"]
    assert "down" in wire.cut
    assert wire.passed["down"] < 2.3 * MODEL, "the first model and the final one, each once, and what was on its way at the break"
    if log == "embedded":
        assert "up" in wire.cut
        assert wire.passed["up"] < 1.3 * MODEL


def test_a_disk_that_fills_in_mid_upload_loses_nothing(tmp_path):
    """The server may write no file beyond half an update: like a full disk it fails half-way, until there is room again."""
    inputs = 200_000
    sections = {"plan": {"rounds": 2}, "model": {"inputs": inputs}, "training": {"epochs": 1}, "cohort": {"minimum": 2}}
    (tmp_path / "plan.json").write_text(plan(**sections).to_json())
    x = np.random.default_rng(0).random((8, inputs), np.float32)
    said: list[str] = []

    async def join(url: str, server: int) -> None:
        def watch(event: Mapping[str, Any]) -> None:
            if event["what"] == "waiting":
                said.append(event["reason"])
                resource.prlimit(server, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        nodes = [Node(url, (x, x[:, 0] > 0.5), name=name, directory=tmp_path / name, watch=watch) for name in ("a", "b")]
        await asyncio.wait_for(asyncio.gather(*(node.start_async() for node in nodes)), 60)

    words = ["serve", tmp_path / "plan.json", "--port", "0", "--store", tmp_path / "store", "--json"]
    with atoll(*words, log=tmp_path / "server.log") as server:
        for event in events(server):
            if event["what"] == "listening":
                resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (2 * inputs, resource.RLIM_INFINITY))
                joined = threading.Thread(target=asyncio.run, args=(join(event["url"], server.pid),))
                joined.start()
        joined.join()
    assert "can't be written (File too large); free some space on the server" in said[0]
    assert event["what"] == "history"
    assert [row["answered"] for row in event["rounds"]] == [["a", "b"]] * 2
    assert not [refused for row in event["rounds"] for refused in row["refused"]]
    told = subprocess.run(
        [sys.executable, "-m", "atoll", "replay", "--store", tmp_path / "store"], check=False, capture_output=True, text=True
    )
    assert "all 2 rounds give the stored models" in told.stdout


def test_the_server_holds_two_models_whatever_the_number_of_nodes(tmp_path):
    nodes, parameters = 6, 10_000_000
    (tmp_path / "plan.json").write_text(plan(plan={"rounds": 2}, cohort={"minimum": nodes, "deadline": 60}).to_json())

    async def join(url: str) -> None:
        learner = Noise(parameters)
        mine = [Node(url, ROWS, name=f"n{k}", directory=tmp_path / f"n{k}", learner=learner) for k in range(nodes)]
        await asyncio.wait_for(asyncio.gather(*(node.start_async() for node in mine)), 90)

    closed = 0
    with spawned(ROLE, "server", str(tmp_path / "plan.json"), str(parameters), str(tmp_path / "store")) as server:
        for line in server.stdout:
            event = json.loads(line)
            if event["what"] == "listening":
                joined = threading.Thread(target=asyncio.run, args=(join(event["url"]),))
                joined.start()
            if event["what"] == "asked" and not closed:
                memory = Anonymous(server.pid)
            closed += event["what"] == "round"
        joined.join()
    assert closed == 2
    assert memory.peak - memory.first < 4 * 4 * parameters, "an accumulator, the next model, and what is on its way"
