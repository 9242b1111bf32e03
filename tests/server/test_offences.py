"""How long an update may be, and who is held out: the same whatever the order of arrival, and after a restart."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.federation import plan
from tests.server.test_machine import NODES, feed, joined, of

from atoll.errors import PlanError
from atoll.plan import Checks
from atoll.server import events, machine
from atoll.server.offences import EARLY, ENOUGH, STRETCH, WINDOW, Conduct, Length, bound, too_long
from atoll.server.resume import conduct_of
from atoll.server.state import Phase, State, waiting_for
from atoll.server.status import status
from atoll.store import UpdateRow
from atoll.wire import Address

lengths = st.lists(st.builds(Length, st.floats(1e-3, 1e3), st.integers(1, 50)), min_size=1, max_size=5)
STEPS = 2
"""That the tiny plan has a node make with a row or few."""


def alike(*norms: float) -> list[Length]:
    return [Length(norm, 1) for norm in norms]


def begin(rounds: int = 30, checks: dict[str, Any] | None = None, **cohort: Any) -> State:
    return machine.begin("run", plan(plan={"rounds": rounds}, cohort=cohort, checks=checks or {}), "model-0", 0.0)[0]


def came(state: State, node: str, norm: float = 1.0) -> events.Appended:
    address = Address("run", state.round, state.attempt, node)
    return events.Appended(1.0, address, f"{state.round} {state.attempt} {node}", 100, Length(norm, STEPS))


def refused(state: State, node: str) -> events.Refused:
    address = Address("run", state.round, state.attempt, node)
    return events.Refused(1.0, address, f"{state.round} {state.attempt} {node}", 100, "it holds NaN")


def a_round(state: State, norms: dict[str, float], bad: tuple[str, ...] = ()) -> tuple[machine.State, list[Any]]:
    """Let one round happen whole; return what was said of it."""
    asked = [node for node in state.cohort if node not in bad]
    state, first = feed(state, *(refused(state, node) for node in bad if node in state.asked))
    state, second = feed(state, *(came(state, node, norms.get(node, 1.0)) for node in asked))
    state, third = feed(state, events.Closed(2.0, f"model {state.round}"))
    return state, [*first, *second, *third]


def test_there_is_no_bound_before_enough_rounds_are_closed():
    conduct = Conduct()
    for k in range(ENOUGH):
        assert bound(conduct, Checks(norm=10.0)) is None, k
        conduct = conduct.closed(alike(1.0, 2.0, 3.0))
    assert bound(conduct, Checks(norm=10.0)) == 20.0
    assert bound(conduct, Checks(norm=0.0)) is None


@given(st.lists(lengths, min_size=ENOUGH, max_size=2 * WINDOW), st.floats(1, 100), st.integers(1, 1000), st.randoms())
def test_the_bound_is_the_running_median_and_no_update_of_usual_length_is_ever_refused(rounds, norm, steps, dice):
    conduct, other = Conduct(), Conduct()
    for came_in in rounds:
        conduct = conduct.closed(came_in)
        other = other.closed(dice.sample(came_in, len(came_in)))
    assert conduct == other
    assert len(conduct.medians) <= WINDOW
    most = bound(conduct, Checks(norm=norm), steps)
    assert most is not None
    middle = sorted(one[0] for one in conduct.medians)
    assert most >= norm * middle[(len(middle) - 1) // 2]
    assert most >= EARLY * conduct.longest
    assert most <= max(STRETCH * norm * middle[len(middle) // 2], EARLY * conduct.longest) * (1 + 1e-9)
    assert too_long(conduct, Checks(norm=norm), Length(conduct.longest, steps)) is None
    assert too_long(conduct, Checks(norm=norm), Length(most * 1.01, steps)) is not None


def test_who_made_more_steps_may_be_longer_up_to_a_point():
    conduct = Conduct()
    for _ in range(ENOUGH):
        conduct = conduct.closed([Length(1.0, 10), Length(1.0, 10), Length(2.0, 20)])
    checks = Checks(norm=10.0)
    assert [bound(conduct, checks, steps) for steps in (1, 10, 50, 10**3, 10**9)] == pytest.approx([10, 10, 50, 1000, 1000])


def test_a_minority_does_not_move_the_bound_and_a_newcomer_is_let_in_after_training_settled():
    checks, conduct = Checks(norm=10.0), Conduct()
    for k in range(40):
        usual = 1.0 / (1 + k) ** 2
        conduct = conduct.closed(alike(usual, usual, usual, 9 * usual, 9 * usual))
    assert bound(conduct, checks) == 3.0
    assert too_long(conduct, checks, Length(2.9, 1)) is None
    assert "checks.norm = 10 times what is usual" in str(too_long(conduct, checks, Length(3.1, 1)))


def test_updates_that_are_all_zero_set_no_bound():
    conduct = Conduct().closed(alike(0.0)).closed(alike(0.0)).closed(alike(0.0))
    assert too_long(conduct, Checks(norm=10.0), Length(5.0, 1)) is None


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_what_is_too_long_is_refused_whenever_it_comes(order):
    state, _ = feed(begin(checks={"norm": 10.0}, minimum=3, quorum=1.0), joined(4))
    for _ in range(ENOUGH):
        state, _ = a_round(state, {})
    nodes = list(joined(4).nodes)
    norms = {nodes[0]: 500.0}
    state, commands = feed(state, *(came(state, nodes[k], norms.get(nodes[k], 1.0)) for k in order))
    (close,) = of(events.Close, commands)
    assert set(close.accepted) == set(nodes[1:])
    (judge,) = of(events.Judge, commands)
    assert (judge.address.node, judge.accepted, judge.offence, judge.norm) == (nodes[0], False, True, 500.0)
    state, _ = feed(state, events.Closed(2.0, "next"))
    assert state.conduct.medians[-1] == (1.0, 1.0 / STEPS), "what didn't count has no say in what is usual"


def test_after_repeated_offences_a_node_is_held_out_told_so_and_welcome_again():
    checks = {"offences": 2, "held_out": 3}
    state, _ = feed(begin(checks=checks, minimum=3), joined(4))
    rogue = next(iter(NODES))
    asked, told = [], []
    for _ in range(12):
        asked.append(rogue in state.asked)
        state, commands = a_round(state, {}, bad=(rogue,))
        told += [one.reason for one in of(events.Judge, commands) if one.offence]
    assert asked == [True, True, False, False, False] * 2 + [True, True]
    assert told[0] == "it holds NaN"
    assert told[1] == "it holds NaN; after 2 such updates the node is held out until round 5 is over"
    assert told[3].endswith("until round 10 is over")


def test_who_declines_or_is_late_commits_no_offence():
    state, _ = feed(begin(checks={"offences": 1}, minimum=3), joined(4))
    rogue = next(iter(NODES))
    late = came(state, rogue)
    for _ in range(5):
        decline = events.Declined(1.0, Address("run", state.round, state.attempt, rogue), "the data is gone")
        state, _ = feed(state, decline)
        state, _ = a_round(state, {}, bad=())
        state, commands = feed(state, late, events.Refused(3.0, late.address, "x", 1, "NaN"))
        assert not any(one.offence for one in of(events.Judge, commands))
        assert rogue in state.asked


def test_held_out_nodes_make_the_wait_say_so_and_it_ends_at_its_deadline():
    state, _ = feed(begin(checks={"offences": 1, "held_out": 5}, minimum=3, deadline=60), joined(3))
    rogue = next(iter(NODES))
    state, commands = feed(state, refused(state, rogue), *(came(state, node) for node in list(NODES)[1:3]))
    assert state.phase is Phase.WAITING
    assert state.attempt == 2
    assert of(events.Wake, commands)
    said = waiting_for(state, 1.0)
    assert "2 of at least 3 nodes are here; held out for refused updates: name-9 until round 6 is over" in said
    state, commands = feed(state, events.Tick(state.until + 1))
    assert state.outcome == "gave_up"
    assert "held out" in state.reason


def test_status_says_who_is_held_out_and_until_when():
    state, _ = feed(begin(checks={"offences": 1, "held_out": 5}, minimum=3), joined(4))
    rogue = next(iter(NODES))
    state, _ = a_round(state, {}, bad=(rogue,))
    (shown,) = [one for one in status(state, 3.0, 1000.0, {}, {}, {}, log=None, store=None)["nodes"] if one["node"] == rogue]
    assert (shown["doing"], shown["asked"]) == ("held_out", False)
    assert shown["reason"] == "its updates were refused; until round 6 is over"


def test_held_out_nodes_are_not_asked_again_when_they_come_back():
    state, _ = feed(begin(checks={"offences": 1, "held_out": 5}, minimum=3, quorum=1.0), joined(5))
    rogue = next(iter(NODES))
    state, _ = feed(state, refused(state, rogue), events.Lost(1.0, rogue))
    state, commands = feed(state, events.Joined(1.5, {rogue: NODES[rogue]}))
    assert not of(events.Train, commands)


def test_a_log_that_is_read_again_counts_no_offence_twice():
    checks = Checks(offences=2, held_out=4)
    first, again = Address("run", 1, 1, "n"), Address("run", 1, 2, "n")
    once = Conduct().offended(checks, first)
    assert once.offended(checks, first) == once
    twice = once.offended(checks, again)
    assert twice.held_out("n", 1)
    assert twice.held_out("n", 5)
    assert not twice.held_out("n", 6)
    assert twice.offended(checks, first) == twice


def test_the_store_gives_back_what_the_machine_knew():
    agreed = plan(plan={"rounds": 30}, cohort={"minimum": 3}, checks={"offences": 2, "held_out": 3})
    state, _ = feed(machine.begin("run", agreed, "model-0", 0.0)[0], joined(5))
    rogue, rows = next(iter(NODES)), []
    for k in range(9):
        round_, accepted = state.round, [node for node in state.cohort if node != rogue]
        norms = {node: k + place / 7 for place, node in enumerate(state.cohort)}
        state, commands = a_round(state, norms, bad=(rogue,))
        rows += [
            UpdateRow(*one.address, "rejected", one.digest, reason=one.reason, offence=True)
            for one in of(events.Judge, commands)
            if one.offence
        ]
        rows += [
            UpdateRow("run", round_, 1, node, "accepted", place=place, norm=norms[node]) for place, node in enumerate(accepted)
        ]
    assert conduct_of(agreed, rows) == state.conduct
    assert state.conduct.until


@pytest.mark.parametrize(
    ("checks", "said"),
    [
        ({"norm": 0.5}, "checks: norm is 0, for no bound, or at least 1"),
        ({"norm": -1.0}, "checks.norm: Input should be greater than or equal to 0"),
        ({"offences": 0}, "checks.offences"),
        ({"held": 3}, "checks.held: unknown key; did you mean 'held_out'?"),
    ],
)
def test_a_mistake_in_the_plan_is_said(checks, said):
    with pytest.raises(PlanError, match=said.replace("?", r"\?")):
        plan(checks=checks)
