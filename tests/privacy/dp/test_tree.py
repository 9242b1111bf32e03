"""Tree aggregation: noise that prefix sums share, each node once in a tree, and the same after a restart."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
from tests.federation import clients, plan, rows, run

import atoll
from atoll.errors import PlanError
from atoll.keys import new_secret
from atoll.learner import Rows
from atoll.privacy.dp import tree
from atoll.privacy.dp.account import account
from atoll.privacy.dp.accountant import epsilon
from atoll.server import events
from atoll.server.machine import begin, transition
from atoll.server.replay import replay
from atoll.store.ledger import Ledger
from atoll.store.sql import SqlStore

UNIFORM = {"options": {"weighted": False}}
TREE = {"clip": 1.0, "tree_noise": {"multiplier": 1.0, "delta": 1e-5}}


def test_noise_so_far_is_that_of_the_cover_alone():
    key, count, sigma = new_secret(), 4000, 20.0
    so_far = np.zeros(count, np.int64)
    for round_ in range(1, 9):
        so_far += tree.drawn(key, round_, 8)(sigma, count)
        nodes = round_.bit_count()
        assert abs(so_far.std() / (sigma * math.sqrt(nodes)) - 1) < 5 / math.sqrt(2 * count), round_
    assert np.array_equal(tree.drawn(key, 5, 8)(sigma, count), tree.drawn(key, 5, 8)(sigma, count))
    again = tree.drawn(key, 9, 8)(sigma, count)  # another tree
    assert abs(np.corrcoef(again, tree.drawn(key, 1, 8)(sigma, count))[0, 1]) < 5 / math.sqrt(count)


def test_a_leaf_is_in_as_many_noisy_sums_as_there_are_levels():
    for rounds in (1, 5, 8):
        for leaf in range(rounds):
            nodes = {one for t in range(1, rounds + 1) for one in tree.cover(t)}
            held = [(level, number) for level, number in nodes if number == leaf >> level]
            assert len(held) <= tree.levels(rounds)
    assert all(sum(1 << level for level, _ in tree.cover(t)) == t for t in range(40))


def test_each_node_is_asked_once_in_so_many_rounds():
    agreed = plan(cohort={"turns": 4, "minimum": 3}, plan={"rounds": 40})
    state, _ = begin("r", agreed, "m", 0.0, late=False)
    state, commands = transition(state, events.Joined(0.0, {f"n{k}": f"n{k}" for k in range(9)}))
    asked = []
    for _ in range(16):
        train = next(c for c in commands if isinstance(c, events.Train))
        asked.append(train.nodes)
        for node in train.nodes:
            state, commands = transition(state, events.Appended(0.0, events.Address("r", train.round, train.attempt, node), "d"))
        state, commands = transition(state, events.Closed(0.0, "m"))
    for epoch in range(4):
        everybody = sorted(node for nodes in asked[4 * epoch : 4 * epoch + 4] for node in nodes)
        assert everybody == [f"n{k}" for k in range(9)]
    assert len({tuple(map(tuple, asked[4 * k : 4 * k + 4])) for k in range(4)}) > 1


def test_epsilon_counts_levels_and_trees():
    mine = account(plan(privacy=TREE, cohort={"turns": 4}, aggregation=UNIFORM))
    assert mine.spent(1) == mine.spent(4) == epsilon(1.0, 3, 1e-5) < mine.spent(5) == epsilon(1.0, 6, 1e-5)
    solved = account(
        plan(privacy={"clip": 1.0, "tree_noise": {"epsilon": 2.0, "delta": 1e-5}}, cohort={"turns": 8}, plan={"rounds": 20})
    )
    assert epsilon(solved.multiplier, 3 * 4, 1e-5) <= 2.0 < epsilon(solved.multiplier * 0.99, 12, 1e-5)
    assert not solved.over(19)


def test_a_deployed_run_replays_and_keeps_one_key(tmp_path):
    agreed = plan(privacy=TREE, aggregation=UNIFORM, cohort={"turns": 2, "minimum": 3}, plan={"rounds": 5})
    history = run(agreed, clients(4), tmp_path, holdout=Rows(*rows(9)))
    assert len(history["rounds"]) == 5
    assert history["rounds"][-1]["epsilon"] == account(agreed).spent(5)
    for name in clients(4):  # a node counts whole trees, in each of which it was once
        ledger = Ledger(tmp_path / name)
        assert [one["epsilon"] for one in ledger.entries()] == [account(agreed).spent(one["round"]) for one in ledger.entries()]
        ledger.close()
    store = SqlStore(tmp_path / "store")
    closed = store.rounds(store.find().run)
    assert len({row.noise["key"] for row in closed}) == 1
    assert [row.noise["voices"] for row in closed] == [row.registered / 2 for row in closed]

    async def again():
        return [one async for one in replay(tmp_path / "store", store, store.find())]

    found = asyncio.run(again())
    assert len(found) == 5
    assert all(one.stored == one.found for one in found)
    store.close()


def test_the_last_model_of_a_tree_has_little_noise():
    """After 16 rounds of one tree a single node's noise is left, where fresh noise would have added up 16 times."""
    base = {"aggregation": UNIFORM, "plan": {"rounds": 16}, "training": {"learning_rate": 1e-9}}
    finals = {}
    for name, privacy, cohort in (
        ("tree", TREE, {"turns": 16}),
        ("fresh", {"clip": 1.0, "central_noise": {"multiplier": 1.0, "delta": 1e-5}}, {"turns": 16}),
    ):
        agreed = plan(privacy=privacy, cohort={"minimum": 3, **cohort}, **base)
        runs = [atoll.simulate(agreed, clients(4), judge_every=16).model["parameters"].values for _ in range(12)]
        finals[name] = float(np.std(runs))
    assert finals["fresh"] / finals["tree"] == pytest.approx(4.0, rel=0.5)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"privacy": TREE}, "give cohort.turns"),
        ({"privacy": {"tree_noise": TREE["tree_noise"]}, "cohort": {"turns": 4}}, "give clip"),
        ({"cohort": {"turns": 4, "fraction": 0.5}}, "once in so many rounds"),
        ({"privacy": {**TREE, "secure_aggregation": True}, "cohort": {"turns": 4}}, "take distributed_noise"),
    ],
)
def test_what_doesn_t_go_together(sections, said):
    with pytest.raises(PlanError, match=said):
        atoll.simulate(plan(**{"aggregation": UNIFORM, **sections}), clients(4))
