"""The node's machine: what was trained is resent and never trained again, and every wait ends."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from atoll.messages import EndSession, StartTraining, Verdict
from atoll.node import events, machine
from atoll.node.machine import Phase

DIGEST = "a" * 64
END = EndSession(run="run", rounds=2, model=DIGEST, outcome="completed")


def task(round_: int = 1, attempt: int = 1) -> StartTraining:
    return StartTraining(run="run", round=round_, attempt=attempt, model=DIGEST, deadline=20.0)


def verdict(round_: int = 1, *, accepted: bool = True) -> Verdict:
    return Verdict(run="run", round=round_, attempt=1, digest=DIGEST, accepted=accepted)


def feed(state: machine.State, *happened: events.Event) -> tuple[machine.State, list[Any]]:
    commands: list[Any] = []
    for event in happened:
        state, more = machine.transition(state, event)
        commands += more
    return state, commands


def kinds(commands: list[Any]) -> list[str]:
    return [type(command).__name__ for command in commands]


def start() -> machine.State:
    return feed(machine.begin(60.0)[0], events.Connected(0.0))[0]


def test_a_round_from_asked_to_judged():
    state, commands = feed(
        start(),
        events.Asked(0.0, task()),
        events.Trained(1.0, task(), DIGEST),
        events.Appended(2.0, task()),
        events.Judged(3.0, verdict()),
    )
    assert kinds(commands) == ["Train", "Append", "Say", "Settle"]
    assert state.phase is Phase.IDLE


def test_asked_again_for_what_is_in_hand_trains_nothing_new():
    state, _ = feed(start(), events.Asked(0.0, task()))
    assert feed(state, events.Asked(1.0, task()))[1] == []
    state, _ = feed(state, events.Trained(1.0, task(), DIGEST), events.Appended(2.0, task()))
    assert kinds(feed(state, events.Asked(3.0, task()))[1]) == ["Say"]


def test_a_newer_task_takes_the_place_of_the_old_one():
    state, commands = feed(start(), events.Asked(0.0, task(1)), events.Asked(1.0, task(2)))
    assert kinds(commands) == ["Train", "Train"]
    assert feed(state, events.Trained(2.0, task(1), DIGEST))[1] == []
    assert kinds(feed(state, events.Trained(2.0, task(2), DIGEST))[1]) == ["Append"]


def test_an_older_task_is_no_task():
    state, _ = feed(start(), events.Asked(0.0, task(2, 2)))
    for older in (task(1, 3), task(2, 1)):
        after, commands = feed(state, events.Asked(1.0, older))
        assert (after, commands) == (state, [])


def test_a_lost_channel_is_dialled_with_growing_pauses_and_the_update_is_told_on_return():
    state, _ = feed(start(), events.Asked(0.0, task()), events.Trained(1.0, task(), DIGEST), events.Disconnected(1.0))
    state, commands = feed(state, events.Appended(2.0, task()))
    assert commands == []
    assert state.dial_at == 1.0 + machine.SHORTEST
    state, commands = feed(state, events.Tick(1.3), events.Disconnected(1.3))
    assert kinds(commands) == ["Dial", "Wake"]
    assert state.dial_at == 1.3 + 2 * machine.SHORTEST
    assert kinds(feed(state, events.Connected(2.0))[1]) == ["Say"]
    assert [machine.pause(k) for k in (1, 2, 3, 99)] == [0.25, 0.5, 1.0, machine.LONGEST]


def test_sending_is_tried_again_until_it_goes_through():
    state, _ = feed(start(), events.Asked(0.0, task()), events.Trained(1.0, task(), DIGEST))
    state, commands = feed(state, events.Unanswered(1.0, task()), events.Tick(1.1))
    assert kinds(commands) == ["Wake"]
    assert kinds(feed(state, events.Tick(1.3))[1]) == ["Append"]


def test_a_model_that_did_not_come_is_asked_for_again_and_never_declined():
    state, commands = feed(start(), events.Asked(0.0, task()), events.Unanswered(1.0, task()), events.Tick(1.3))
    assert kinds(commands) == ["Train", "Wake", "Train"]
    state, commands = feed(state, events.Unanswered(2.0, task()), events.Asked(2.1, task(2)), events.Tick(3.0))
    assert [command.task for command in commands if isinstance(command, events.Train)] == [task(2)]


def test_what_cannot_be_trained_is_declined_with_the_reason():
    state, commands = feed(start(), events.Asked(0.0, task()), events.CannotTrain(1.0, task(), "NaN"))
    assert commands[-1] == events.Refuse(task(), "NaN")
    assert state.phase is Phase.IDLE


def test_the_end_is_taken_even_if_the_model_comes_late():
    state, commands = feed(start(), events.Told(0.0, END), events.NotTaken(1.0), events.Tick(1.3), events.Taken(2.0))
    assert kinds(commands) == ["Take", "Wake", "Take", "Leave"]
    assert state.phase is Phase.ENDED


def test_a_server_that_stays_away_too_long_is_given_up():
    state, commands = feed(start(), events.Disconnected(0.0), events.Tick(1.0), events.Disconnected(60.0))
    assert commands[-1] == events.Leave(None)
    assert state.phase is Phase.ENDED


def test_the_table_knows_every_event():
    assert set(machine.TABLE) == set(events.Event.__subclasses__())


class AnyOrder(RuleBasedStateMachine):
    """What can happen to a node, in any order."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.state, _ = machine.begin(60.0)
        self.trains: list[StartTraining] = []
        self.left = 0

    def happen(self, event: events.Event) -> None:
        self.state, commands = machine.transition(self.state, event)
        for command in commands:
            if isinstance(command, events.Train):
                self.trains.append(command.task)
            if isinstance(command, events.Leave):
                self.left += 1

    @rule(round_=st.integers(1, 3))
    def asked(self, round_: int) -> None:
        self.happen(events.Asked(self.now, task(round_)))

    @rule(round_=st.integers(1, 3), what=st.sampled_from(["trained", "appended", "not", "cannot"]))
    def worked(self, round_: int, what: str) -> None:
        happened = {
            "trained": events.Trained(self.now, task(round_), DIGEST),
            "appended": events.Appended(self.now, task(round_)),
            "not": events.Unanswered(self.now, task(round_)),
            "cannot": events.CannotTrain(self.now, task(round_), "no"),
        }
        self.happen(happened[what])

    @rule(back=st.booleans())
    def channel(self, back: bool) -> None:
        self.happen(events.Connected(self.now) if back else events.Disconnected(self.now))

    @rule(round_=st.integers(1, 3), accepted=st.booleans())
    def judged(self, round_: int, accepted: bool) -> None:
        self.happen(events.Judged(self.now, verdict(round_, accepted=accepted)))

    @rule(seconds=st.sampled_from([0.1, 1.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.happen(events.Tick(self.now))

    @rule()
    def told(self) -> None:
        self.happen(events.Told(self.now, END))

    @invariant()
    def leaves_once_and_only_then_ended(self) -> None:
        assert self.left <= 1
        assert (self.state.phase is Phase.ENDED) == (self.left == 1)

    @invariant()
    def a_digest_is_held_only_with_its_task(self) -> None:
        if self.state.phase in (Phase.SENDING, Phase.SENT):
            assert self.state.task is not None
            assert self.state.digest is not None

    @invariant()
    def away_from_the_server_there_is_a_time_to_dial(self) -> None:
        if not self.state.connected and self.state.phase is not Phase.ENDED and self.state.dials:
            assert self.state.dial_at is not None or self.state.away is not None


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
