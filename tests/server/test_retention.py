"""Replay, pruning and quota: what is kept gives every model again, and nothing goes that this needs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.federation import clients, plan, run

from atoll.errors import AtollError, LogError, StoreError
from atoll.logs.access import PLAIN, Access
from atoll.node.runtime import Node
from atoll.server import retention
from atoll.server.replay import replay
from atoll.server.runtime import Server
from atoll.store import EvaluationRow, RoundRow, RunRow, UpdateRow
from atoll.store.models import Models
from atoll.store.sql import SqlStore


def replayed(store: Path, name: str, known_by: Access = PLAIN) -> list[str]:
    """The models that the replay of a run gives; each must be the stored one."""

    async def whole() -> list[str]:
        base = SqlStore(store)
        rounds = [one async for one in replay(store, base, base.find(name), access=known_by)]
        base.close()
        assert all(one.found == one.stored for one in rounds)
        return [one.found for one in rounds]

    return asyncio.run(whole())


def files(store: Path) -> set[str]:
    return set(Models(store / "models").files())


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "atoll", *map(str, words)]
    return subprocess.run(line, check=False, capture_output=True, text=True, timeout=60)


def test_a_run_is_replayed_from_its_log(tmp_path):
    history = run(plan(plan={"rounds": 4}), clients(), tmp_path)
    assert replayed(tmp_path / "store", history["run"]) == [row["model"] for row in history["rounds"]]
    told = command("replay", "--store", tmp_path / "store", "--json")
    assert json.loads(told.stdout) == {"run": history["run"], "rounds": 4, "same": True}


def test_newton_is_replayed_too(tmp_path):
    history = run(plan(plan={"rounds": 2}, aggregation={"rule": "newton"}), clients(), tmp_path)
    assert len(replayed(tmp_path / "store", history["run"])) == 2


def test_what_was_altered_is_named(tmp_path):
    history = run(plan(), clients(), tmp_path)
    store = tmp_path / "store"
    body = next((store / "log" / history["run"]).glob("2-*.safetensors"))
    bytes_ = body.read_bytes()
    body.write_bytes(bytes_[:-1] + bytes([bytes_[-1] ^ 1]))
    with pytest.raises(LogError, match=r"of round 2: the disk altered it"):
        replayed(store, history["run"])
    body.unlink()
    with pytest.raises(LogError, match="a body is missing from the log"):
        replayed(store, history["run"])
    body.write_bytes(bytes_)
    base = SqlStore(store)
    with base._base.begin() as connection:  # someone gives a round another model
        connection.exec_driver_sql(f"UPDATE rounds SET model = '{'f' * 64}' WHERE round = 3")
    base.close()
    told = command("replay", "--store", store)
    assert told.returncode == 2
    assert "round 3: its 3 updates give model" in told.stderr
    assert told.stderr.count("\n") == 1


def test_pruning_spares_what_replay_of_a_kept_run_needs(tmp_path):
    store = tmp_path / "store"
    first = run(plan(plan={"rounds": 4}), clients(), tmp_path / "a")
    (tmp_path / "a" / "store").rename(store)
    again = run(plan(plan={"rounds": 4}), clients(), tmp_path)  # the same plan and rows: the same models
    other = run(plan(plan={"rounds": 5, "seed": 2}), clients(), tmp_path)
    models = [row["model"] for row in other["rounds"]]
    ends = {other["initial"], other["best"], other["last"]}
    assert [row["model"] for row in first["rounds"]] == [row["model"] for row in again["rounds"]]

    told = command("prune", first["run"], "--models", "--store", store, "--dry-run", "--json")
    before = files(store)
    assert json.loads(told.stdout)["freed"] > 0
    told = command("prune", first["run"], "--store", store)
    assert (told.returncode, told.stdout.splitlines()[-1].split()[0]) == (0, "freed"), told.stderr
    assert files(store) == before, "the other run of that plan needs them"
    assert not (store / "log" / first["run"]).exists()

    told = command("prune", "--models", "--store", store, "--json")
    assert set(json.loads(told.stdout)["thinned"]) == {again["run"], other["run"]}
    assert files(store) & {other["initial"], *models} == ends
    assert len(replayed(store, other["run"])) == 5
    assert len(replayed(store, again["run"])) == 4
    with pytest.raises(StoreError, match="its updates were pruned; only its history is left"):
        replayed(store, first["run"])
    assert len(SqlStore(store).history(first["run"])["rounds"]) == 4

    told = command("prune", "--keep", "1", "--store", store, "--json")
    assert json.loads(told.stdout)["gone"] == [again["run"]]
    assert files(store) == ends
    told = command("export", again["run"], "--store", store, "--to", tmp_path / "gone.safetensors")
    assert "there is no model" in told.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nosuch"], "no run whose files are here starts with 'nosuch'; there are: "),
        (["live"], "run live hasn't ended; stop its server first, or give --force if that died"),
    ],
)
def test_runs_that_cannot_go(tmp_path, words, said):
    store = tmp_path / "store"
    run(plan(), clients(), tmp_path)
    base = SqlStore(store)
    base.begin_run(replace(base.find(), run="live", outcome="running", ended=None))
    base.close()
    told = command("prune", *words, "--store", store)
    assert (told.returncode, told.stderr.count("\n")) == (2, 1)
    assert said in told.stderr


def test_a_model_that_was_pruned_while_its_round_was_closed_is_there_again(tmp_path):
    server = Server(plan(), store=tmp_path, port=0)
    path = server.models.path(server.aggregator.kept[0])
    path.unlink()
    server._make_room(3)
    assert path.is_file()
    asyncio.run(server.log.close())
    server.book.close()
    server._opened.close()


def test_beyond_its_quota_a_store_takes_no_more_updates_until_runs_are_let_go(tmp_path):
    store = tmp_path / "store"
    agreed = plan(plan={"rounds": 3}, model={"inputs": 4})
    old = run(agreed, clients(), tmp_path)
    size = retention.held(store)
    said = []

    async def together():
        server = Server(agreed, store=store, port=0, quota=size + 600)
        nodes = [Node(server.url, one, name=name, directory=tmp_path / name) for name, one in clients().items()]
        work = asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))
        while not server.log.waiting and not work.done():
            await asyncio.sleep(0.02)
        said.append(server.status()["waiting_for"])
        base = SqlStore(store)
        retention.prune(store, base, [old["run"]])
        base.close()
        server.quota.recount()
        return (await work)[0]

    history = asyncio.run(asyncio.wait_for(together(), 60))
    assert "quota" in said[0]
    assert f"`atoll prune RUN --store {store}`" in said[0]
    assert len(history["rounds"]) == 3
    assert all(len(row["answered"]) == 3 for row in history["rounds"])
    assert len(replayed(store, history["run"])) == 3


def test_a_quota_thins_old_runs_first_of_models_that_can_be_had_again(tmp_path):
    store = tmp_path / "store"
    run(plan(plan={"rounds": 6}), clients(), tmp_path)
    base = SqlStore(store)
    row = base.find()
    quota = retention.Quota(store, base, retention.held(store) + 10)
    quota.recount(coming=500)
    assert files(store) == retention._ends(base, row)
    assert quota.room(1) is None
    base.close()
    assert len(replayed(store, row.run)) == 6


@pytest.mark.parametrize("wrong", ["fifty", "-3GB", "10 parsecs"])
def test_a_quota_that_is_none(tmp_path, wrong):
    told = command("serve", "plan.toml", "--quota", wrong)
    assert told.returncode == 2
    assert "plan.toml" in told.stderr or "is no size; it looks like 50GB" in told.stderr


@pytest.mark.parametrize("topics", ["shared", "node"])
def test_a_kafka_run_is_replayed_from_its_topic_after_what_lies_before_was_dropped(tmp_path, kafka, topics):
    """Where nobody is asked who comes, the server makes nodes' own topics by itself."""
    store = tmp_path / "store"
    agreed = plan(log={"kafka": kafka, "prefix": f"{tmp_path.name}.", "topics": topics})
    old, kept = run(agreed, clients(), tmp_path), run(agreed.with_(plan={"seed": 9}), clients(), tmp_path)
    assert not list((store / "log").glob("*/*")), "copies of bodies go with the run"
    told = command("prune", old["run"], "--topic", "--store", store)
    assert told.returncode == 0, told.stderr
    assert replayed(store, kept["run"]) == [row["model"] for row in kept["rounds"]]
    base = SqlStore(store)
    with base.pruning([], 0.0):
        pass
    row = replace(base.find(old["run"]), pruned=None)

    async def lost() -> None:
        async for _ in replay(store, base, row):
            pass

    with pytest.raises(AtollError, match="its updates are gone"):
        asyncio.run(lost())
    base.close()


