"""The server's side of a run as a pure state machine: no I/O, no clock, no randomness.

Enters: events, each with `now` in seconds. Leaves: a new frozen state, and the commands that follow
from it. `TABLE` says what each phase makes of each event; deployment and simulation drive the same one.

    WAITING ─ minimum there ─▶ TRAINING ─ all, quorum + grace, or deadline ─▶ CLOSING ─▶ TRAINING … ─▶ ENDING ─▶ ENDED

A round that ends with fewer updates than the minimum is tried again, a few times; then the run gives up.
Every wait has a deadline: `Wake` asks for the next `Tick`, and `waiting_for` tells a person what is waited for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from atoll.plan import Plan
from atoll.server import offences
from atoll.server.events import (
    Appended,
    Broken,
    Close,
    Closed,
    Command,
    Declined,
    End,
    Event,
    Finish,
    Joined,
    Judge,
    Left,
    Lost,
    Outcome,
    Past,
    Refused,
    Revoked,
    Stop,
    Tick,
    Train,
    Wake,
)
from atoll.server.state import Phase, State, admits, here
from atoll.wire import Address

ATTEMPTS = 3
"""How often a round is tried before the run gives up."""
FAREWELL = 10.0
"""How long the server waits, in seconds, for nodes to take the final model; one that was just lost may come back for it."""


Result = tuple[State, tuple[Command, ...]]


def begin(run: str, plan: Plan, model: str, now: float) -> Result:
    """Return the first state of a run, which waits for nodes, and its first commands."""
    until = now + plan.cohort.deadline
    agreed = plan.plan.rounds, plan.plan.seed, plan.cohort, plan.stopping, plan.checks
    return State(run, *agreed, model, until), (Wake(until),)


def resume(run: str, plan: Plan, past: Past, now: float) -> Result:
    """Return the state of a run that another server left, and its first commands.

    A round that had begun goes on with its cohort: who joins is asked again, unless the log has brought its update by then.
    """
    state, commands = begin(run, plan, past.model, now)
    known: dict[str, Any] = {"names": past.names, "course": past.course, "conduct": past.conduct}
    done = replace(state, **known, round=min(past.closed + 1, state.rounds))
    over = past.course.over(plan.stopping) or (past.closed >= state.rounds and f"all {state.rounds} rounds are done")
    if over:
        return _farewell(done, "completed", over, now, past.answered)
    phase = Phase.TRAINING if past.cohort else Phase.WAITING
    return replace(done, phase=phase, attempt=past.attempt, cohort=past.cohort, asked=frozenset(past.cohort)), commands


def transition(state: State, event: Event) -> Result:
    """Return what an event makes of a state, and what is to be done about it."""
    return TABLE.get((state.phase, type(event)), _ignored)(state, event)


def _joined(state: State, event: Joined) -> State:
    return replace(state, names={**state.names, **event.nodes}, present=state.present | event.nodes.keys())


def _join_waiting(state: State, event: Joined) -> Result:
    return _start_if_enough(_joined(state, event), event.now)


def _join_training(state: State, event: Joined) -> Result:
    """A node that was asked and lost is asked again; a late one waits for the next round."""
    again = tuple(node for node in state.conduct.welcome(state.missing, state.round) if node in event.nodes)
    return _joined(state, event), (replace(_train(state, again, event.now), again=True),) if again else ()


def _join_closing(state: State, event: Joined) -> Result:
    return _joined(state, event), ()


def _join_ending(state: State, event: Joined) -> Result:
    state = _joined(state, event)
    return replace(state, leaving=state.leaving | event.nodes.keys()), (_end(state, tuple(event.nodes)),)


def _lost(state: State, event: Lost) -> Result:
    return replace(state, present=state.present - {event.node}), ()


def _revoked(state: State, event: Revoked) -> Result:
    """Nobody waits for the node any longer; what it sent in the open round doesn't count after all."""
    node, why = event.node, "the node was revoked"
    state = replace(state, present=state.present - {node}, leaving=state.leaving - {node})
    if state.phase is Phase.ENDING and not state.leaving:
        return _finish(state)
    if state.phase is not Phase.TRAINING or node not in state.cohort:
        return state, ()
    dropped = (Judge(_address(state, node), digest, False, why),) if (digest := state.answers.get(node)) else ()
    state = replace(state, answers={**state.answers, node: None}, declines={**state.declines, node: why})
    settled, commands = _settle(state, event.now)
    return settled, (*dropped, *commands)


def _left(state: State, event: Left) -> Result:
    state = replace(state, leaving=state.leaving - {event.node})
    return (state, ()) if state.leaving else _finish(state)


def _appended(state: State, event: Appended) -> Result:
    if reason := admits(state, event.address):
        return state, (Judge(event.address, event.digest, False, reason),)
    node = event.address.node
    if node in state.answers:
        if state.answers[node] == event.digest:
            return state, ()  # the same update again: it is in already
        return state, (Judge(event.address, event.digest, False, "the node has already answered in this round"),)
    if reason := offences.too_long(state.conduct, state.checks, event.norm):
        return _offended(state, event, reason, event.norm)
    norms = {**state.norms, node: event.norm}
    return _settle(replace(state, answers={**state.answers, node: event.digest}, norms=norms), event.now)


