"""Secure aggregation by one line of the plan: deployed and simulated, with nodes lost in each phase."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from tests.federation import clients, plan, run
from tests.plain_sums import BOUNDED, models
from tests.server.test_retention import replayed

from atoll.errors import PlanError, RefusedError
from atoll.keys import Identity
from atoll.messages import StartTraining
from atoll.node import events
from atoll.node.runtime import Node
from atoll.server.events import Declined
from atoll.server.runtime import Server
from atoll.simulate import simulate
from atoll.simulate.linked import Linked
from atoll.store.sql import SqlStore
from atoll.wire import Address

SECURE = {"secure_aggregation": True}
PHASES = ("keys", "shares", "update", "survivors", "unmask")


def test_counts_in_bins_are_added_up_and_no_node_says_which_it_has(tmp_path):
    asked = {"metrics": ["auc", "ece", "f1_macro", "brier"]}
    history, plain = run(plan(privacy=SECURE, model=asked), clients(), tmp_path), simulate(plan(model=asked), clients())
    assert history["outcome"] == "completed", history["reason"]
    for ours, theirs in zip(history["rounds"][:-1], plain.rounds[1:], strict=True):
        assert ours["nodes"] == pytest.approx(theirs["nodes"], rel=1e-6)
        assert {"auc", "ece", "f1_macro", "brier"} <= ours["nodes"].keys()
    store = SqlStore(tmp_path / "store")
    told = [row.metrics for row in store.updates(history["run"])]
    assert told
    assert not [name for one in told for name in one if name.startswith(("auc.", "chance.", "class."))]


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


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("quiet", ["", "keys", "shares", "survivors", "unmask"])
def test_the_models_are_those_of_plain_sums_of_the_same_updates(monkeypatch, quiet, bits):
    """To the last bit, also where a client of each round says nothing in a phase. Deployed: tests/faults/test_killed_nodes.py."""
    agreed, data, say = plan(privacy={**BOUNDED, "bits": bits}), clients(5), Linked.say

    def silent(self, command):
        gone = f"node-{self.tried[0]}" if command.phase == quiet else ""
        happened = say(self, replace(command, nodes=tuple(name for name in command.nodes if name != gone)))
        return [*happened, *([Declined(0.0, Address("simulated", *self.tried, gone), "quiet")] if gone else ())]

    monkeypatch.setattr(Linked, "say", silent)
    found = simulate(agreed, data).rounds
    for number, row in enumerate(found, 1):
        in_it = [name for name in data if name != f"node-{number}" or quiet not in ("keys", "shares")]
        assert row["answered"] == in_it
    rounds = [(4 if quiet == "keys" else 5, row["answered"]) for row in found]
    assert [row["model"] for row in found] == models(agreed, data, rounds)


def test_16_bits_are_for_so_many_nodes_and_no_more():
    few = plan(privacy={**BOUNDED, "bits": 16}, cohort={"minimum": 130})
    with pytest.raises(
        PlanError, match=r"privacy\.bits: in a sum of 130 nodes, 16 bits leave less than 8 to each; take bits = 32"
    ):
        simulate(few, clients(130))
    exact, coarse = (simulate(plan(privacy={**BOUNDED, "bits": bits}), clients()).rounds for bits in (64, 16))
    assert coarse[-1]["nodes"]["loss"] == pytest.approx(exact[-1]["nodes"]["loss"], rel=0.02)
    assert exact[0]["bytes"] - coarse[0]["bytes"] == pytest.approx(3 * 5 * 6, abs=12), "6 bytes a number less; headers differ"


def near(predictions: Any, y: Any) -> dict[str, float]:
    """A metric of one's own."""
    return {"near": float((abs(predictions.reshape(len(y)) - y) < 1).sum())}


def test_metrics_by_name_and_of_ones_own_are_added_up_under_the_masks():
    judged = {"logistic": True, "inputs": 4, "metrics": ["auc", "ece", "f1_macro", "tests.test_secure:near"]}
    hidden, plain = (
        simulate(plan(model=judged, privacy=privacy), clients(), allow=["tests.test_secure:near"]) for privacy in (SECURE, {})
    )
    for ours, theirs in zip(hidden.rounds, plain.rounds, strict=True):
        assert {"near", "auc", "ece", "f1_macro"} <= ours["nodes"].keys()
        assert ours["nodes"] == pytest.approx(theirs["nodes"], rel=1e-6)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"cohort": {"minimum": 2}}, "raise cohort.minimum to 3"),
        ({"cohort": {"minimum": 3, "buffer": 3}}, "leave cohort.buffer out"),
        ({"cohort": {"minimum": 1, "cycle": 3}}, "leave cohort.cycle out"),
        ({"cohort": {"minimum": 3, "draw": "poisson"}}, "leave one of them out"),
        ({"checks": {"norm": 5.0}}, "privacy.clip"),
        ({"compression": {"up": ["8bit"]}}, "privacy.secure_aggregation only adds up"),
        ({"privacy": {"bits": 32}}, "give clip and largest_weight"),
        ({"privacy": {"bits": 16}}, "bits = 16 has room for numbers and weights of known size only"),
        ({"privacy": {"secure_aggregation": False, "corrupt": 1}}, "corrupt is of secure sums"),
        ({"privacy": {"roster": ["0" * 32] * 2}}, "names a node twice"),
        ({"privacy": {"corrupt": 3}}, "lower privacy.dropout or privacy.corrupt"),
        ({"aggregation": {"rule": "median"}}, "take a rule that only adds them up"),
    ],
)
def test_what_does_not_go_with_secure_sums_is_refused_with_its_mend(changed, said):
    with pytest.raises(PlanError, match=said):
        simulate(plan(**{**changed, "privacy": {**SECURE, **changed.get("privacy", {})}}), clients())


class Lost(Node):
    """A node that falls silent in a phase of the second round, and says nothing more but goodbye."""

    phase = ""
    all_here: asyncio.Event

    async def start_training(self, task: StartTraining) -> None:
        await self.all_here.wait()
        if task.round < 3:
            await super().start_training(task)

    async def _answer(self, command: events.Answer) -> None:
        if (command.task.round, command.phase) != (2, self.phase):
            await super()._answer(command)

    async def _protect(self, command: events.Protect) -> None:
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


def test_only_the_nodes_of_the_roster_come_in(tmp_path):
    """That nodes take no others' keys, whatever a server shows them, is in tests/attacks/test_lies_of_a_server.py."""
    data = clients(4)
    roster = [Identity.at(tmp_path / name / "node.key").node for name in list(data)[:3]]
    agreed = plan(plan={"rounds": 2}, privacy={**SECURE, "roster": roster})

    async def together() -> dict[str, Any]:
        server = Server(agreed, store=tmp_path / "store", port=0)
        *nodes, stranger = [Node(server.url, one, name=name, directory=tmp_path / name) for name, one in data.items()]
        serving = asyncio.create_task(server.serve_async())
        with pytest.raises(RefusedError, match="not in the plan's roster"):
            await stranger.start_async()
        history, *_ = await asyncio.gather(serving, *(node.start_async() for node in nodes))
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    assert [row["answered"] for row in history["rounds"]] == [["node-0", "node-1", "node-2"]] * 2
