"""The node's side of a run as a pure state machine: no I/O, no clock, no randomness.

Enters: events, each with `now` in seconds. Leaves: a new frozen state, and the commands that follow from it.

    IDLE ─ asked ─▶ TRAINING ─ trained ─▶ SENDING ─ durable ─▶ SENT ─ verdict ─▶ IDLE … ─ end ─▶ TAKING ─▶ ENDED

Being connected is a matter of its own: a node trains on, and sends, while the control channel is away, and
tells the server when it is back. An update that was trained is resent as it was, never trained again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, cast

from atoll.messages import UPDATE, EndSession, FlUpdate, StartTraining
from atoll.node.events import (
    Answer,
    Append,
    Appended,
    Asked,
    CannotTrain,
    Command,
    Connected,
    Dial,
    Disconnected,
    Event,
    Fitted,
    Judged,
    Leave,
    NotTaken,
    Protect,
    Refuse,
    Said,
    Say,
    Settle,
    Take,
    Taken,
    Tick,
    Told,
    Train,
    Trained,
    Unanswered,
    Wake,
)

SHORTEST, LONGEST = 0.25, 30.0
"""The first and the longest pause between tries, in seconds; each pause is twice the one before."""


class Phase(Enum):
    """What a node is doing for the server."""

    IDLE = "waiting to be asked"
    TRAINING = "training"
    SENDING = "sending its update"
    SENT = "waiting for the round to close"
    TAKING = "taking the final model"
    ENDED = "ended"


@dataclass(frozen=True)
class State:
    """A node, as it sees itself.

    Args:
        patience: how long the server may stay away, in seconds, before the node gives up.
        away: since when it is away.
        connected: whether the control channel is open.
        first: the first phase of the plan's link, which is answered as soon as training is asked for; None without one.
        task: what the server asked for last.
        fitted: whether the model is trained, and waits for the link.
        told: what the link was told for protecting it.
        digest: of the update made for it.
        end: the server's goodbye.
        dials, tries: failed attempts in a row to connect, and to send or fetch.
        dial_at, try_at: when to try again.
    """

    patience: float
    first: str | None = None
    phase: Phase = Phase.IDLE
    connected: bool = False
    away: float | None = None
    task: StartTraining | None = None
    fitted: bool = False
    told: bytes | None = None
    digest: str | None = None
    end: EndSession | None = None
    dials: int = 0
    tries: int = 0
    dial_at: float | None = None
    try_at: float | None = None


Result = tuple[State, tuple[Command, ...]]


def begin(patience: float, first: str | None = None) -> Result:
    """Return a new node's state and its first command."""
    return State(patience, first), (Dial(),)


def transition(state: State, event: Event) -> Result:
    """Return what an event makes of a state, and what is to be done about it."""
    return TABLE[type(event)](state, event)


def pause(failures: int) -> float:
    """How long to wait after so many failures in a row, in seconds."""
    return float(min(LONGEST, SHORTEST * 2.0 ** min(failures - 1, 16)))


def _connected(state: State, event: Connected) -> Result:
    del event
    state = replace(state, connected=True, away=None, dials=0, dial_at=None)
    return state, (Say(_fl_update(state)),) if state.phase is Phase.SENT else ()


def _disconnected(state: State, event: Disconnected) -> Result:
    if state.phase is Phase.ENDED:
        return replace(state, connected=False), ()
    away = event.now if state.away is None else state.away
    if event.now - away >= state.patience:
        return replace(state, phase=Phase.ENDED, connected=False, dial_at=None, try_at=None), (Leave(state.end),)
    at = event.now + pause(state.dials + 1)
    return replace(state, connected=False, away=away, dials=state.dials + 1, dial_at=at), (Wake(at),)


def _asked(state: State, event: Asked) -> Result:
    """A task already in hand goes on; its finished update is sent again; any newer task takes its place."""
    task = event.task
    if state.end or (state.task and task.run == state.task.run and _key(task) < _key(state.task)):
        return state, ()
    if state.task and _key(task) == _key(state.task) and state.phase is not Phase.IDLE:
        return state, (Say(_fl_update(state)),) if state.phase is Phase.SENT else ()
    state = replace(state, phase=Phase.TRAINING, task=task, fitted=False, told=None, digest=None, tries=0, try_at=None)
    return state, (Train(task), *((Answer(task, state.first, b""),) if state.first else ()))