def _refused(state: State, event: Refused) -> Result:
    if admits(state, event.address) or event.address.node in state.answers:
        return _appended(state, Appended(event.now, event.address, event.digest))  # whatever it holds, it doesn't count
    return _offended(state, event, event.reason, None)


def _offended(state: State, event: Appended | Refused, reason: str, norm: float | None) -> Result:
    """Refuse an update for what it holds; nobody waits for the node in this round, nor in later ones if it does so often."""
    node = event.address.node
    conduct = state.conduct.offended(state.checks, event.address)
    if conduct.held_out(node, state.round):
        reason += f"; after {state.checks.offences} such updates the node is held out until round {conduct.until[node]} is over"
    judge = Judge(event.address, event.digest, False, reason, event.size, norm, offence=True)
    answers, declines = {**state.answers, node: None}, {**state.declines, node: reason}
    settled, commands = _settle(replace(state, conduct=conduct, answers=answers, declines=declines), event.now)
    return settled, (judge, *commands)


def _appended_elsewhen(state: State, event: Appended | Refused) -> Result:
    if state.phase is Phase.CLOSING and state.answers.get(event.address.node) == event.digest:
        return state, ()
    return state, (Judge(event.address, event.digest, False, admits(state, event.address) or "no round is open"),)


def _declined(state: State, event: Declined) -> Result:
    node = event.address.node
    if admits(state, event.address) or node in state.answers:
        return state, ()
    declines = {**state.declines, node: event.reason}
    return _settle(replace(state, answers={**state.answers, node: None}, declines=declines), event.now)


def _tick_waiting(state: State, event: Tick) -> Result:
    if event.now < state.until:
        return state, ()
    return _farewell(state, "gave_up", f"round {state.round}: the deadline is over and {here(state)}", event.now)


def _tick_training(state: State, event: Tick) -> Result:
    return _settle(state, event.now)


def _tick_ending(state: State, event: Tick) -> Result:
    return _finish(state) if event.now >= state.until else (state, ())


def _settle(state: State, now: float) -> Result:
    """Close the open round if it is over: all have answered, quorum + grace, or the deadline."""
    count = len(state.answers) - len(state.declines)  # told apart node by node only at the end: cohorts are large
    if len(state.answers) == len(state.cohort) or now >= state.until:
        return _close(state) if count >= state.rules.minimum else _again(state, now)
    if count < state.needed:
        return state, ()
    if state.enough is None:
        state = replace(state, enough=now, until=min(state.until, now + state.rules.grace))
        return (state, (Wake(state.until),)) if now < state.until else _close(state)
    return state, ()


def _close(state: State) -> Result:
    command = Close(state.round, state.attempt, state.accepted, len(state.cohort), len(state.names))
    return replace(state, phase=Phase.CLOSING), (command,)


def _again(state: State, now: float) -> Result:
    """Try a round with too few updates again; what had come for it doesn't count."""
    said = "; ".join(f"{state.names[node]}: {why}" for node, why in list(state.declines.items())[:3])
    reason = (
        f"round {state.round} attempt {state.attempt}: {len(state.accepted)} of at least {state.rules.minimum} "
        f"updates came{f' ({said})' if said else ''}"
    )
    last = state.attempt >= ATTEMPTS
    dropped = _drop(state, reason if last else f"{reason}; the round is tried again")
    if last:
        ended, commands = _farewell(state, "gave_up", reason, now)
        return ended, (*dropped, *commands)
    waiting = replace(_rest(state), phase=Phase.WAITING, attempt=state.attempt + 1, until=now + state.rules.deadline)
    started, commands = _start_if_enough(waiting, now)
    return started, (*dropped, *commands, *(() if started.phase is Phase.TRAINING else (Wake(waiting.until),)))


def _address(state: State, node: str) -> Address:
    return Address(state.run, state.round, state.attempt, node)


def _rest(state: State) -> State:
    return replace(state, cohort=(), asked=frozenset(), answers={}, norms={}, declines={}, enough=None)


def _closed(state: State, event: Closed) -> Result:
    verdicts = tuple(Judge(_address(state, node), digest, True) for node, digest in state.accepted.items())
    course = state.course.after(state.stopping, event.judged)
    norms = [norm for node in state.accepted if (norm := state.norms.get(node)) is not None]
    done = replace(_rest(state), model=event.model, attempt=1, course=course, conduct=state.conduct.closed(norms))
    if state.outcome:  # somebody asked to stop while the round was closing
        ended, commands = _farewell(done, state.outcome, state.reason, event.now, state.accepted)
    elif state.round >= state.rounds:
        ended, commands = _farewell(done, "completed", f"all {state.rounds} rounds are done", event.now, state.accepted)
    elif early := course.over(state.stopping):
        ended, commands = _farewell(done, "completed", early, event.now, state.accepted)
    else:
        until = event.now + state.rules.deadline
        ended, commands = _start_if_enough(replace(done, phase=Phase.WAITING, round=state.round + 1, until=until), event.now)
        commands = commands or (Wake(until),)
    return ended, (*verdicts, *commands)


