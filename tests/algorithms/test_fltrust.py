"""FLTrust as it runs: the server trains on its holdout, what it learned is stored, and a replay needs no rows."""

from __future__ import annotations

import pytest
from tests.federation import clients, plan, rows, run
from tests.server.test_retention import replayed

import atoll
from atoll.algorithms import find, reference
from atoll.errors import PlanError, StoreError
from atoll.learner import Rows
from atoll.learners import build
from atoll.server import audit, retention
from atoll.server.runtime import Server
from atoll.store.models import Models
from atoll.store.sql import SqlStore

ROOT = Rows(*rows(50, 30))


def trusting(**sections):
    return plan(**{"aggregation": {"rule": "fltrust"}, **sections})


def test_a_deployed_run_equals_a_simulation_and_is_replayed_without_the_servers_rows(tmp_path):
    agreed, store = trusting(), tmp_path / "store"
    history = run(agreed, clients(), tmp_path, holdout=ROOT)
    assert history["rounds"][-1]["model"] == atoll.simulate(agreed, clients(), holdout=ROOT).digest
    assert replayed(store, history["run"]) == [row["model"] for row in history["rounds"]]
    base = SqlStore(store)
    stored = [row.reference for row in base.rounds(history["run"])]
    assert len(set(stored)) == 3
    assert audit.verify(store, base, base.find(history["run"])).rounds == 3
    retention.prune(store, base, thinned=[history["run"]])
    assert Models(store / "models").has(*stored), "it can't be had again from the updates"
    assert replayed(store, history["run"])
    path = Models(store / "models").path(stored[1])
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)
    with pytest.raises(StoreError, match="the server's own update of round 2 isn't what it was"):
        replayed(store, history["run"])


def test_without_rows_of_its_own_a_server_says_so_at_the_start(tmp_path):
    with pytest.raises(PlanError, match=r"'fltrust' trains on the server's own rows too: give it a holdout \(--holdout FILE\)"):
        Server(trusting(), store=tmp_path / "store", port=0)
    assert not (tmp_path / "store").exists()
    with pytest.raises(PlanError, match="holdout"):
        atoll.simulate(trusting(), clients())


def test_what_the_server_learns_depends_on_plan_and_round_alone():
    agreed = trusting()
    learner = build(agreed)
    algorithm = find(agreed, learner)
    state = algorithm.init(learner.initial(1))
    first, again, later = (reference(agreed, algorithm, learner, state, ROOT, round_) for round_ in (1, 1, 2))
    assert first
    assert first == again
    assert first != later
    plain = plan()
    assert reference(plain, find(plain, learner), learner, state, ROOT, 1) is None


def test_more_than_half_of_the_nodes_are_hostile_and_it_learns_all_the_same():
    data = {f"node-{k}": rows(k) for k in range(7)}
    for k in range(3, 7):
        x, y = data[f"node-{k}"]
        data[f"node-{k}"] = (5 * x, 1 - y)
    judged = Rows(*rows(99, 400))
    learned = {}
    for rule in ("median", "fltrust"):
        agreed = plan(plan={"rounds": 6}, aggregation={"rule": rule})
        done = atoll.simulate(agreed, data, holdout=ROOT)
        sums = build(agreed).evaluate(done.model, judged)
        learned[rule] = sums["correct"] / sums["samples"]
    assert learned["fltrust"] > 0.9 > 0.5 > learned["median"]
