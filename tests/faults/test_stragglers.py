"""Slow nodes over real sockets: rounds don't wait for them, and what they send counts later, with the weight of its lateness."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.federation import atoll, clients, events, plan, rows

from atoll import learners
from atoll.errors import PlanError
from atoll.keys import Identity
from atoll.learner import Rows
from atoll.logs.broker import free_port
from atoll.node.events import Append
from atoll.node.runtime import Node
from atoll.plan import Plan
from atoll.server import machine
from atoll.server.events import Joined, Task, Train
from atoll.server.resume import unfinished
from atoll.server.runtime import Server
from atoll.simulate import simulate
from atoll.store import NodeRow, RoundRow, RunRow, UpdateRow
from atoll.store.models import Models
from atoll.store.sql import SqlStore
from atoll.wire import Address, decode

QUORUM = {"minimum": 3, "quorum": 0.67, "grace": 0, "deadline": 60}
"""Of four nodes three close a round."""


class Gated(Node):
    """A node that sends an update when it may: `may(round)` waits until then."""

    may: Callable[[int], Awaitable[object]]

    async def send_updates(self, command: Append) -> None:
        await self.may(command.task.round)
        await super().send_updates(command)


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


def gated(server: Server, place: Path, gates: dict[str, Callable[[int], Awaitable[object]]]) -> list[Gated]:
    nodes = []
    for name, data in clients(len(gates)).items():
        node = Gated(server.url, data, name=name, directory=place / name)
        node.may = gates[name]
        nodes.append(node)
    return nodes


def replayed(store: Path, rounds: int) -> None:
    command = [sys.executable, "-m", "atoll", "replay", "--store", store]
    told = subprocess.run(command, check=False, capture_output=True, text=True)
    assert f"all {rounds} rounds give the stored models" in told.stdout, told.stderr


def test_a_slow_nodes_update_counts_in_the_next_round_with_the_weight_of_its_lateness(tmp_path):
    """Round 2 closes with three of four; in round 3 node-3's update for round 2 comes first, and node-2 sends none."""
    agreed = plan(plan={"rounds": 3}, cohort=QUORUM)
    seen: list[dict[str, Any]] = []

    async def together() -> dict[str, Any]:
        server = Server(agreed, store=tmp_path / "store", port=0)
        serving = asyncio.create_task(server.serve_async())
        await until(lambda: hasattr(server.drive, "state"))

        def gate(last: float) -> Callable[[int], Awaitable[object]]:
            async def wait(round_: int) -> None:
                run = server.drive
                if round_ == 1:
                    await until(lambda: len(run.state.present) == 4)
                elif round_ > last:
                    await until(serving.done)
                elif round_ == last == 2:
                    await until(lambda: run.state.round == 3 and bool(run.state.cohort))
                    seen.append(server.status())
                elif round_ == 3:
                    await until(lambda: bool(run.state.answers))

            return wait

        *nodes, slow = gated(server, tmp_path, {f"node-{k}": gate(last) for k, last in enumerate((3, 3, 2.5, 2))})
        joined = [asyncio.create_task(node.start_async()) for node in nodes]
        await until(lambda: bool(server.drive.state.cohort))  # round 1 is the three others'
        history, *_ = await asyncio.gather(serving, slow.start_async(), *joined)
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    _, second, third = history["rounds"]
    assert (second["answered"], second["late"]) == (["node-0", "node-1", "node-2"], {})
    assert (third["answered"], third["late"], third["cohort"]) == (["node-0", "node-1", "node-3"], {"node-3": 1}, 4)
    (at_work,) = [node for node in seen[0]["nodes"] if node["name"] == "node-3"]
    assert (seen[0]["round"], at_work["round"], at_work["doing"]) == (3, 2, "training")
    assert "node-3 (since round 2)" in seen[0]["waiting_for"]

    store, layouts = SqlStore(tmp_path / "store"), learners.build(agreed).layouts
    rows_ = [one for one in store.updates(history["run"], 3) if one.status == "accepted"]
    assert [(one.round, one.folded) for one in rows_] == [(3, None), (3, None), (2, 3)]
    log, models = tmp_path / "store" / "log" / history["run"], Models(tmp_path / "store" / "models")
    bodies = [next(log.glob(f"*-{one.digest}.safetensors")).read_bytes() for one in rows_]
    started = (second["model"], second["model"], history["rounds"][0]["model"])
    updates = [decode(body, layouts, model) for body, model in zip(bodies, started, strict=True)]
    before, after = models.get(second["model"], layouts), models.get(third["model"], layouts)
    for name in layouts:
        scaled = [one.weight * one.groups[name].values for one in updates]
        step = (scaled[0] + scaled[1] + scaled[2] / math.sqrt(2)) / sum(one.weight for one in updates)
        np.testing.assert_allclose(after[name].values, before[name].values + step, rtol=1e-12)
    replayed(tmp_path / "store", 3)


