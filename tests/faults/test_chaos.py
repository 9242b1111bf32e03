"""Everything at once: processes killed in mid-round, over a network that is late, narrow, cut and silently dead; no bit changes.

The short form is part of the tests; `make soak` runs the long one, and kills the broker, too. A failure names its seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.faults.weather import Weather
from tests.federation import plan, rows, say

from atoll.logs import broker
from atoll.plan import Plan
from atoll.simulate import simulate


class Chaos:
    """A run whose parts die and come back.

    Args:
        agreed: its plan.
        place: where everything lies.
        seed: of what happens when.
        nodes: how many.
        kill_broker: what kills Kafka and starts it again, if that is to happen.
    """

    def __init__(self, agreed: Plan, place: Path, seed: int, nodes: int, kill_broker: Callable[[], None] | None = None) -> None:
        self.place, self.random, self.kill_broker = place, random.Random(seed), kill_broker
        self.rounds, self.port = agreed.plan.rounds, broker.free_port()
        kinds = ["nothing", "node", "server", "node", *(["broker"] if kill_broker else ["server"]), "nothing"]
        self.strikes = [kinds[k % len(kinds)] for k in range(self.rounds - 1)]
        self.random.shuffle(self.strikes)
        self.weather = Weather(seed)
        self.data = {f"node-{k}": rows(k) for k in range(nodes)}
        self.nodes: dict[str, Process] = {}
        self.dead: dict[str, int] = {"server": 0, "node": 0, "broker": 0}
        self.plan = place / "plan.json"
        self.plan.write_text(agreed.to_json())
        for name, (x, y) in self.data.items():
            np.savez(place / f"{name}.npz", x=x, y=y)

    async def start(self, name: str, *words: str | Path, out: int = DEVNULL) -> Process:
        with (self.place / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", "atoll", *map(str, words)]
            return await asyncio.create_subprocess_exec(*command, stdout=out, stderr=log, limit=1 << 24)

    async def join(self, name: str, url: str) -> None:
        words = ["join", url, "--data", self.place / f"{name}.npz", "--name", name, "--dir", self.place / name, "--json"]
        self.nodes[name] = await self.start(name, *words)

    async def kill_node(self, url: str) -> None:
        """Kill a node and start it again."""
        name = self.random.choice(sorted(self.nodes))
        with contextlib.suppress(ProcessLookupError):
            self.nodes[name].kill()
        await self.nodes[name].wait()
        self.dead["node"] += 1
        await self.join(name, url)

    async def strike(self, server: Process, url: str) -> bool:
        """Let something happen, a moment from now; return whether the server is dead."""
        what = self.strikes.pop()
        await asyncio.sleep(self.random.uniform(0, 0.2))
        if what == "node":
            await self.kill_node(url)
        elif what == "server":
            server.kill()
            self.dead["server"] += 1
        elif what == "broker":
            self.dead["broker"] += 1
            await asyncio.to_thread(self.kill_broker or (lambda: None))
        return what == "server"

    async def serve(self, number: int, url: str) -> Mapping[str, Any] | None:
        """Serve until killed, or to the end: return the history then."""
        words = ["serve", self.plan, "--port", str(self.port), "--store", self.place / "store", "--json"]
        server = await self.start("server", *words, *(["--resume"] if number else []), out=PIPE)
        assert server.stdout
        event: dict[str, Any] = {}
        try:
            async for line in server.stdout:
                event = json.loads(line)
                if event["what"] == "listening" and not self.nodes:
                    await asyncio.gather(*(self.join(name, url) for name in self.data))
                if event["what"] == "asked":
                    self.weather.fair = event["round"] == self.rounds  # so that goodbyes get through
                    if self.strikes and len(self.strikes) + event["round"] >= self.rounds and await self.strike(server, url):
                        return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                server.kill()
            await server.wait()
        assert event.get("what") == "history", (self.place / "server.log").read_text()
        return event

    async def run(self) -> Mapping[str, Any]:
        """Go on with one server after the other until the run is over, and every node has ended by itself."""
        try:
            async with self.weather.over(self.port) as url:
                number = 0
                while (history := await self.serve(number, url)) is None:
                    number += 1
                codes = await asyncio.wait_for(asyncio.gather(*(node.wait() for node in self.nodes.values())), 60)
                assert codes == [0] * len(codes), self.logs()
                return history
        finally:
            for node in self.nodes.values():
                with contextlib.suppress(ProcessLookupError):
                    node.kill()
                await node.wait()

    def logs(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"{path.name}: {path.read_text()[-500:]}" for path in sorted(self.place.glob("*.log")))


def survives(
    place: Path, seed: int, nodes: int, rounds: int, patience: float, kafka: str | None, kill: Callable[[], None] | None = None
) -> None:
    agreed = plan(
        plan={"rounds": rounds},
        training={"learning_rate": 0.1},
        aggregation={"rule": "scaffold"},  # nodes remember: what they forget, or remember twice, changes bits
        cohort={"minimum": nodes, "quorum": 1.0, "deadline": 600},
        log={"kafka": kafka, "prefix": f"{place.name}."},
    )
    chaos = Chaos(agreed, place, seed, nodes, kill)
    try:
        history = asyncio.run(asyncio.wait_for(chaos.run(), patience))
    except TimeoutError:
        raise AssertionError(f"seed {seed}: it hangs\n{chaos.logs()}") from None
    weather = chaos.weather
    say(f"seed {seed}: {chaos.dead} killed, {weather.cut} connections cut, {weather.swallowed} bytes swallowed")
    assert [row["round"] for row in history["rounds"]] == list(range(1, rounds + 1)), f"seed {seed}"
    assert all(len(row["answered"]) == nodes for row in history["rounds"]), f"seed {seed}"
    assert history["last"] == simulate(agreed, chaos.data).digest, f"seed {seed}"
    assert all((chaos.dead["server"], chaos.dead["node"], weather.cut)), f"seed {seed}: nothing happened"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("log", ["embedded", "kafka"])
def test_a_few_rounds_of_chaos(tmp_path, log, request):
    kafka = request.getfixturevalue("kafka") if log == "kafka" else None
    survives(tmp_path, seed=1, nodes=4, rounds=8, patience=200, kafka=kafka)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("log", ["embedded", "kafka"])
def test_two_hundred_rounds_of_chaos(tmp_path, log):
    seed = int(os.environ.get("ATOLL_SEED", random.SystemRandom().randrange(1 << 30)))
    if log == "embedded":
        survives(tmp_path, seed, nodes=10, rounds=200, patience=3500, kafka=None)
        return
    place = tmp_path / "broker"
    running = broker.start(place, report=print)

    def kill() -> None:
        if found := broker.status(place):
            os.kill(found.pid, signal.SIGKILL)
        while broker.status(place):
            pass
        broker.start(place, report=print)

    try:
        survives(tmp_path, seed, nodes=10, rounds=200, patience=3500, kafka=running.address, kill=kill)
    finally:
        broker.stop(place)
