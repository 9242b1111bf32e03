"""Hostile nodes in a real run: what they send is refused, recorded and set aside, they hear why, and are held out for a while."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_commands import atoll as command
from tests.faults.test_bad_input import Rogue, not_finite
from tests.federation import atoll, clients, events, plan, rows
from tests.server.test_retention import replayed

from atoll.logs.broker import free_port
from atoll.messages import StartTraining
from atoll.node.runtime import Node
from atoll.plan import Plan
from atoll.server import quarantine, retention
from atoll.server.runtime import Server
from atoll.simulate import simulate
from atoll.store.sql import SqlStore
from atoll.vector import Update
from atoll.wire import Address, Envelope, encode


def long(rogue: Rogue, task: StartTraining, envelope: Envelope, path: Path) -> None:
    """Behave well for as long as there is no bound, then shout."""
    update = rogue.update(task, path)
    if task.round > 3:
        shouted = {name: group.with_values(group.values * 1e6) for name, group in update.groups.items()}
        rogue.replace(task, encode(Update(shouted, update.weight, update.metrics), task.model))


async def together(agreed: Plan, place: Path, spoil: Any, heard: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    server = Server(agreed, store=place / "store", port=0, **options)
    honest = [Node(server.url, data, name=name, directory=place / name) for name, data in clients().items()]
    rogue = Rogue(server.url, rows(7), name="rogue", directory=place / "rogue", watch=heard.append)
    rogue.spoil = spoil.__get__(rogue)
    history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in [*honest, rogue]))
    return history


@pytest.mark.parametrize(("log", "spoil", "said"), [
    ("embedded", long, "the bound is"), ("kafka", long, "the bound is"), ("kafka", not_finite, "holds NaN or infinity"),
])  # fmt: skip
def test_what_is_refused_is_recorded_set_aside_and_told(request, tmp_path, log, spoil, said):
    broker = request.getfixturevalue("kafka") if log == "kafka" else None
    agreed = plan(plan={"rounds": 6}, cohort={"quorum": 1.0}, log={"kafka": broker, "prefix": f"{tmp_path.name}."})
    heard: list[dict[str, Any]] = []
    history = asyncio.run(asyncio.wait_for(together(agreed, tmp_path, spoil, heard), 60))
    assert history["outcome"] == "completed"
    store = SqlStore(tmp_path / "store")
    refused = [row for row in store.updates(history["run"]) if row.offence]
    assert len(refused) == 3, "after three offences it is not asked any more"
    for row in refused:
        assert row.status == "rejected"
        assert said in row.reason
        assert row.bytes
        assert (row.norm is None) == (spoil is not_finite)
        kept = quarantine.path_of(tmp_path / "store", Address(row.run, row.round, row.attempt, row.node), row.digest)
        assert kept.stat().st_size == row.bytes
    assert not any("rogue" in row["answered"] for row in history["rounds"] if row["round"] > 3)
    told = [event["reason"] for event in heard if event["what"] == "verdict" and not event["accepted"]]
    assert told == [row.reason for row in refused], "each is told, and printed once"
    assert "after 3 such updates the node is held out until round" in refused[-1].reason
    assert replayed(tmp_path / "store", history["run"]) == [row["model"] for row in history["rounds"]]
    mine = tmp_path / "store" / "quarantine" / history["run"]
    assert retention.held(tmp_path / "store") >= sum(path.stat().st_size for path in mine.iterdir()) > 0
    retention.prune(tmp_path / "store", store, gone=[history["run"]])
    assert not mine.exists()


def test_a_node_stays_held_out_when_its_server_is_killed_and_is_welcome_again(tmp_path):
    checks = {"offences": 2, "held_out": 3}
    agreed = plan(plan={"rounds": 12}, cohort={"quorum": 1.0, "deadline": 60}, checks=checks)
    (tmp_path / "plan.json").write_text(agreed.to_json())
    words = ["serve", tmp_path / "plan.json", "--port", str(free_port()), "--store", tmp_path / "store", "--json"]
    heard: list[dict[str, Any]] = []
    joined: list[threading.Thread] = []

    async def join(url: str) -> None:
        honest = [Node(url, data, name=name, directory=tmp_path / name) for name, data in clients().items()]
        rogue = Rogue(url, rows(7), name="rogue", directory=tmp_path / "rogue", watch=heard.append)
        rogue.spoil = not_finite.__get__(rogue)
        await asyncio.wait_for(asyncio.gather(*(node.start_async() for node in [*honest, rogue])), 90)

    asked, until, rogue_id = [], 0, ""
    with atoll(*words, log=tmp_path / "first.log") as server:
        for event in events(server):
            if event["what"] == "listening":
                joined.append(threading.Thread(target=asyncio.run, args=(join(event["url"]),)))
                joined[0].start()
            if event["what"] == "rejected" and (found := re.search(r"held out until round (\d+) is over", event["reason"])):
                until, rogue_id = int(found[1]), event["node"]
                server.kill()
                break
    with atoll(*words, "--resume", log=tmp_path / "second.log") as server:
        for event in events(server):
            if event["what"] == "asked":
                asked.append((event["round"], rogue_id in event["nodes"]))
    joined[0].join()
    assert event["outcome"] == "completed"
    assert asked
    assert not any(there for round_, there in asked if round_ <= until)
    assert any(there for round_, there in asked if round_ > until)
    assert {"what": "held_out", "until": until} in heard, "a node that comes back hears it"

    listed = json.loads(command("history", "--rejected", "--store", tmp_path / "store", "--json").stdout)["rejected"]
    assert len(listed) == len({row["file"] for row in listed}) >= 3
    assert all(row["name"] == "rogue" and row["offence"] and Path(row["file"]).exists() for row in listed)
    said = command("history", "--rejected", "--store", tmp_path / "store").stdout
    assert f"{len(listed)} updates were refused" in said
    assert "holds NaN or infinity" in said
    assert replayed(tmp_path / "store", event["run"])


def test_a_simulation_refuses_what_a_server_would():
    agreed = plan(plan={"rounds": 8}, cohort={"minimum": 3})
    heard: list[Any] = []

    def shout(round_: int, updates: Any) -> Any:
        if round_ < 4 or "rogue" not in updates:
            return updates
        groups = {name: group.with_values(group.values * 1e6) for name, group in updates["rogue"].groups.items()}
        return {**updates, "rogue": Update(groups, updates["rogue"].weight, updates["rogue"].metrics)}

    done = simulate(agreed, {**clients(), "rogue": rows(7)}, tamper=shout, watch=heard.append)
    assert ["rogue" in row["answered"] for row in done.rounds] == [True] * 3 + [False] * 5
    assert [event["round"] for event in heard if event["what"] == "rejected"] == [4, 5, 6]


@pytest.mark.parametrize("rate", [0.001, 0.05, 1.0])
def test_the_default_bound_refuses_no_honest_node_however_unequal_they_are(rate):
    """Rows from 5 to 4,000, one class alone on some nodes, and an epoch each: steps differ by a factor of 400."""
    heard: list[Any] = []
    data = {f"small-{k}": rows(k, 5 + k) for k in range(9)} | {"large": rows(50, 4000)}
    for k in range(3):
        x, y = rows(60 + k, 100)
        data[f"one-class-{k}"] = x[y == k % 2], y[y == k % 2]
    training = {"epochs": 1, "batch_size": 8, "learning_rate": rate}
    done = simulate(plan(plan={"rounds": 40}, training=training), data, watch=heard.append)
    assert not [event for event in heard if event["what"] == "rejected"]
    assert all(len(row["answered"]) == len(data) for row in done.rounds)


def test_no_more_bodies_are_kept_than_there_is_room_for(tmp_path):
    digests = [f"{k:064x}" for k in range(quarantine.KEPT + 5)]
    for k, digest in enumerate(digests):
        quarantine.set_aside(tmp_path, Address("run", k, 1, "n"), digest, b"body", lambda size: None)
    kept = sorted((tmp_path / "quarantine" / "run").iterdir())
    assert len(kept) == quarantine.KEPT
    assert {path.name.rsplit("-", 1)[1].split(".")[0] for path in kept} == set(digests[5:])
    full = Address("full", 1, 1, "n")
    quarantine.set_aside(tmp_path, full, digests[0], b"body", lambda size: "the quota is used up")
    assert not quarantine.path_of(tmp_path, full, digests[0]).exists()
