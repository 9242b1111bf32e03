"""Servers killed at any instant: another one goes on where it was, nothing is lost or counted twice, and no bit changes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.federation import atoll, clients, events, plan, run
from tests.plain_sums import BOUNDED, models, of_history
from tests.server.test_retention import replayed

from atoll.errors import GaveUpError, PlanError, StoreError
from atoll.logs.broker import free_port
from atoll.messages import StartTraining
from atoll.node.runtime import Node
from atoll.plan import Plan
from atoll.server.runtime import Server
from atoll.simulate import simulate
from atoll.store.sql import SqlStore


class Counting(Node):
    """A node that counts how often it trains."""

    trained = 0

    def _work(self, task: StartTraining, body: bytes) -> str:
        self.trained += 1
        return super()._work(task, body)


def killed(agreed: Plan, place: Path, at: Sequence[tuple[str, int]], count: int = 3) -> tuple[dict[str, Any], list[Counting]]:
    """Run with servers of which each is killed when it has told of an event so many times; the last one ends the run."""
    (place / "plan.json").write_text(agreed.to_json())
    port = free_port()
    nodes: list[Counting] = []

    async def join(url: str) -> None:
        nodes.extend(Counting(url, data, name=name, directory=place / name) for name, data in clients(count).items())
        await asyncio.wait_for(asyncio.gather(*(node.start_async() for node in nodes)), 90)

    joined = None
    for number, (what, times) in enumerate([*at, ("history", 1)]):
        words = ["serve", place / "plan.json", "--port", str(port), "--store", place / "store", "--json"]
        told = 0
        with atoll(*words, *(["--resume"] if number else []), log=place / f"server-{number}.log") as server:
            for event in events(server):
                if event["what"] == "listening" and joined is None:
                    joined = threading.Thread(target=asyncio.run, args=(join(event["url"]),))
                    joined.start()
                told += event["what"] == what
                if told == times:
                    server.kill()
                    break
            else:
                raise AssertionError((place / f"server-{number}.log").read_text())
    assert joined
    joined.join()
    return event, nodes


@pytest.mark.parametrize("log", ["embedded", "kafka"])
def test_killed_and_resumed_a_run_ends_with_the_same_bits(tmp_path, log, request):
    broker = request.getfixturevalue("kafka") if log == "kafka" else None
    agreed = plan(
        plan={"rounds": 5}, cohort={"quorum": 1.0, "deadline": 60}, log={"kafka": broker, "prefix": f"{tmp_path.name}."}
    )
    # As soon as nodes are asked; right after a round is closed; after two more; before anybody is back.
    history, nodes = killed(agreed, tmp_path, [("asked", 1), ("round", 1), ("round", 2), ("listening", 1)])
    assert history["outcome"] == "completed"
    assert [row["round"] for row in history["rounds"]] == [1, 2, 3, 4, 5]
    assert all(len(row["answered"]) == 3 for row in history["rounds"])
    assert history["last"] == simulate(agreed, clients()).digest
    assert [node.trained for node in nodes] == [5, 5, 5], "what was trained is sent again, not trained again"
    replayed = subprocess.run(
        [sys.executable, "-m", "atoll", "replay", "--store", tmp_path / "store"], check=False, capture_output=True, text=True
    )
    assert "all 5 rounds give the stored models" in replayed.stdout, replayed.stderr
    ledgers = [word for name in clients() for word in ("--ledger", tmp_path / name)]
    audited = subprocess.run(
        [sys.executable, "-m", "atoll", "audit", "verify", "--store", tmp_path / "store", *ledgers],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert "heads in 3 ledgers are its own" in audited.stdout, audited.stderr


def test_updates_that_are_in_the_log_are_not_asked_for_again(tmp_path):
    """The server dies when two of three updates are in: the next one waits for the third only."""
    agreed = plan(plan={"rounds": 1}, cohort={"quorum": 1.0, "deadline": 60})

    class Late(Counting):
        go: asyncio.Event

        async def send_updates(self, command: Any) -> None:
            await self.go.wait()
            await super().send_updates(command)

    async def two_are_in(server: Server, serving: asyncio.Task[Any]) -> None:
        while not serving.done() and not (hasattr(server.drive, "state") and len(server.drive.state.accepted) >= 2):
            await asyncio.sleep(0.01)

    async def together() -> tuple[dict[str, Any], list[Counting]]:
        first = Server(agreed, store=tmp_path / "store", port=0)
        data = clients()
        nodes = [Counting(first.url, data[name], name=name, directory=tmp_path / name) for name in ("node-0", "node-1")]
        late = Late(first.url, data["node-2"], name="node-2", directory=tmp_path / "node-2")
        late.go = asyncio.Event()
        serving = asyncio.create_task(first.serve_async())
        work = [asyncio.create_task(node.start_async()) for node in (*nodes, late)]
        await two_are_in(first, serving)
        serving.cancel()  # no goodbye
        await asyncio.wait([serving])
        second = Server(agreed, store=tmp_path / "store", port=int(first.url.rpartition(":")[2]), resume=True)
        serving = asyncio.create_task(second.serve_async())
        await two_are_in(second, serving)
        late.go.set()
        history = await serving
        await asyncio.gather(*work)
        return history, [*nodes, late]

    history, nodes = asyncio.run(asyncio.wait_for(together(), 60))
    assert history["rounds"][0]["answered"] == ["node-0", "node-1", "node-2"]
    assert [node.trained for node in nodes] == [1, 1, 1]


def test_a_run_that_gave_up_goes_on_where_it_stopped(tmp_path):
    agreed = plan(plan={"rounds": 4}, cohort={"minimum": 3, "deadline": 2})

    async def alone() -> None:
        await Server(agreed, store=tmp_path / "store", port=0).serve_async()

    with pytest.raises(GaveUpError, match="0 of at least 3 nodes are here"):
        asyncio.run(alone())
    history = run(agreed, clients(), tmp_path, resume=True)
    assert (history["outcome"], len(history["rounds"])) == ("completed", 4)
    assert len(SqlStore(tmp_path / "store").runs()) == 1


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(StoreError, match="no run of this plan can go on"):
        Server(plan(), store=tmp_path, port=0, resume=True)
    run(plan(), clients(), tmp_path)
    with pytest.raises(StoreError, match=r"the newest, .*, is completed\); without --resume a new one begins"):
        Server(plan(), store=tmp_path / "store", port=0, resume=True)


def test_a_run_goes_on_from_its_own_model(tmp_path):
    with pytest.raises(PlanError, match="--start and --resume exclude each other"):
        Server(plan(), store=tmp_path, port=0, resume=True, start="model.safetensors")


def test_killed_in_each_phase_of_a_secure_sum_a_run_ends_with_the_same_bits(tmp_path):
    """Right after keys, shares, masks, survivors, and what unmasks were asked for: nodes give that once in a round."""
    agreed = plan(plan={"rounds": 3}, cohort={"quorum": 1.0, "deadline": 60}, privacy=BOUNDED)
    history, _ = killed(agreed, tmp_path, [("asked", 1), ("phase", 1), ("phase", 2), ("phase", 3), ("phase", 4)])
    assert history["outcome"] == "completed"
    assert all(len(row["answered"]) == 3 for row in history["rounds"])
    assert history["last"] == simulate(agreed, clients()).digest
    # A server may come a phase further before it is dead, and then another goes on with that try.
    assert history["rounds"][0]["attempt"] <= 5, "the round whose sum nodes had begun to reveal was tried again"
    assert replayed(tmp_path / "store", history["run"]) == models(agreed, clients(), of_history(tmp_path / "store", history))


def test_killed_while_buckets_are_unmasked_a_run_ends_with_the_same_bits(tmp_path):
    """Right after the shares, which draws the same buckets once more, and after what unmasks was asked for."""
    agreed = plan(
        plan={"rounds": 2},
        aggregation={"rule": "median"},
        cohort={"minimum": 9, "quorum": 1.0, "deadline": 60},
        privacy={"secure_aggregation": True, "buckets": 3},
    )
    history, _ = killed(agreed, tmp_path, [("phase", 1), ("phase", 4)], 9)
    assert history["outcome"] == "completed"
    assert all(len(row["answered"]) == 9 for row in history["rounds"])
    assert history["last"] == simulate(agreed, clients(9)).digest
    assert history["rounds"][0]["attempt"] <= 2, "the round whose sums nodes had begun to reveal was tried again"
    assert replayed(tmp_path / "store", history["run"]) == [row["model"] for row in history["rounds"]]