def test_with_a_buffer_no_round_waits_for_the_slow_one_and_the_run_converges(tmp_path):
    """Two of four updates close a round; one node sends only when three more rounds are closed."""
    agreed = plan(plan={"rounds": 12}, cohort={"minimum": 2, "buffer": 2, "deadline": 60})

    async def together() -> dict[str, Any]:
        server = Server(agreed, store=tmp_path / "store", port=0, holdout=Rows(*rows(9)))
        serving = asyncio.create_task(server.serve_async())

        async def slow(round_: int) -> None:
            await until(lambda: server.drive.state.round >= round_ + 3 or serving.done())

        async def quick(round_: int) -> None:
            here = 3 if round_ == 1 else 4
            await until(lambda: len(server.drive.state.present) >= here or serving.done())

        async def joined(node: Node) -> None:
            """The slow one comes once round 1 is over, which opens with the first two and would be left with it."""
            await until(lambda: node.name != "node-2" or server.drive.state.round > 1)
            await node.start_async()

        gates = {"node-0": quick, "node-1": quick, "node-2": slow, "node-3": quick}
        history, *_ = await asyncio.gather(serving, *map(joined, gated(server, tmp_path, gates)))
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    assert (history["outcome"], len(history["rounds"])) == ("completed", 12)
    assert all(2 <= len(row["answered"]) == len(set(row["answered"])) <= 4 for row in history["rounds"])
    late = [row["late"]["node-2"] for row in history["rounds"] if "node-2" in row["late"]]
    assert late, "it counted, at least once"
    assert min(late) >= 3
    assert history["rounds"][-1]["holdout"]["accuracy"] > 0.9
    replayed(tmp_path / "store", 12)


class Flags:
    """What the nodes of a killed server wait for."""

    def __init__(self) -> None:
        self.begun, self.here, self.again, self.sent = (threading.Event() for _ in range(4))

    async def slow(self, round_: int) -> None:
        await until((self.here if round_ == 1 else self.again).is_set)

    async def quick(self, round_: int) -> None:
        await until((self.here if round_ < 3 else self.sent).is_set)

    def watch(self, event: Any) -> None:
        if event["what"] == "sent" and event["round"] == 2:
            self.sent.set()

    def join(self, url: str, place: Path) -> threading.Thread:
        async def joining() -> None:
            nodes = []
            for name, data in clients(4).items():
                slow = name == "node-3"
                node = Gated(url, data, name=name, directory=place / name, watch=self.watch if slow else None)
                node.may = self.slow if slow else self.quick
                nodes.append(node)
            others = [asyncio.create_task(node.start_async()) for node in nodes[:3]]
            await until(self.begun.is_set)  # round 1 is the three others'
            await asyncio.wait_for(asyncio.gather(nodes[3].start_async(), *others), 90)

        thread = threading.Thread(target=asyncio.run, args=(joining(),))
        thread.start()
        return thread


