"""`kill -9` of a node in each phase of a secure round: the run goes on, and its models are the plain sums of who is in them."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import numpy as np
import pytest
from tests.federation import clients, plan
from tests.plain_sums import BOUNDED, models, of_history
from tests.server.test_retention import replayed

from atoll.messages import UPDATE, StartTraining
from atoll.node.runtime import Node
from atoll.server.runtime import Server

DYING = """
import os, signal, sys
import numpy as np
from atoll.node.runtime import Node

url, place, phase = sys.argv[1:]

class Dying(Node):
    async def _answer(self, command):
        self.dies(command.phase)
        await super()._answer(command)

    async def _protect(self, command):
        self.dies("update")
        await super()._protect(command)

    async def send_updates(self, command):
        self.dies("sending")
        await super().send_updates(command)

    def dies(self, where):
        if where == phase:
            os.kill(os.getpid(), signal.SIGKILL)

rows = np.load(f"{place}/rows.npz")
Dying(url, (rows["x"], rows["y"]), name="node-3", directory=place).start()
"""
LATER = ("survivors", "unmask")
"""Phases after a node's update is in."""


class Waiting(Node):
    """A node that trains only while the one that dies is here, so that it is asked again soon."""

    here: asyncio.Event

    async def start_training(self, task: StartTraining) -> None:
        await self.here.wait()
        await super().start_training(task)


@pytest.mark.parametrize(
    ("phases", "quorum"),
    [(("keys", "shares", UPDATE, *LATER), 0.75), (("sending",), 1.0)],
    ids=["others go on", "all are waited for"],
)
def test_a_node_is_killed_in_each_phase_and_started_again(tmp_path, phases, quorum):
    rounds = 2 * len(phases) + 1
    cohort = {"minimum": 3, "quorum": quorum, "grace": 0.3, "deadline": 60}
    agreed, data, died = plan(plan={"rounds": rounds}, privacy=BOUNDED, cohort=cohort), clients(4), dict[str, int]()
    (tmp_path / "node-3").mkdir()
    np.savez(tmp_path / "node-3" / "rows.npz", x=data["node-3"][0], y=data["node-3"][1])

    async def together() -> dict[str, Any]:
        here, asked = asyncio.Event(), [0]

        def watch(event: dict[str, Any]) -> None:
            if event["what"] == "joined" and event["name"] == "node-3":
                here.set()
            if event["what"] == "asked" and len(event["nodes"]) == 4:
                asked[0] = event["round"]

        server = Server(agreed, store=tmp_path / "store", port=0, watch=watch)
        nodes = [Waiting(server.url, data[name], name=name, directory=tmp_path / name) for name in list(data)[:3]]
        for node in nodes:
            node.here = here

        async def victim() -> int:
            for phase in (*phases, "never"):
                words = [sys.executable, "-c", DYING, server.url, str(tmp_path / "node-3"), phase]
                process = await asyncio.create_subprocess_exec(*words)
                code = await process.wait()
                here.clear()
                died[phase] = asked[0]
            return code

        dying = asyncio.create_task(victim())
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))
        assert await dying == 0
        return history

    history = asyncio.run(asyncio.wait_for(together(), 100))
    assert history["outcome"] == "completed", history["reason"]
    assert [row["attempt"] for row in history["rounds"]] == [1] * rounds, "a round was tried again"
    answered = {row["round"]: row["answered"] for row in history["rounds"]}
    for phase in phases:
        assert ("node-3" in answered[died[phase]]) == (phase in (*LATER, "sending")), phase
    found = [row["model"] for row in history["rounds"]]
    assert found == models(agreed, data, of_history(tmp_path / "store", history)), "it isn't the plain sum of who is in it"
    assert replayed(tmp_path / "store", history["run"]) == found
