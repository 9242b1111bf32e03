"""The talk's own run through a real Kafka, and the faults it had: each a thing that must not happen here.

`examples/talk/README.md` lists all of them, and where those are tested that aren't here.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load
from tests.federation import plan, rows, run

import atoll
from atoll.messages import StartTraining
from atoll.node.events import Event, Trained
from atoll.node.runtime import Node
from atoll.preprocess import prepare
from atoll.server import events
from atoll.server.lines import Lines
from atoll.server.runtime import Server
from atoll.server.state import waiting_for
from atoll.simulate import simulate
from atoll.store.sql import SqlStore
from atoll.wire import seal

EXAMPLE = Path(__file__).parents[2] / "examples" / "talk"


def talk(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLE / "run.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)


def test_the_talks_own_run(data, kafka, tmp_path):
    table = data / "heart_talk" / "heart_tf_minus2rows.csv"
    done = talk(table, "--seeds", "1", "--kafka", kafka, "--dir", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    (history,) = json.loads(done.stdout.splitlines()[-1])["runs"]
    rounds = history["rounds"]
    assert [row["round"] for row in rounds] == list(range(1, 11))  # ten were planned: not one too many
    assert all(row["answered"] == ["node-1", "node-2"] for row in rounds)
    assert rounds[-1]["holdout"]["accuracy"] > 0.8
    # The evaluations are kept: the server's of every model, and each node's of every model it received.
    assert all({"loss", "accuracy"} <= row[place].keys() for row in rounds for place in ("holdout", "nodes"))
    assert all(row["by_node"].keys() == {"node-1", "node-2"} for row in rounds)
    # A round ends when all have answered: nine of them take less than the ten seconds of silence that ended each of the talk's.
    assert sum(row["seconds"] for row in rounds[1:]) < 10

    place = tmp_path / "seed-0"
    parts = [(place / f"{name}.csv").read_text().splitlines()[1:] for name in ("holdout", "node-1", "node-2")]
    assert [len(part) for part in parts] == [60, 120, 121]
    assert sorted(row for part in parts for row in part) == sorted(table.read_text().splitlines()[1:])
    agreed = atoll.Plan.load(place / "plan.json")
    holdout = prepare(place / "holdout.csv", agreed).judge
    simulated = simulate(agreed, {name: place / f"{name}.csv" for name in ("node-1", "node-2")}, holdout=holdout)
    assert history["last"] == simulated.digest


def test_without_the_table_it_says_where_it_comes_from(tmp_path):
    done = talk(tmp_path / "none.csv")
    assert done.returncode == 1
    assert done.stderr.strip() == f"{tmp_path / 'none.csv'}: is not there; README.md says where it comes from"


def test_nothing_that_arrives_is_unpickled(kafka, tmp_path):
    """A node that was asked sends a pickle, well signed, that makes a file where it is loaded: it is refused, unopened."""
    made = tmp_path / "made"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (made,)

    class Pickling(Node):
        async def _made(self, task: StartTraining) -> Event:
            trap = [memoryview(pickle.dumps(Trap()))]
            envelope = seal(self.identity, self._address(task), self.plan.digest, trap)
            self.outbox.keep(envelope, trap)
            return Trained(self.drive.now(), task, envelope.digest)

    agreed = plan(plan={"rounds": 3}, cohort={"minimum": 2, "quorum": 1.0}, log={"kafka": kafka, "prefix": "pickle."})

    async def together() -> dict[str, Any]:
        server = Server(agreed, store=tmp_path / "store", port=0)
        kinds = {"east": Node, "north": Node, "rogue": Pickling}
        nodes = [kind(server.url, rows(len(name)), name=name, directory=tmp_path / name) for name, kind in kinds.items()]
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    assert [row["answered"] for row in history["rounds"]] == [["east", "north"]] * 3
    refused = [row.reason for row in SqlStore(tmp_path / "store").updates(history["run"]) if row.status == "rejected"]
    assert any("no safetensors body" in reason for reason in refused)
    assert not made.exists()
    pickle.loads(pickle.dumps(Trap()))  # the trap works
    assert made.exists()


def test_models_travel_as_raw_bytes_and_never_as_messages(kafka, tmp_path, monkeypatch):
    """20,001 numbers a model: no message is longer than 600 bytes, and no update one per cent longer than its numbers."""
    import socketio

    width, messages = 20_000, []
    emit, event_of = socketio.AsyncClient.emit, Lines.event

    async def noting(self: Any, event: str, data: Any = None, *more: Any, **named: Any) -> Any:
        messages.append((event, len(json.dumps(data))))
        return await emit(self, event, data, *more, **named)

    def noting_too(self: Any, event: str, data: Any) -> bytes:
        messages.append((event, len(json.dumps(data))))
        return event_of(self, event, data)

    monkeypatch.setattr(socketio.AsyncClient, "emit", noting)
    monkeypatch.setattr(Lines, "event", noting_too)
    agreed = plan(model={"inputs": width}, plan={"rounds": 2}, cohort={"minimum": 2}, log={"kafka": kafka, "prefix": "raw."})
    wide = {name: (np.random.default_rng(k).normal(size=(20, width)), rows(k, 20)[1]) for k, name in enumerate("ab")}
    history = run(agreed, wide, tmp_path)
    assert {event for event, _ in messages} >= {"connection_received", "start_training", "fl_update", "verdict", "end_session"}
    assert max(size for _, size in messages) < 600
    assert all(row["bytes"] < 1.01 * 2 * 8 * (width + 1) for row in history["rounds"])


def test_a_slow_node_is_waited_for_as_long_as_the_plan_says(kafka, tmp_path):
    """Silence on the topic ends no round: with one of two updates in, 500 of the plan's 600 seconds go by, and it is open."""
    agreed = plan(
        plan={"rounds": 1}, cohort={"minimum": 2, "quorum": 1.0, "deadline": 600}, log={"kafka": kafka, "prefix": "slow."}
    )
    told: list[str] = []

    async def together() -> dict[str, Any]:
        other_is_in = asyncio.Event()

        class Slow(Node):
            async def start_training(self, task: StartTraining) -> None:
                await other_is_in.wait()
                await super().start_training(task)

        server = Server(agreed, store=tmp_path / "store", port=0)
        happen = server.drive.happen

        async def noticing(event: Any) -> None:
            await happen(event)
            if isinstance(event, events.Appended) and not other_is_in.is_set():
                later = event.now + 500
                await happen(events.Tick(later))
                told.append(waiting_for(server.drive.state, later))
                other_is_in.set()

        server.drive.happen = noticing
        nodes = [
            kind(server.url, rows(k), name=kind.__name__, directory=tmp_path / str(k)) for k, kind in enumerate((Node, Slow))
        ]
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    (said,) = told
    assert re.fullmatch("round 1: 1 of 2 updates are in, waiting for Slow; (9[0-9]|100) s left", said)
    assert history["rounds"][0]["answered"] == ["Node", "Slow"]


def test_the_mean_is_weighted_by_rows(tmp_path):
    """Ten rows and ninety: the new model is the weighted mean, by hand from the bytes in the log, and not the plain one."""
    agreed = plan(plan={"rounds": 1}, cohort={"minimum": 2})
    history = run(agreed, {"few": rows(1, 10), "many": rows(2, 90)}, tmp_path)
    ids = {node["name"]: node["node"] for node in history["nodes"]}
    moved = {}
    for name, node in ids.items():
        (body,) = (tmp_path / "store" / "log" / history["run"]).glob(f"1-1-{node}-*")
        moved[name] = load(body.read_bytes())["parameters/kernel"]
    made = load((tmp_path / "store" / "models" / f"{history['last']}.safetensors").read_bytes())["parameters/kernel"]
    np.testing.assert_allclose(made, 0.1 * moved["few"] + 0.9 * moved["many"], rtol=1e-12)  # the first model is zero
    assert not np.allclose(made, (moved["few"] + moved["many"]) / 2, rtol=0.01)
