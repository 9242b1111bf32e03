"""A round's whole journey, over the in-process twins and over the real parts: the same bits."""

from __future__ import annotations

import asyncio
import hashlib

import numpy as np
import pytest
from tests.federation import clients, plan, rows, run

from atoll import algorithms, learners
from atoll.keys import Identity
from atoll.learner import Rows, summary
from atoll.logs.inproc import InprocLog
from atoll.preprocess import prepare
from atoll.server import events, machine
from atoll.server.close import Accepted, close
from atoll.server.state import State
from atoll.simulate import simulate
from atoll.store.sql import SqlStore
from atoll.wire import Address, decode, digest_of, encode, pack, seal


def test_the_journey_step_by_step():
    """Plan → start_round → fit → update → frame → sign → append → verify → close → evaluate, each part by hand."""
    agreed = plan()
    learner = learners.build(agreed)
    algorithm = algorithms.find(agreed, learner)
    state = algorithm.init(learner.initial(agreed.plan.seed))
    model = digest_of(pack(algorithm.brief(state)))
    people = {Identity.new(): data for data in clients().values()}
    names = {identity.node: f"node-{k}" for k, identity in enumerate(people)}

    server, _ = machine.begin("run", agreed, model, now=0.0)
    server, commands = machine.transition(server, events.Joined(0.0, names))
    (train,) = [command for command in commands if isinstance(command, events.Train)]
    assert set(train.nodes) == set(names)

    async def travel() -> tuple[State, events.Close, dict[str, memoryview]]:
        at, log, bodies = server, InprocLog("run"), {}
        for identity, data in people.items():
            name = names[identity.node]
            _, update = algorithms.work(
                agreed, algorithm, learner, algorithm.brief(state), {}, prepare(data, agreed), train.round, name
            )
            body = encode(update, model)
            envelope = seal(identity, Address("run", train.round, train.attempt, identity.node), agreed.digest, body)
            await log.append(envelope, body)
        reader = log.records()
        for _ in people:
            record = await anext(reader)
            record.envelope.verify()
            bodies[record.envelope.address.node] = log.body(record.envelope)
            at, commands = machine.transition(at, events.Appended(1.0, record.envelope.address, record.envelope.digest))
        (shut,) = [command for command in commands if isinstance(command, events.Close)]
        return at, shut, bodies

    at, shut, bodies = asyncio.run(travel())
    assert [names[node] for node in shut.accepted] == ["node-0", "node-1", "node-2"]
    accepted = [Accepted(node, lambda node=node: bodies[node]) for node in shut.accepted]
    after = close(algorithm, state, learner.layouts, model, accepted, registered=3)

    updates = [decode(body, learner.layouts, model) for body in bodies.values()]
    by_hand = sum(u.weight * u.groups["parameters"].values for u in updates) / sum(u.weight for u in updates)
    np.testing.assert_allclose(after["parameters"].values, by_hand, rtol=1e-12)
    at, commands = machine.transition(at, events.Closed(2.0, digest_of(pack(after))))
    assert at.round == 2
    assert [type(command) for command in commands][:4] == [events.Judge] * 3 + [events.Train]

    once = simulate(agreed.with_(plan={"rounds": 1}), clients())
    assert once.digest == digest_of(pack(after))


def test_a_deployed_run_gives_the_simulated_runs_bits(tmp_path):
    simulated = simulate(plan(), clients())
    history = run(plan(), clients(), tmp_path)
    assert [row["model"] for row in history["rounds"]] == [row["model"] for row in simulated.rounds]
    assert history["last"] == simulated.digest
    stored = tmp_path / "store" / "models" / f"{history['last']}.safetensors"
    assert hashlib.sha256(stored.read_bytes()).hexdigest() == history["last"]


def test_exactly_the_planned_rounds_and_every_fact_stored(tmp_path):
    history = run(plan(), clients(), tmp_path, holdout=Rows(*rows(9)))
    assert [row["round"] for row in history["rounds"]] == [1, 2, 3]
    assert history["outcome"] == "completed"
    for row in history["rounds"]:
        assert row["answered"] == ["node-0", "node-1", "node-2"]
        assert row["holdout"]["accuracy"] > 0.8
        assert row["bytes"] > 0
        assert not row["refused"]
    store = SqlStore(tmp_path / "store")
    run_id = history["run"]
    assert [(row.status, row.weight) for row in store.updates(run_id)] == [("accepted", 40.0)] * 9
    # The nodes judged the initial model, each round's model, and at the end the final one.
    assert {row.round for row in store.evaluations(run_id) if row.place == "nodes"} == {0, 1, 2, 3}
    losses = [summary(row.metrics)["loss"] for row in store.evaluations(run_id) if row.place == "holdout"]
    assert losses == sorted(losses, reverse=True)
    assert history["best"] == history["last"]


def test_without_a_holdout_models_are_judged_by_the_nodes(tmp_path):
    history = run(plan(), clients(), tmp_path)
    store = SqlStore(tmp_path / "store")
    by_node = {row.place: row.metrics for row in store.evaluations(history["run"]) if row.round == 3}
    pooled = by_node.pop("nodes")
    assert pooled["samples"] == 120
    assert pooled["correct"] == sum(one["correct"] for one in by_node.values())
    assert history["rounds"][-1]["nodes"]["accuracy"] == pooled["correct"] / 120


def test_each_node_keeps_the_final_model_its_ledger_and_no_unsent_update(tmp_path):
    history = run(plan(), clients(), tmp_path)
    for name in clients():
        final = tmp_path / name / "final.safetensors"
        assert hashlib.sha256(final.read_bytes()).hexdigest() == history["last"]
        assert not list((tmp_path / name / "outbox").iterdir())
    from atoll.store.ledger import Ledger

    entries = Ledger(tmp_path / "node-0").entries()
    assert [(entry["round"], entry["verdict"]) for entry in entries] == [(1, "accepted"), (2, "accepted"), (3, "accepted")]


@pytest.mark.parametrize("names", [("a", "b", "c"), ("c", "a", "b")])
def test_the_order_of_joining_changes_no_bit(tmp_path, names):
    data = dict(zip(names, (clients()[f"node-{'abc'.index(name)}"] for name in names), strict=True))
    reference = simulate(plan(), {name: data[name] for name in "abc"})
    assert run(plan(), data, tmp_path)["last"] == reference.digest
