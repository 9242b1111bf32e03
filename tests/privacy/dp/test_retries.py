"""A try of a round that let something out is charged, however the round went on: at the server, and in each node's ledger."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.federation import clients, plan

import atoll
from atoll import method
from atoll.errors import PrivacyError
from atoll.messages import Decline, StartTraining
from atoll.node import events
from atoll.node.runtime import Node
from atoll.plan import Plan
from atoll.privacy.dp.account import account
from atoll.server.runtime import Server
from atoll.store.ledger import Ledger

UNIFORM = {"options": {"weighted": False}}
NOISE = {"multiplier": 3.0, "delta": 1e-5}


class Late(Node):
    """A node that declines its first task, once the others' updates are in."""

    others: asyncio.Event

    async def start_training(self, task: StartTraining) -> None:
        if task.attempt == 1 and task.round == 1:
            await self.others.wait()
            await self.channel.say(Decline(run=task.run, round=1, attempt=1, reason="not yet"))
        else:
            await super().start_training(task)


class Wavering(Node):
    """A node that masks its first update, and declines before anything is revealed."""

    async def _answer(self, command: events.Answer) -> None:
        task = command.task
        if (task.attempt, task.round, command.phase) == (1, 1, "survivors"):
            await self.channel.say(Decline(run=task.run, round=1, attempt=1, reason="not so"))
        else:
            await super()._answer(command)


def run(agreed: Plan, place: Any, kind: type[Node]) -> dict[str, Any]:
    """A run of three nodes, the last one of this kind."""
    sent = set()

    async def together() -> dict[str, Any]:
        server = Server(agreed, store=place / "store", port=0)
        others = asyncio.Event()

        def watch(name: str, event: Any) -> None:
            sent.update([name] if event["what"] == "sent" else ())
            if len(sent) == 2:
                others.set()

        nodes = []
        for number, (name, data) in enumerate(clients().items()):
            told = {"watch": lambda event, name=name: watch(name, event)} if number < 2 else {}
            nodes.append((Node if number < 2 else kind)(server.url, data, name=name, directory=place / name, **told))
        nodes[-1].others = others
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))
        return history

    return asyncio.run(asyncio.wait_for(together(), 60))


def ledger(place: Any, name: str) -> list[tuple[int, int, float]]:
    kept = Ledger(place / name)
    found = [(one["round"], one["attempt"], one["epsilon"]) for one in kept.entries()]
    kept.close()
    return found


def test_what_was_revealed_and_repeated_is_charged_twice_at_server_and_node(tmp_path):
    agreed = plan(privacy={"clip": 1.0, "local_noise": NOISE}, plan={"rounds": 2})
    history, mine = run(agreed, tmp_path, Late), account(agreed)
    assert [row["attempt"] for row in history["rounds"]] == [2, 1]
    assert [row["epsilon"] for row in history["rounds"]] == [mine.spent(2), mine.spent(3)]
    three = [(1, 1, mine.spent(1)), (1, 2, mine.spent(2)), (2, 1, mine.spent(3))]
    assert ledger(tmp_path, "node-0") == ledger(tmp_path, "node-1") == three
    assert ledger(tmp_path, "node-2") == [(1, 2, mine.spent(1)), (2, 1, mine.spent(2))]


def test_a_budget_is_of_releases_not_of_rounds(tmp_path):
    """Two releases are allowed: the repeated first round takes both, and the run ends with it."""
    noise = {**NOISE, "budget": (account(plan(privacy={"clip": 1.0, "local_noise": NOISE})).spent(2) + 1e-6)}
    agreed = plan(privacy={"clip": 1.0, "local_noise": noise}, plan={"rounds": 5})
    history = run(agreed, tmp_path, Late)
    assert len(history["rounds"]) == 1
    assert "privacy budget is spent" in history["reason"]


def test_a_masked_update_that_nobody_unmasked_is_charged_where_it_left(tmp_path):
    """The node can't know what becomes of it; the server counts the sums that it learned."""
    agreed = plan(
        privacy={"secure_aggregation": True, "clip": 1.0, "distributed_noise": NOISE}, aggregation=UNIFORM, plan={"rounds": 2}
    )
    history, mine = run(agreed, tmp_path, Wavering), account(agreed)
    assert [row["attempt"] for row in history["rounds"]] == [2, 1]
    assert [row["epsilon"] for row in history["rounds"]] == [mine.spent(1), mine.spent(2)]
    three = [(1, 1, mine.spent(1)), (1, 2, mine.spent(2)), (2, 1, mine.spent(3))]
    for name in clients():
        assert ledger(tmp_path, name) == three


def test_a_release_that_falls_short_of_survivors_is_refused():
    agreed = plan(privacy={"secure_aggregation": True, "clip": 1.0, "distributed_noise": NOISE}, aggregation=UNIFORM)
    mine = account(agreed)
    assert method.noise(agreed, mine, method.Round(1, 1, 4, 4, 3), [])["multiplier"] == 3.0
    with pytest.raises(PrivacyError, match="noise of 2 nodes falls short of the promise: it takes 3; nothing is released"):
        method.noise(agreed, mine, method.Round(1, 1, 4, 4, 2), [])


def test_a_simulation_counts_its_rounds_too():
    agreed = plan(privacy={"clip": 1.0, "local_noise": NOISE})
    assert [one["epsilon"] for one in atoll.simulate(agreed, clients()).rounds] == [account(agreed).spent(k) for k in (1, 2, 3)]