@pytest.mark.parametrize("log", ["embedded", "kafka"])
def test_killed_with_a_node_at_work_for_an_earlier_round_its_update_counts_as_it_would_have(tmp_path, log, request):
    """The server dies (kill -9) when round 3 has begun; node-3 still has the task of round 2, and its model."""
    broker = request.getfixturevalue("kafka") if log == "kafka" else None
    agreed = plan(plan={"rounds": 4}, cohort=QUORUM, log={"kafka": broker, "prefix": f"{tmp_path.name}."})
    (tmp_path / "plan.json").write_text(agreed.to_json())
    flags, told = Flags(), Counter[str]()
    words = ["serve", tmp_path / "plan.json", "--port", str(free_port()), "--store", tmp_path / "store", "--json"]
    with atoll(*words, log=tmp_path / "first.log") as server:
        for event in events(server):
            told[event["what"]] += 1
            if event["what"] == "listening":
                nodes = flags.join(event["url"], tmp_path)
            if told["joined"] == 4:
                flags.here.set()
            if told["asked"] == 1:
                flags.begun.set()
            if told["asked"] == 3:
                server.kill()
                break
    with atoll(*words, "--resume", log=tmp_path / "second.log") as server:
        back, history = Counter[str](), {}
        for history in events(server):
            back[history.get("what", "")] += 1
            if back["joined"] == 4:  # who is still on its way back when the run ends is told nothing
                flags.again.set()
    nodes.join()
    assert history.get("outcome") == "completed", (tmp_path / "second.log").read_text()
    assert [row["late"].get("node-3") for row in history["rounds"]][:3] == [None, None, 1]
    replayed(tmp_path / "store", 4)
    ledgers = [word for name in clients(4) for word in ("--ledger", tmp_path / name)]
    audited = subprocess.run(
        [sys.executable, "-m", "atoll", "audit", "verify", "--store", tmp_path / "store", *ledgers],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert "heads in 4 ledgers are its own" in audited.stdout, audited.stderr


def test_those_asked_beyond_what_is_needed_are_not_asked_in_vain():
    """Four are asked, two are needed: the other two answer a round late, and count there."""
    simulated = simulate(plan(plan={"rounds": 6}, cohort={"minimum": 2, "quorum": 0.5, "grace": 0}), clients(4))
    answers = [name for row in simulated.rounds for name in row["answered"]]
    assert all(len(row["answered"]) == 2 for row in simulated.rounds)
    assert {name: answers.count(name) for name in clients(4)} == dict.fromkeys(clients(4), 3)
    assert sum(len(row["late"]) for row in simulated.rounds) >= 4


def test_a_simulated_buffer_gives_the_same_bits_each_time_and_a_larger_client_is_later():
    agreed = plan(plan={"rounds": 10}, cohort={"minimum": 2, "buffer": 2})
    data = {**clients(3), "large": rows(9, 200)}
    first, second = (simulate(agreed, data) for _ in range(2))
    assert first.rounds == second.rounds
    late = {name: [row["late"][name] for row in first.rounds if name in row["late"]] for name in data}
    assert late["large"]
    assert max(late["large"]) > max(lateness for name in clients(3) for lateness in late[name])
    assert first.by_node["large"]["accuracy"] > 0.9


def test_a_buffer_that_can_not_be_is_one_clear_line(tmp_path):
    with pytest.raises(PlanError, match="buffer = 2 updates, and must not with fewer than minimum = 3; raise buffer"):
        plan(cohort={"minimum": 3, "buffer": 2})
    newton: Plan = plan(cohort={"minimum": 2, "buffer": 2}, aggregation={"rule": "newton"})
    with pytest.raises(PlanError, match=r"cohort\.buffer: 'newton' can fold no late update"):
        Server(newton, store=tmp_path, port=0)


def test_a_server_that_died_between_two_rounds_leaves_who_is_at_work_to_the_next(tmp_path):
    """Round 2 is closed, round 3 not begun: c works for round 2, d for round 1, b has declined, a has answered."""
    agreed = plan(cohort={"minimum": 2})
    store = SqlStore(tmp_path)
    store.begin_run(RunRow("r", "tiny", agreed.digest, agreed.to_json(), 0.0, "m0"))
    for node in "abcd":
        store.saw_node(NodeRow("r", node, f"name-{node}", "key", 0.0, 0.0))
    for number in (1, 2):
        row = RoundRow("r", number, 1, 0.0, 1.0, f"m{number}", f"m{number}", 3, 1, 8)
        store.close_round(row, [UpdateRow("r", number, 1, "a", "accepted", f"u{number}")], [])
    store.open_round("r", {"round": 2, "attempt": 1, "cohort": ["a", "b", "c"], "late": {"d": [1, 1]}})
    store.record_update(UpdateRow("r", 2, 1, "b", "declined", reason="no"))
    left = unfinished(store, agreed, Identity.new())
    store.close()
    assert left.past.tasks == {"c": Task(2, 1, "m1", 0.0), "d": Task(1, 1, "m0", 0.0)}
    assert left.open == {Address("r", 2, 1, "c"), Address("r", 1, 1, "d")}

    state, _ = machine.resume("r", agreed, left.past, 100.0)
    state, commands = machine.transition(state, Joined(101.0, {node: f"name-{node}" for node in "acd"}))
    asked = [(one.nodes, one.round, one.model, one.again) for one in commands if isinstance(one, Train)]
    assert asked == [(("c",), 2, "m1", True), (("d",), 1, "m0", True), (("a",), 3, "m2", False)]
    assert state.cohort == ("a", "c", "d")