def _said(state: State, event: Said) -> Result:
    """Answer the link's phases while an update is on its way; the word to protect it waits until it is trained."""
    task = state.task
    if task is None or event.key != _key(task) or state.phase in (Phase.IDLE, Phase.TAKING, Phase.ENDED):
        return state, ()
    if event.phase != UPDATE:
        return state, (Answer(task, event.phase, event.body),)
    if state.phase is not Phase.TRAINING or state.told is not None:
        return state, ()
    return _protect(replace(state, told=event.body))


def _fitted(state: State, event: Fitted) -> Result:
    if not _current(state, event.task, Phase.TRAINING):
        return state, ()
    return _protect(replace(state, fitted=True, tries=0, try_at=None))


def _protect(state: State) -> Result:
    if state.task and state.fitted and state.told is not None:
        return state, (Protect(state.task, state.told),)
    return state, ()


def _trained(state: State, event: Trained) -> Result:
    if not _current(state, event.task, Phase.TRAINING):
        return state, ()
    return replace(state, phase=Phase.SENDING, digest=event.digest, tries=0, try_at=None), (Append(event.task),)


def _cannot_train(state: State, event: CannotTrain) -> Result:
    if _current(state, event.task, Phase.SENT):  # the update is in, but the link won't go on
        return state, (Refuse(event.task, event.reason),)
    if not _current(state, event.task, Phase.TRAINING, Phase.SENDING):
        return state, ()
    return replace(state, phase=Phase.IDLE, digest=None, tries=0, try_at=None), (Refuse(event.task, event.reason),)


def _appended(state: State, event: Appended) -> Result:
    if not _current(state, event.task, Phase.SENDING):
        return state, ()
    state = replace(state, phase=Phase.SENT, tries=0, try_at=None)
    return state, (Say(_fl_update(state)),) if state.connected else ()


def _unanswered(state: State, event: Unanswered) -> Result:
    return _later(state, event.now) if _current(state, event.task, Phase.TRAINING, Phase.SENDING) else (state, ())


def _judged(state: State, event: Judged) -> Result:
    verdict = event.verdict
    mine = state.task and state.digest == verdict.digest and _key(state.task) == (verdict.run, verdict.round, verdict.attempt)
    if not mine or state.phase not in (Phase.SENDING, Phase.SENT):
        return state, (Settle(verdict),)
    return replace(state, phase=Phase.IDLE, digest=None, tries=0, try_at=None), (Settle(verdict),)


def _told(state: State, event: Told) -> Result:
    if state.end:
        return state, ()
    return replace(state, phase=Phase.TAKING, end=event.end, task=None, tries=0, try_at=None), (Take(event.end),)


def _taken(state: State, event: Taken) -> Result:
    del event
    if state.phase is not Phase.TAKING or state.end is None:
        return state, ()
    return replace(state, phase=Phase.ENDED, dial_at=None, try_at=None), (Leave(state.end),)


def _not_taken(state: State, event: NotTaken) -> Result:
    return _later(state, event.now) if state.phase is Phase.TAKING else (state, ())


def _later(state: State, now: float) -> Result:
    at = now + pause(state.tries + 1)
    return replace(state, tries=state.tries + 1, try_at=at), (Wake(at),)


def _tick(state: State, event: Tick) -> Result:
    commands: tuple[Command, ...] = ()
    if state.try_at is not None and event.now >= state.try_at:
        state = replace(state, try_at=None)
        if state.phase is Phase.TRAINING and state.task:
            commands += (Train(state.task),)
        if state.phase is Phase.SENDING and state.task:
            commands += (Append(state.task),)
        if state.phase is Phase.TAKING and state.end:
            commands += (Take(state.end),)
    if state.dial_at is not None and event.now >= state.dial_at:
        state, commands = replace(state, dial_at=None), (*commands, Dial())
    return state, commands


def _current(state: State, task: StartTraining, *phases: Phase) -> bool:
    return state.phase in phases and state.task is not None and _key(state.task) == _key(task)


def _key(task: StartTraining) -> tuple[str, int, int]:
    return task.run, task.round, task.attempt


def _fl_update(state: State) -> FlUpdate:
    run, round_, attempt = _key(cast("StartTraining", state.task))
    return FlUpdate(run=run, round=round_, attempt=attempt, digest=cast("str", state.digest))


TABLE: Mapping[type[Event], Callable[[State, Any], Result]] = {
    Connected: _connected,
    Disconnected: _disconnected,
    Asked: _asked,
    Said: _said,
    Fitted: _fitted,
    Trained: _trained,
    CannotTrain: _cannot_train,
    Appended: _appended,
    Unanswered: _unanswered,
    Judged: _judged,
    Told: _told,
    Taken: _taken,
    NotTaken: _not_taken,
    Tick: _tick,
}
