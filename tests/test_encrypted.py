"""Encrypted sums by one line of the plan: deployed over both logs, and simulated."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from tests.faults.test_recovery import killed
from tests.federation import clients, plan, run
from tests.server.test_retention import replayed

from atoll.errors import GaveUpError, PlanError
from atoll.messages import UPDATE
from atoll.node.runtime import Node
from atoll.privacy import ckks
from atoll.server.runtime import Server
from atoll.simulate import simulate

ENCRYPTED = {"encryption": True}


def test_one_line_of_the_plan_encrypts_every_update(tmp_path):
    history = run(plan(privacy=ENCRYPTED), clients(), tmp_path)
    assert history["outcome"] == "completed", history["reason"]
    plain = run(plan(), clients(), tmp_path / "plain")
    assert [row["answered"] for row in history["rounds"]] == [row["answered"] for row in plain["rounds"]]
    for ours, theirs in zip(history["rounds"][:-1], plain["rounds"][:-1], strict=True):
        assert ours["nodes"] == pytest.approx(theirs["nodes"], rel=1e-5)
        assert not ours["by_node"]


def test_a_simulation_goes_through_the_same(tmp_path):
    agreed = plan(privacy=ENCRYPTED)
    encrypted, plain = simulate(agreed, clients()), simulate(plan(), clients())
    for ours, theirs in zip(encrypted.rounds, plain.rounds, strict=True):
        assert ours["nodes"] == pytest.approx(theirs["nodes"], rel=1e-5)
        assert ours["answered"] == theirs["answered"]


class Leaving(Node):
    """A node that trains once all are here, and says nothing any more from one phase of the second round on."""

    leaves = ""
    all_here: asyncio.Event

    async def start_training(self, task):
        await self.all_here.wait()
        await super().start_training(task)

    async def _answer(self, command):
        if (command.phase, command.task.round) != (self.leaves, 2):
            await super()._answer(command)

    async def _protect(self, command):
        if (UPDATE, command.task.round) != (self.leaves, 2):
            await super()._protect(command)


def run_with_a_loss(agreed, place, phase: str, count: int = 4) -> dict[str, Any]:
    async def together() -> dict[str, Any]:
        here, all_here = set[str](), asyncio.Event()

        def watch(event: Mapping[str, Any]) -> None:
            if event["what"] == "joined":
                here.add(event["name"])
                if len(here) == count:
                    all_here.set()

        server = Server(agreed, store=place / "store", port=0, watch=watch)
        nodes = [Leaving(server.url, one, name=name, directory=place / name) for name, one in clients(count).items()]
        for node in nodes:
            node.all_here = all_here
        nodes[1].leaves = phase
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))
        return history

    return asyncio.run(asyncio.wait_for(together(), 60))


@pytest.mark.parametrize("phase", ["keys", "secrets", UPDATE, "survivors", "open"])
def test_a_node_that_is_lost_in_any_phase_costs_its_part_at_most(tmp_path, phase):
    cohort = {"minimum": 3, "quorum": 0.7, "grace": 0.3, "deadline": 20}
    history = run_with_a_loss(plan(privacy=ENCRYPTED, cohort=cohort), tmp_path, phase)
    assert history["outcome"] == "completed", history["reason"]
    names = set(clients(4))
    answered = set(history["rounds"][1]["answered"])
    assert answered == (names if phase in ("survivors", "open") else names - {"node-1"})
    assert [row["attempt"] for row in history["rounds"]] == [1, 1, 1], "a round was tried again"
    assert replayed(tmp_path / "store", history["run"]) == [row["model"] for row in history["rounds"]]


@pytest.mark.parametrize("lies", [{"node-0": 50.0}, {"node-1": math.inf}, {"node-0": 50.0, "node-1": 25.0}])
def test_opened_sums_must_agree(tmp_path, lies):
    class Lying(Node):
        async def _send_sum(self, task, opened):
            lie = np.float64(lies[self.name]).tobytes() if self.name in lies else opened[-8:]
            return await super()._send_sum(task, opened[:-8] + lie)

    async def together() -> Any:
        server = Server(plan(plan={"rounds": 2}, privacy=ENCRYPTED), store=tmp_path / "store", port=0)
        nodes = [Lying(server.url, one, name=name, directory=tmp_path / name) for name, one in clients().items()]
        served, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes), return_exceptions=True)
        return served

    found = asyncio.run(asyncio.wait_for(together(), 60))
    if len(lies) == 1:
        assert found["outcome"] == "completed"
        plain = simulate(plan(plan={"rounds": 2}), clients())
        assert found["rounds"][0]["nodes"] == pytest.approx(plain.rounds[1]["nodes"], rel=1e-5)
    else:
        assert isinstance(found, GaveUpError)
        assert "no 2 agree on what is in it" in str(found)
        assert "they reveal no sum over other nodes from this model" in str(found)


def test_few_open_for_all(tmp_path):
    cohort = {"minimum": 7, "quorum": 1.0, "grace": 0.3, "deadline": 20}  # more than open the sum
    history = run_with_a_loss(plan(plan={"rounds": 2}, privacy=ENCRYPTED, cohort=cohort), tmp_path, "", 7)
    assert history["outcome"] == "completed", history["reason"]
    assert [len(row["answered"]) for row in history["rounds"]] == [7, 7]


def test_by_kafka_as_well(tmp_path, kafka):
    history = run(plan(privacy=ENCRYPTED, log={"kafka": kafka}), clients(), tmp_path)
    assert history["outcome"] == "completed", history["reason"]
    plain = simulate(plan(), clients())
    assert replayed(tmp_path / "store", history["run"]) == [row["model"] for row in history["rounds"]]
    assert history["rounds"][-2]["nodes"] == pytest.approx(plain.rounds[-1]["nodes"], rel=1e-5)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"privacy": {**ENCRYPTED, "secure_aggregation": True}}, "leave one of them out"),
        ({"privacy": {**ENCRYPTED, "bits": 32}}, "bits is of secure_aggregation"),
        ({"privacy": ENCRYPTED, "cohort": {"minimum": 2}}, "privacy.encryption: of a sum of two"),
        ({"privacy": ENCRYPTED, "cohort": {"buffer": 3}}, "privacy.encryption adds up the updates of one cohort"),
        ({"privacy": ENCRYPTED, "compression": {"up": ["8bit"]}}, "privacy.encryption only adds up"),
        (
            {"privacy": {**ENCRYPTED, "clip": 1.0, "central_noise": {"epsilon": 8, "delta": 1e-5}}},
            "central_noise is the server's own, which would see the sums of encryption without it",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(changed, said):
    with pytest.raises(PlanError, match=said):
        plan(**changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"aggregation": {"rule": "median"}}, "'median' looks at single updates, and privacy.encryption hides them"),
        ({"cohort": {"minimum": 3}, "privacy": {**ENCRYPTED, "dropout": 0.7}}, "of 3 nodes 2 may drop out"),
    ],
)
def test_a_plan_that_nobody_can_open_is_refused_before_it_begins(tmp_path, changed, said):
    with pytest.raises(PlanError, match=said):
        Server(plan(**{"privacy": ENCRYPTED, **changed}), store=tmp_path, port=0)


def test_a_node_without_tenseal_says_so_when_it_joins(tmp_path, monkeypatch):
    ckks._seal.cache_clear()
    monkeypatch.setitem(sys.modules, "tenseal", None)
    try:
        with pytest.raises(PlanError, match=r"pip install 'atoll-fl\[tenseal\]'"):
            simulate(plan(privacy=ENCRYPTED), clients())
    finally:
        ckks._seal.cache_clear()


def test_updates_that_were_made_smaller_are_encrypted_as_they_are():
    made = {"compression": {"up": ["randomk:0.5"]}}
    encrypted, plain = simulate(plan(privacy=ENCRYPTED, **made), clients()), simulate(plan(**made), clients())
    for ours, theirs in zip(encrypted.rounds, plain.rounds, strict=True):
        assert ours["nodes"] == pytest.approx(theirs["nodes"], rel=1e-5)


def test_a_server_that_is_killed_when_nodes_open_a_sum_goes_on_with_it(tmp_path):
    """Right after the survivors, and then the sum, were asked for: nodes open one sum of a round."""
    agreed = plan(plan={"rounds": 3}, cohort={"quorum": 1.0, "deadline": 60}, privacy=ENCRYPTED)
    history, _ = killed(agreed, tmp_path, [("phase", 3), ("phase", 4)])
    assert history["outcome"] == "completed", history["reason"]
    assert all(len(row["answered"]) == 3 for row in history["rounds"])
    assert replayed(tmp_path / "store", history["run"]) == [row["model"] for row in history["rounds"]]