def _start_if_enough(state: State, now: float) -> Result:
    welcome = state.conduct.welcome(state.present, state.round)
    if len(welcome) < (state.rules.cycle or state.rules.minimum):
        return state, ()
    if state.rules.cycle:
        drawn = [_next(state, welcome)]
    else:
        asked = max(state.rules.minimum, math.ceil(state.rules.fraction * len(welcome)))
        drawn = sorted(welcome, key=lambda node: _lot(state, node))[:asked]
    cohort = tuple(sorted(drawn, key=lambda node: (state.names[node], node)))
    until = now + state.rules.deadline
    state = replace(_rest(state), phase=Phase.TRAINING, cohort=cohort, asked=frozenset(cohort), until=until)
    return state, (_train(state, cohort, now), Wake(until))


def _lot(state: State, node: str) -> bytes:
    """A node's lot in the draw of a cohort: as good as random, and the same on every replay."""
    return hashlib.sha256(f"{state.seed} {state.round} {state.attempt} {state.names[node]} {node}".encode()).digest()


def _next(state: State, welcome: Iterable[str]) -> str:
    """Whose turn it is: everybody's once in a cycle, in an order that each cycle draws anew; who fails is passed over."""
    names = {state.names[node]: node for node in welcome}
    cycle, turn = divmod(state.round - 1, len(names))
    order = sorted(names, key=lambda name: hashlib.sha256(f"{state.seed} cycle {cycle} {name}".encode()).digest())
    return names[order[(turn + state.attempt - 1) % len(order)]]


def _train(state: State, nodes: tuple[str, ...], now: float) -> Train:
    return Train(nodes, state.round, state.attempt, state.model, max(0.0, state.until - now))


def _end(state: State, nodes: tuple[str, ...]) -> End:
    return End(nodes, state.outcome or "stopped", state.reason)


def _stop(state: State, event: Stop) -> Result:
    ended, commands = _farewell(state, "stopped", event.reason, event.now)
    return ended, (*_drop(state, event.reason), *commands)


def _stop_closing(state: State, event: Stop) -> Result:
    return replace(state, outcome="stopped", reason=event.reason), ()


def _broken(state: State, event: Broken) -> Result:
    ended, commands = _farewell(state, "gave_up", event.reason, event.now)
    return ended, (*_drop(state, event.reason), *commands)


def _drop(state: State, reason: str) -> tuple[Command, ...]:
    """Tell the nodes whose updates were in that they don't count after all."""
    return tuple(Judge(_address(state, node), digest, False, reason) for node, digest in state.accepted.items())


def _farewell(state: State, outcome: Outcome, reason: str, now: float, answered: Iterable[str] = ()) -> Result:
    """Say goodbye to who is here, and to who answered in the last round and is away just now."""
    until = now + FAREWELL
    leaving = state.present | set(answered)
    state = replace(_rest(state), phase=Phase.ENDING, outcome=outcome, reason=reason, until=until, leaving=leaving)
    if not leaving:
        return _finish(state)
    return state, (_end(state, tuple(sorted(state.present))), Wake(until))


def _finish(state: State) -> Result:
    return replace(state, phase=Phase.ENDED), (Finish(state.outcome or "stopped", state.reason),)


def _ignored(state: State, event: Event) -> Result:
    """What the table leaves out has no meaning in its phase: it was under way when the phase changed."""
    del event
    return state, ()


_W, _T, _C, _E, _X = Phase.WAITING, Phase.TRAINING, Phase.CLOSING, Phase.ENDING, Phase.ENDED
TABLE: Mapping[tuple[Phase, type[Event]], Callable[[State, Any], Result]] = {
    (_W, Joined): _join_waiting,
    (_W, Lost): _lost,
    (_W, Appended): _appended_elsewhen,
    (_W, Refused): _appended_elsewhen,
    (_W, Broken): _broken,
    (_W, Tick): _tick_waiting,
    (_W, Stop): _stop,
    (_T, Joined): _join_training,
    (_T, Lost): _lost,
    (_T, Appended): _appended,
    (_T, Refused): _refused,
    (_T, Declined): _declined,
    (_T, Broken): _broken,
    (_T, Tick): _tick_training,
    (_T, Stop): _stop,
    (_C, Joined): _join_closing,
    (_C, Lost): _lost,
    (_C, Appended): _appended_elsewhen,
    (_C, Refused): _appended_elsewhen,
    (_C, Closed): _closed,
    (_C, Broken): _broken,
    (_C, Stop): _stop_closing,
    (_E, Joined): _join_ending,
    (_E, Lost): _lost,
    (_E, Appended): _appended_elsewhen,
    (_E, Refused): _appended_elsewhen,
    (_E, Left): _left,
    (_E, Tick): _tick_ending,
    (_X, Joined): _join_ending,
    (_X, Lost): _lost,
    (_X, Appended): _appended_elsewhen,
    (_X, Refused): _appended_elsewhen,
    **dict.fromkeys(((phase, Revoked) for phase in Phase), _revoked),
}
