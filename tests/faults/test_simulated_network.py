"""A hundred thousand rounds over a network that delays, loses, doubles and reorders, with deaths on every side."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.federation import plan, say

from atoll.server import events, machine, tries
from atoll.server.offences import Conduct
from atoll.server.state import Phase
from atoll.testing.linked_network import LinkedFederation
from atoll.testing.network import Federation
from atoll.testing.world import Faults

ROUNDS = 25
LONGEST = 5e5
UNKIND = {
    "slow": Faults(delay=0.5, longest=30, fit=8, drift=0.2),
    "lossy": Faults(lost=0.03, doubled=0.1, delay=0.3, longest=20),
    "torn": Faults(breaks=0.1, broken=0.3, doubled=0.05),
    "deadly": Faults(dies=0.02, away=4, broken=0.05),
    "all at once": Faults(lost=0.01, doubled=0.05, breaks=0.03, dies=0.01, broken=0.1, drift=0.1, longest=10),
}


CHECKS = {"offences": 2, "held_out": 4}


def world(seed: int, faults: Faults, *, embedded: bool, hostile: int = 0, late: bool = True, **cohort: object) -> Federation:
    rules = {"minimum": 2, "quorum": 0.6, "deadline": 60, "grace": 1, "fraction": 1.0, **cohort}
    agreed = plan(plan={"rounds": ROUNDS}, cohort=rules, checks=CHECKS)
    federation = Federation(agreed, seed, faults, embedded=embedded, hostile=hostile, late=late)
    try:
        federation.run(LONGEST)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}, {faults}, embedded {embedded}, hostile {hostile}, {rules}: {error}") from error
    return federation


@pytest.mark.parametrize("embedded", [True, False], ids=["embedded", "broker"])
@pytest.mark.parametrize("name", UNKIND)
def test_no_run_hangs_and_no_update_is_lost_or_counts_twice(name, embedded):
    """Ten worlds of ten thousand rounds each: a hundred thousand in all. A seed that fails is in the message.

    By turns synchronous and with a buffer, all nodes or a part, tasks that expire early, and no late updates at all.
    """
    rounds, completed, late, seed = 0, 0, 0, 0
    while rounds < 10_000:
        fraction, deadline = 0.6 if seed % 3 == 0 else 1.0, 25 if seed % 5 == 0 else 60
        plain = seed % 7 == 0
        buffer = 2 + seed % 3 if seed % 2 and not plain else None
        rules = {"fraction": fraction, "deadline": deadline, "buffer": buffer}
        federation = world(seed, UNKIND[name], embedded=embedded, late=not plain, **rules)
        rounds += federation.rounds
        late += federation.late
        completed += federation.outcome == "completed"
        seed += 1
        assert seed < 10 * 10_000 / ROUNDS, "most runs give up"
    assert completed > 0.9 * seed, "a run gives up only where too few are there for three attempts"
    assert late > 0.03 * rounds, "what missed its round counts in a later one"


@pytest.mark.parametrize("embedded", [True, False], ids=["embedded", "broker"])
@pytest.mark.parametrize("name", UNKIND)
def test_a_links_phases_end_and_one_sum_a_round_is_revealed(name, embedded):
    """Ten worlds of three hundred rounds each, whose phases lose messages and whose servers and nodes die in all of them."""
    rounds, completed, seed = 0, 0, 0
    while rounds < 300:
        agreed = plan(plan={"rounds": ROUNDS}, cohort={"minimum": 3, "quorum": 0.6, "deadline": 60, "grace": 2})
        federation = LinkedFederation(agreed, seed, UNKIND[name], 7, embedded=embedded)
        try:
            federation.run(LONGEST)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {name}, embedded {embedded}: {error}") from error
        rounds += federation.rounds
        completed += federation.outcome == "completed"
        seed += 1
        assert seed < 10 * 300 / ROUNDS, "most runs give up"
    assert completed > 0.7 * seed, f"{seed - completed} of {seed} runs gave up"


@pytest.mark.parametrize("embedded", [True, False], ids=["embedded", "broker"])
@pytest.mark.parametrize("name", UNKIND)
def test_a_lost_bucket_is_left_out_and_no_sum_is_made_of_a_part_of_one(name, embedded):
    """Worlds of sixty rounds each: buckets are lost in every phase, and servers die while others are opened."""
    rounds, completed, left_out, seed = 0, 0, 0, 0
    while rounds < 60:
        agreed = plan(plan={"rounds": 10}, cohort={"minimum": 12, "quorum": 0.8, "deadline": 60, "grace": 5})
        federation = LinkedFederation(agreed, seed, UNKIND[name], 16, embedded=embedded, buckets=4)
        try:
            federation.run(LONGEST)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {name}, embedded {embedded}: {error}") from error
        rounds += federation.rounds
        left_out += federation.left_out
        completed += federation.outcome == "completed"
        seed += 1
        assert seed < 60, "most runs give up"
    assert left_out > 0.05 * rounds, f"{left_out} buckets were left out in {rounds} rounds"
    say(f"{name}: {completed} of {seed} runs completed, {left_out} buckets left out in {rounds} rounds")


@pytest.mark.parametrize("embedded", [True, False], ids=["embedded", "broker"])
def test_with_all_nodes_and_no_deadline_no_fault_changes_a_bit(embedded):
    rules = {"minimum": 5, "quorum": 1.0, "deadline": 1e5}
    calm = world(0, Faults(), embedded=embedded, **rules)
    assert (calm.rounds, calm.trained) == (ROUNDS, 5 * ROUNDS)
    unkind = Faults(doubled=0.05, breaks=0.05, dies=0.01, broken=0.1, drift=0.1, longest=10)
    for seed in range(100):
        federation = world(seed, unkind, embedded=embedded, **rules)
        assert federation.model == calm.model, f"seed {seed}"
        assert federation.trained == 5 * ROUNDS, f"seed {seed}: what was trained was trained again"


def test_hostile_nodes_in_a_calm_world_are_held_out_and_asked_again():
    federation = world(3, Faults(), embedded=False, hostile=2, quorum=1.0)
    assert federation.outcome == "completed"
    assert federation.hostile.held >= 4
    assert federation.hostile.back == {"n0", "n1"}


@pytest.mark.parametrize("embedded", [True, False], ids=["embedded", "broker"])
@pytest.mark.parametrize("name", UNKIND)
def test_no_fault_brings_back_a_node_that_is_held_out_or_revoked(name, embedded):
    faults = replace(UNKIND[name], revokes=0.004)
    buffers = (None, 2, 3)
    worlds = [world(seed, faults, embedded=embedded, hostile=2 + seed % 2, buffer=buffers[seed % 3]) for seed in range(60)]
    assert sum(one.outcome == "completed" for one in worlds) > 40
    assert sum(one.hostile.held for one in worlds) > 100
    assert sum(len(one.hostile.back) for one in worlds) > 60
    assert sum(len(one.hostile.revoked) for one in worlds) > 20


def test_a_machine_that_asks_who_is_held_out_is_caught(monkeypatch):
    monkeypatch.setattr(Conduct, "welcome", lambda self, nodes, round_: frozenset(nodes))
    with pytest.raises(AssertionError, match="is held out until round"):
        world(0, UNKIND["slow"], embedded=False, hostile=2)


def test_a_server_that_forgets_offences_when_it_dies_is_caught(monkeypatch):
    monkeypatch.setattr("atoll.testing.hostile.conduct_of", lambda plan, rows: Conduct())
    with pytest.raises(AssertionError, match="is held out until round"):
        some(UNKIND["deadly"], hostile=2)


def test_the_same_seed_gives_the_same_world():
    first, second = (world(7, UNKIND["all at once"], embedded=False) for _ in range(2))
    assert (first.log, first.model, first._world.now) == (second.log, second.model, second._world.now)


def some(faults: Faults, hostile: int = 0, **cohort: object) -> None:
    for seed in range(100):
        world(seed, faults, embedded=False, hostile=hostile, **cohort)


@pytest.mark.parametrize("at", [(Phase.TRAINING, events.Tick), (Phase.CLOSING, events.Closed)])
def test_a_machine_that_forgets_something_is_caught(monkeypatch, at):
    monkeypatch.setattr(machine, "TABLE", {key: act for key, act in machine.TABLE.items() if key != at})
    with pytest.raises(AssertionError, match=r"it hangs|nothing more will happen"):
        some(UNKIND["all at once"])


def test_a_machine_that_counts_what_came_too_late_is_caught(monkeypatch):
    def lax(state, event):
        if event.address.node not in state.tasks:
            return state, ()
        answers = {**state.answers, event.address.node: event.digest}
        return tries.settle(machine.replace(state, answers=answers), event.now)

    monkeypatch.setattr(machine, "TABLE", {**machine.TABLE, (Phase.TRAINING, events.Appended): lax})
    with pytest.raises(AssertionError, match=r"what counts isn't what the log holds for that round|counted is gone"):
        some(UNKIND["slow"], deadline=12)


def test_a_machine_that_forgets_who_is_at_work_is_caught(monkeypatch):
    """Asked anew while it trains, a node gives up what it does: its update is lost, or comes as of another round."""
    draw = tries.draw
    monkeypatch.setattr(tries, "draw", lambda state: draw(tries.replace(state, tasks={})))
    with pytest.raises(AssertionError):
        some(UNKIND["slow"], buffer=2)
