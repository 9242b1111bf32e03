"""The server's machine: whatever happens, in whatever order, each accepted update is in one aggregate and the run ends."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.federation import plan

from atoll.server import events, machine, tries
from atoll.server.state import Phase, State, waiting_for
from atoll.wire import Address

NODES = {f"id-{k}": f"name-{9 - k}" for k in range(5)}


def begin(rounds: int = 2, **cohort: Any) -> State:
    return machine.begin("run", plan(plan={"rounds": rounds}, cohort=cohort), "model-0", 0.0)[0]


def feed(state: State, *happened: events.Event) -> tuple[State, list[events.Command]]:
    commands: list[events.Command] = []
    for event in happened:
        state, more = machine.transition(state, event)
        commands += more
    return state, commands


def joined(count: int = 3, now: float = 0.0) -> events.Joined:
    return events.Joined(now, dict(list(NODES.items())[:count]))


def update(state: State, node: str, now: float = 1.0, digest: str = "") -> events.Appended:
    return events.Appended(now, Address("run", state.round, state.attempt, node), digest or f"digest of {node}")


def of(kind: type, commands: list[events.Command]) -> list[Any]:
    return [command for command in commands if isinstance(command, kind)]


def test_nobody_waits_for_a_revoked_node_and_nothing_of_it_counts():
    state, _ = feed(begin(quorum=1.0), joined(5))
    *others, last = joined(5).nodes
    state, commands = feed(state, *(update(state, node) for node in others), events.Revoked(2.0, last))
    (close,) = of(events.Close, commands)
    assert set(close.accepted) == set(others)

    state, _ = feed(begin(quorum=1.0), joined(5))
    state, commands = feed(state, update(state, last), events.Revoked(2.0, last), events.Revoked(2.5, last), update(state, last))
    assert [(judged.address.node, judged.accepted) for judged in of(events.Judge, commands)] == [(last, False)] * 2
    state, commands = feed(state, *(update(state, node) for node in others))
    (close,) = of(events.Close, commands)
    assert set(close.accepted) == set(others)
    assert last not in state.present


def test_a_run_ends_without_a_revoked_node_that_has_not_said_goodbye():
    state, _ = feed(begin(), joined(3), events.Stop(1.0, "enough"))
    state, commands = feed(state, *(events.Revoked(2.0, node) for node in joined(3).nodes))
    assert state.phase is Phase.ENDED
    assert of(events.Finish, commands)


def test_a_round_starts_with_the_minimum_and_not_before():
    state, commands = feed(begin(), joined(2))
    assert state.phase is Phase.WAITING
    assert not of(events.Train, commands)
    state, commands = feed(state, joined(3))
    (train,) = of(events.Train, commands)
    assert set(train.nodes) == set(joined(3).nodes)
    assert (train.round, train.attempt, train.model) == (1, 1, "model-0")


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_fold_is_in_the_order_of_names_whatever_the_order_of_arrival(order):
    state, _ = feed(begin(), joined())
    nodes = list(joined().nodes)
    state, commands = feed(state, *(update(state, nodes[k]) for k in order))
    (close,) = of(events.Close, commands)
    assert list(close.accepted) == ["id-2", "id-1", "id-0"]


def test_quorum_and_grace_then_close_without_the_slow_one():
    state, _ = feed(begin(minimum=2, quorum=0.5, grace=5), events.Joined(0.0, NODES))
    nodes = list(NODES)
    state, commands = feed(state, update(state, nodes[0]))
    assert not of(events.Wake, commands)
    state, commands = feed(state, update(state, nodes[1], 2.0), update(state, nodes[2], 3.0))
    assert of(events.Wake, commands)[-1].at == 8.0
    assert not of(events.Close, feed(state, events.Tick(7.9))[1])
    state, commands = feed(state, events.Tick(8.0))
    assert set(of(events.Close, commands)[0].accepted) == set(nodes[:3])
    state, commands = feed(state, update(state, nodes[3], 8.5))
    assert not commands, "it is kept for the next round"
    state, commands = feed(state, events.Closed(9.0, "model-1"))
    (train,) = of(events.Train, commands)
    assert set(train.nodes) == set(nodes[:3])
    assert set(train.late) == set(nodes[3:])
    state, commands = feed(state, *(update(state, node, 10.0) for node in nodes[:3]))
    (close,) = of(events.Close, commands)
    assert set(close.accepted) == set(nodes[:4])
    assert {node: (task.round, task.model) for node, task in close.late.items()} == {nodes[3]: (1, "model-0")}
    state, commands = feed(state, events.Closed(11.0, "model-2"))
    assert [(one.address.node, one.address.round) for one in of(events.Judge, commands) if one.address.round == 1] == [
        (nodes[3], 1)
    ]


def test_an_algorithm_that_can_fold_no_late_update_leaves_nobody_at_work():
    agreed = plan(cohort={"minimum": 2, "quorum": 0.5, "grace": 0})
    state, _ = feed(machine.begin("run", agreed, "model-0", 0.0, late=False)[0], joined(3))
    state, _ = feed(state, update(state, "id-0"), update(state, "id-1"))
    assert state.phase is Phase.CLOSING
    state, commands = feed(state, update(state, "id-2", 2.0))
    (judge,) = of(events.Judge, commands)
    assert not judge.accepted
    assert "too late" in judge.reason
    _, commands = feed(state, events.Closed(3.0, "model-1"))
    assert set(of(events.Train, commands)[0].nodes) == set(joined(3).nodes)


def test_a_round_with_too_few_is_tried_again_and_then_given_up():
    state, _ = feed(begin(), joined())
    for attempt in range(1, tries.ATTEMPTS + 1):
        assert (state.round, state.attempt, state.phase) == (1, attempt, Phase.TRAINING)
        stale = update(state, "id-0", state.until - 1)
        state, _ = feed(state, stale)
        state, commands = feed(state, events.Tick(state.until))
        (judge,) = of(events.Judge, commands)
        assert not judge.accepted
    assert state.phase is Phase.ENDING
    (end,) = of(events.End, commands)
    assert end.outcome == "gave_up"
    assert "1 of at least 3 updates came" in end.reason


def test_waiting_for_nodes_has_a_deadline_too():
    state, commands = feed(begin(), joined(1), events.Tick(20.0))
    assert of(events.End, commands)[0].outcome == "gave_up"
    state, commands = feed(state, events.Left(21.0, "id-0"))
    assert of(events.Finish, commands)
    assert state.phase is Phase.ENDED
    assert of(events.Finish, feed(begin(), events.Tick(20.0))[1]), "nobody to say goodbye to"


def test_all_declined_ends_without_waiting_for_the_deadline():
    state, _ = feed(begin(), joined())
    commands: list[events.Command] = []
    while state.phase is Phase.TRAINING:
        address = Address("run", state.round, state.attempt, state.missing[0])
        state, commands = feed(state, events.Declined(1.0, address, "disk full"))
    assert "name-9: disk full" in of(events.End, commands)[0].reason


def test_one_update_counts_for_a_node_and_the_same_again_is_nothing_new():
    state, _ = feed(begin(), joined())
    state, commands = feed(state, update(state, "id-0"), update(state, "id-0"))
    assert not of(events.Judge, commands)
    state, commands = feed(state, update(state, "id-0", digest="another"))
    assert "already answered" in of(events.Judge, commands)[0].reason


def test_a_node_that_returns_is_asked_again_and_a_late_one_in_the_next_round():
    state, _ = feed(begin(), joined(), events.Lost(1.0, "id-1"))
    state, commands = feed(state, events.Joined(2.0, {"id-1": "name-8"}), events.Joined(2.0, {"id-4": "name-5"}))
    (again,) = of(events.Train, commands)
    assert (again.nodes, again.again) == (("id-1",), True)
    state, _ = feed(state, *(update(state, node) for node in joined().nodes))
    state, commands = feed(state, events.Closed(3.0, "model-1"))
    (train,) = of(events.Train, commands)
    assert "id-4" in train.nodes
    assert not train.again


def test_a_fraction_of_the_nodes_is_drawn_and_the_same_on_every_replay():
    draws = [feed(begin(fraction=0.6), events.Joined(0.0, NODES))[0].cohort for _ in range(2)]
    assert draws[0] == draws[1]
    assert len(draws[0]) == 3


def test_stopping_in_mid_round_and_while_closing():
    state, _ = feed(begin(), joined())
    _, commands = feed(state, update(state, "id-0"), events.Stop(2.0, "enough"))
    assert [judge.accepted for judge in of(events.Judge, commands)] == [False]
    state, _ = feed(state, *(update(state, node) for node in joined().nodes))
    state, commands = feed(state, events.Stop(2.0, "enough"), events.Closed(3.0, "model-1"))
    assert [judge.accepted for judge in of(events.Judge, commands)] == [True] * 3
    assert of(events.End, commands)[0].outcome == "stopped"


@pytest.mark.parametrize("happened", [(), (joined(2),), (joined(3), events.Lost(1.0, "id-0"))])
def test_what_is_waited_for_is_one_line_with_the_time_left(happened):
    state, _ = feed(begin(), *happened)
    said = waiting_for(state, 5.0)
    assert "15 s left" in said
    assert "\n" not in said
    if len(happened) == 2:
        assert "name-9 (lost)" in said


class AnyOrder(RuleBasedStateMachine):
    """Joins, losses, updates (doubled, late, of strangers), refusals, stops and time, in any order."""

    @initialize(
        minimum=st.integers(1, 3),
        quorum=st.sampled_from([0.5, 0.8, 1.0]),
        grace=st.sampled_from([0.0, 5.0]),
        more=st.sampled_from([None, 0, 1]),
        late=st.booleans(),
    )
    def start(self, minimum: int, quorum: float, grace: float, more: int | None, late: bool) -> None:
        self.now, self.woken = 0.0, 20.0
        buffer = None if more is None or not late else minimum + more
        rules = {"minimum": minimum, "quorum": quorum, "grace": grace, "buffer": buffer}
        self.state = machine.begin("run", plan(plan={"rounds": 3}, cohort=rules), "model-0", 0.0, late=late)[0]
        self.closing: events.Close | None = None
        self.sent: dict[Address, str] = {}
        self.closed: list[events.Close] = []
        self.judged: list[events.Judge] = []
        self.finished = 0

    def happen(self, event: events.Event) -> None:
        before = self.state
        self.state, commands = machine.transition(self.state, event)
        assert machine.transition(before, event) == (self.state, commands), "a pure function"
        for command in commands:
            match command:
                case events.Close():
                    assert self.closing is None
                    self.closing = command
                case events.Train():
                    at_work = {node for node in command.nodes if before.busy(node) and before.tasks[node].until > self.now}
                    assert command.again or command.attempt > 1 or not at_work, "who is at work isn't asked"
                case events.Judge():
                    self.judged.append(command)
                case events.Wake():
                    self.woken = max(self.woken, command.at)
                case events.Finish():
                    self.finished += 1

    @rule(nodes=st.sets(st.sampled_from(list(NODES)), min_size=1))
    def join(self, nodes: set[str]) -> None:
        self.happen(events.Joined(self.now, {node: NODES[node] for node in sorted(nodes)}))

    @rule(node=st.sampled_from(list(NODES)))
    def lose(self, node: str) -> None:
        self.happen(events.Lost(self.now, node))

    @rule(node=st.sampled_from([*NODES, "stranger"]), back=st.integers(0, 1), digest=st.sampled_from(["a", "b"]))
    def append(self, node: str, back: int, digest: str) -> None:
        address = Address("run", max(1, self.state.round - back), self.state.attempt, node)
        self.happen(events.Appended(self.now, address, digest))

    @precondition(lambda self: self.state.tasks)
    @rule(choose=st.randoms(use_true_random=False), digest=st.sampled_from(["a", "b"]), gives=st.booleans())
    def answer(self, choose: Any, digest: str, gives: bool) -> None:
        """Somebody who was asked, in this round or before, gives an update or declines."""
        node, task = choose.choice(sorted(self.state.tasks.items()))
        address = Address("run", task.round, task.attempt, node)
        told = events.Appended(self.now, address, digest) if gives else events.Declined(self.now, address, "no")
        self.happen(told)

    @rule(node=st.sampled_from(list(NODES)))
    def revoke(self, node: str) -> None:
        self.happen(events.Revoked(self.now, node))

    @rule(node=st.sampled_from(list(NODES)))
    def decline(self, node: str) -> None:
        self.happen(events.Declined(self.now, Address("run", self.state.round, self.state.attempt, node), "no"))

    @precondition(lambda self: self.closing)
    @rule(works=st.booleans())
    def finish_closing(self, works: bool) -> None:
        close, self.closing = self.closing, None
        assert close
        if works:
            self.closed.append(close)
            self.happen(events.Closed(self.now, f"model-{close.round}"))
        else:
            self.happen(events.Broken(self.now, "disk full"))

    @rule(node=st.sampled_from(list(NODES)))
    def leave(self, node: str) -> None:
        self.happen(events.Left(self.now, node))

    @rule(seconds=st.sampled_from([0.5, 3.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.happen(events.Tick(self.now))

    @rule()
    def stop(self) -> None:
        self.happen(events.Stop(self.now, "asked"))

    @invariant()
    def each_accepted_update_is_in_exactly_one_aggregate(self) -> None:
        accepted = [(judge.address.round, judge.address.node, judge.digest) for judge in self.judged if judge.accepted]
        folded = [
            (close.late[node].round if node in close.late else close.round, node, digest)
            for close in self.closed
            for node, digest in close.accepted.items()
        ]
        assert accepted == folded
        assert len(set(folded)) == len(folded), "no update counts twice"
        assert all(task.round < close.round for close in self.closed for task in close.late.values())

    @invariant()
    def nobody_is_asked_for_two_things_at_once(self) -> None:
        if self.state.phase is Phase.TRAINING:
            assert set(self.state.cohort) == set(self.state.tasks)
            assert self.state.answers.keys() <= self.state.tasks.keys()
        assert self.state.closing.keys() <= self.state.tasks.keys()
        assert all(task.until <= self.woken for task in self.state.tasks.values()), "each task's deadline is woken for"

    @invariant()
    def rounds_are_closed_once_in_order_with_enough_updates(self) -> None:
        assert [close.round for close in self.closed] == list(range(1, len(self.closed) + 1))
        assert len(self.closed) <= 3
        for close in self.closed:
            assert len(close.accepted) >= self.state.rules.minimum
            names = [NODES[node] for node in close.accepted]
            assert names == sorted(names)

    @invariant()
    def every_wait_has_an_end_that_was_asked_for(self) -> None:
        if self.state.phase in (Phase.WAITING, Phase.TRAINING, Phase.ENDING):
            assert self.woken >= self.state.until
        assert self.finished <= 1 or self.state.phase is Phase.ENDED
        assert "\n" not in waiting_for(self.state, self.now)

    def teardown(self) -> None:
        """With nothing but time passing, it ends."""
        for _ in range(40):
            if self.closing:
                self.finish_closing(works=True)
            self.now += 30.0
            self.happen(events.Tick(self.now))
        assert self.state.phase is Phase.ENDED
        assert self.finished == 1
        assert self.state.outcome in ("completed", "gave_up", "stopped")
        self.each_accepted_update_is_in_exactly_one_aggregate()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)


@given(st.data())
def test_the_same_accepted_set_gives_the_same_close(data):
    state, _ = feed(begin(), joined(3))
    nodes = data.draw(st.permutations(list(joined(3).nodes)))
    noise = [events.Lost(1.0, "id-1"), joined(3), events.Tick(2.0), *(update(state, node) for node in nodes)]
    mixed = data.draw(st.permutations([*noise, *(update(state, node) for node in nodes)]))
    _, commands = feed(state, *mixed)
    assert of(events.Close, commands)[0].accepted == {node: f"digest of {node}" for node in ("id-2", "id-1", "id-0")}
