"""Secure aggregation by one line of the plan: deployed and simulated, with nodes lost in each phase."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.federation import clients, plan, run
from tests.server.test_retention import replayed

from atoll.messages import StartTraining
from atoll.node import machine
from atoll.node.runtime import Node
from atoll.server.runtime import Server
from atoll.simulate import simulate

SECURE = {"secure_aggregation": True}
PHASES = ("keys", "shares", "update", "survivors", "unmask")


@pytest.mark.parametrize("log", ["embedded", "kafka"])
def test_one_line_of_the_plan_hides_every_update(tmp_path, log, request):
    broker = request.getfixturevalue("kafka") if log == "kafka" else None
    agreed = plan(privacy=SECURE, log={"kafka": broker, "prefix": f"{tmp_path.name}."})
    deployed, simulated = run(agreed, clients(), tmp_path), simulate(agreed, clients())
    assert [row["model"] for row in deployed["rounds"]] == [row["model"] for row in simulated.rounds], "not the same bits"
    assert replayed(tmp_path / "store", deployed["run"]) == [row["model"] for row in deployed["rounds"]]
    plain = simulate(plan(), clients())
    for ours, theirs in zip(simulated.rounds, plain.rounds, strict=True):
        assert ours["nodes"] == pytest.approx(theirs["nodes"], rel=1e-6)
    assert deployed["rounds"][0]["nodes"] == simulated.rounds[1]["nodes"]
    assert not any(row["by_node"] for row in deployed["rounds"]), "figures of single nodes are known"


class Lost(Node):
    """A node that falls silent in a phase of the second round, and says nothing more but goodbye."""

    phase = ""
    all_here: asyncio.Event

    async def start_training(self, task: StartTraining) -> None:
        await self.all_here.wait()
        if task.round < 3:
            await super().start_training(task)

    async def _answer(self, command: machine.Answer) -> None:
        if (command.task.round, command.phase) != (2, self.phase):
            await super()._answer(command)

    async def _protect(self, command: machine.Protect) -> None:
        if (command.task.round, "update") != (2, self.phase):
            await super()._protect(command)


@pytest.mark.parametrize("phase", PHASES)
def test_a_round_is_completed_without_a_node_that_is_lost_in_any_phase(tmp_path, phase):
    agreed = plan(privacy=SECURE, cohort={"minimum": 3, "quorum": 0.7, "grace": 0.5, "deadline": 30})
    said: list[str] = []

    async def together() -> dict[str, Any]:
        server = Server(agreed, store=tmp_path / "store", port=0)
        data = clients(4)
        nodes = [Node(server.url, data[name], name=name, directory=tmp_path / name) for name in list(data)[:3]]
        there = asyncio.Event()
        lost = Lost(
            server.url,
            data["node-3"],
            name="node-3",
            directory=tmp_path / "node-3",
            watch=lambda event: event["what"] == "connected" and there.set(),
        )
        lost.phase, lost.all_here = phase, asyncio.Event()

        async def look() -> None:
            while True:
                await asyncio.sleep(0.02)
                if hasattr(server.drive, "state"):
                    if len(server.drive.state.present) == 4:
                        lost.all_here.set()
                    said.append(server.status()["waiting_for"])

        looking, serving = asyncio.create_task(look()), asyncio.create_task(server.serve_async())
        joining = asyncio.create_task(lost.start_async())
        await there.wait()  # so that it is in the first round's cohort
        history, *_ = await asyncio.gather(serving, *(node.start_async() for node in nodes), joining)
        looking.cancel()
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    assert history["outcome"] == "completed"
    answered = [row["answered"] for row in history["rounds"]]
    everybody, others = [f"node-{k}" for k in range(4)], [f"node-{k}" for k in range(3)]
    assert answered[1:] == [everybody if phase in ("survivors", "unmask") else others, others]
    assert "node-3" in answered[0]
    assert history["rounds"][1]["attempt"] == 1, "the round was tried again"
    assert replayed(tmp_path / "store", history["run"]) == [row["model"] for row in history["rounds"]]
    assert any((f"({phase})" in line or phase == "update") and "node-3" in line for line in said), "status doesn't say what for"
