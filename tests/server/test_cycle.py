"""Cyclic weight transfer: one node a round, each in its turn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tests.federation import clients, plan, run

from atoll.errors import PlanError
from atoll.learners import build
from atoll.plan import Plan
from atoll.preprocess import prepare
from atoll.server import ending, events, machine
from atoll.simulate import simulate


def cyclic(rounds: int = 7) -> Plan:
    return plan(plan={"rounds": rounds}, cohort={"minimum": 1, "cycle": 3, "deadline": 20})


def test_everybody_has_one_turn_in_a_cycle_and_the_model_goes_from_hand_to_hand(tmp_path):
    agreed = cyclic()
    simulated = simulate(agreed, clients())
    turns = [name for row in simulated.rounds for name in row["answered"]]
    assert [set(turns[k : k + 3]) for k in (0, 3)] == [set(clients())] * 2
    assert len({tuple(turns[k : k + 3]) for k in (0, 3)}) == 2, "each cycle draws its order anew"
    assert run(agreed, clients(), tmp_path)["last"] == simulated.digest
    learner, data = build(agreed), {name: prepare(one, agreed) for name, one in clients().items()}
    alone = simulate(agreed.with_(plan={"rounds": 1}, cohort={"cycle": 1}), {turns[0]: data[turns[0]]})
    first = simulate(agreed.with_(plan={"rounds": 1}), clients())
    np.testing.assert_array_equal(first.model["parameters"].values, alone.model["parameters"].values)
    assert learner.evaluate(simulated.model, data["node-0"].train)["samples"] == 40


def test_who_fails_is_passed_over():
    state, _ = machine.begin("run", cyclic(), "0" * 64, 0.0)
    state, commands = machine.transition(state, events.Joined(0.0, {name: name for name in "ab"}))
    assert not any(isinstance(one, events.Train) for one in commands), "it begins when all are there"
    state, commands = machine.transition(state, events.Joined(1.0, {"c": "c"}))
    asked = [one.nodes for one in commands if isinstance(one, events.Train)]
    for _ in itertools.repeat(None, 2):
        state, commands = machine.transition(state, events.Declined(2.0, ending.address(state, state.cohort[0]), "no"))
        asked += [one.nodes for one in commands if isinstance(one, events.Train)]
    assert sorted(asked) == [("a",), ("b",), ("c",)]


@pytest.mark.parametrize("cohort", [{"minimum": 2}, {"minimum": 1, "fraction": 0.5}])
def test_one_node_trains_in_a_round(cohort):
    with pytest.raises(PlanError, match="with cycle one node trains in a round"):
        plan(cohort={"cycle": 3, **cohort})