def test_an_older_store_gets_the_columns_it_lacks(tmp_path):
    history = run(plan(), clients(), tmp_path)
    base = SqlStore(tmp_path / "store")
    with base._base.begin() as connection:
        for table, column in (("runs", "log_start"), ("runs", "pruned"), ("rounds", "registered")):
            connection.exec_driver_sql(f"ALTER TABLE {table} DROP COLUMN {column}")
        connection.exec_driver_sql("UPDATE schema SET version = 1")
    base.close()
    with contextlib.closing(SqlStore(tmp_path / "store")) as base:
        assert len(base.history(history["run"])["rounds"]) == 3
    assert len(replayed(tmp_path / "store", history["run"])) == 3


def test_thinning_spares_the_models_that_nodes_at_work_were_asked_with(tmp_path):
    """A run that isn't done: node c still trains what round 1 made, in round 2; round 4 has begun with round 3's model."""
    base = SqlStore(tmp_path)
    base.begin_run(RunRow("r", "name", "p", "{}", 0.0, "m0"))
    for number in range(1, 4):
        row = RoundRow("r", number, 1, 0.0, 1.0, f"m{number}", f"m{number}", 3, 2, 8)
        came = [UpdateRow("r", number, 1, "a", "accepted", f"u{number}")]
        base.close_round(row, came, [EvaluationRow("r", number, "holdout", {"samples": 1.0, "loss": 1.0 / number})])
    base.open_round("r", {"round": 4, "attempt": 1, "cohort": ["a", "b"], "late": {"c": [2, 1]}})
    assert retention._ends(base, base.find()) == {"m0", "m1", "m3"}
    base.end_run("r", "completed", "", 9.0)
    assert retention._ends(base, base.find()) == {"m0", "m3"}, "nobody is at work any more"
    base.close()
