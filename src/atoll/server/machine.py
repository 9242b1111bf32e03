"""The server's side of a run as a pure state machine: no I/O, no clock, no randomness.

Enters: events, each with `now` in seconds. Leaves: a new frozen state, and the commands that follow
from it. `TABLE` says what each phase makes of each event; deployment and simulation drive the same one.

    WAITING ─ minimum there ─▶ TRAINING ─ all, quorum + grace or buffer, or deadline ─▶ CLOSING ─▶ TRAINING … ─▶ ENDING ─▶ ENDED

With a link whose phases need the nodes, KEYING comes before TRAINING, and UNMASKING between that and CLOSING: see `phases`.

A task belongs to its node. A round that closes without a node leaves it at work until its own deadline: it isn't asked for
anything else, and its update counts in the round that is open when it comes, with what it is late by. One engine runs
synchronous plans and buffered ones; they differ in how many updates a round needs.

A round that ends with fewer updates than the minimum is tried again, a few times; then the run gives up: see `tries`.
Every wait has a deadline: `Wake` asks for the next `Tick`, and `waiting_for` tells a person what is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from atoll.plan import Plan
from atoll.server import offences, phases, tries
from atoll.server.draw import by_name
from atoll.server.ending import (
    Result,
    address,
    broken,
    farewell,
    finish,
    goodbye,
    left,
    rest,
    stop,
    stop_closing,
    stop_unmasking,
    tick_ending,
)
from atoll.server.events import (
    NO_STEPS,
    Abandoned,
    Answered,
    Appended,
    Broken,
    Closed,
    Collected,
    Declined,
    Event,
    Joined,
    Judge,
    Left,
    Lost,
    Past,
    Refused,
    Revoked,
    Steps,
    Stop,
    Tick,
    Wake,
)
from atoll.server.state import Phase, State, admits, here, mend


def begin(  # what most plans go without, by its name
    run: str, plan: Plan, model: str, now: float, *, late: bool = True, secret: bytes = b"", steps: Steps = NO_STEPS
) -> Result:
    """Return the first state of a run, which waits for nodes, and its first commands.

    Args:
        run: its id.
        plan: what everyone agreed to.
        model: digest of the initial model.
        now: in seconds.
        late: whether the plan's algorithm can fold an update that missed its round.
        secret: fresh bytes of the operating system's generator, for draws that nobody may foretell.
        steps: the phases of the plan's link; with one no update counts late.
    """
    until = now + plan.cohort.deadline
    agreed = plan.plan.rounds, plan.plan.seed, plan.cohort, plan.stopping, plan.checks
    state = State(run, *agreed, model, until, late and steps == NO_STEPS, secret=secret, steps=steps)
    return state, (Wake(until),)


def resume(run: str, plan: Plan, past: Past, now: float, *, spent: str = "", **rules: Any) -> Result:
    """Return the state of a run that another server left, and its first commands; `rules` as for `begin`.

    A round that had begun goes on with its cohort: who joins is asked again, unless the log has brought its update by then.
    With a link it is tried again, since what the nodes had agreed on went with that server; unless a sum was about to be
    revealed: nodes do that for no other sum of the round, so it has to be of just these updates, or of just these nodes
    again. `spent` as `Closed.over`.
    """
    state, commands = begin(run, plan, past.model, now, **rules)
    late, steps = state.late, state.steps
    sealed = frozenset(past.sealed if steps.gives else ())
    known: dict[str, Any] = {"names": past.names, "course": past.course, "conduct": past.conduct, "sealed": sealed}
    done = replace(state, **known, round=min(past.closed + 1, state.rounds))
    over = past.course.over(plan.stopping) or spent or (past.closed >= state.rounds and f"all {state.rounds} rounds are done")
    if over:
        return farewell(done, "completed", over, now, past.answered)
    asked = frozenset(node for node, task in past.tasks.items() if task.round > past.closed)
    if steps != NO_STEPS and not past.summed:
        attempt = past.attempt + bool(asked)
        return replace(done, attempt=attempt, first=attempt), commands
    if past.summed:
        asked &= set(past.summed)
    tasks = {node: task._replace(until=state.until) for node, task in past.tasks.items() if late or node in asked}
    done = replace(done, attempt=past.attempt, first=past.attempt, tasks=tasks, enough=now if past.summed else None)
    return replace(done, phase=Phase.TRAINING, cohort=by_name(done, tasks), asked=asked) if asked else done, commands


def transition(state: State, event: Event) -> Result:
    """Return what an event makes of a state, and what is to be done about it."""
    return TABLE.get((state.phase, type(event)), _ignored)(state, event)


def _joined(state: State, event: Joined) -> Result:
    """A node that was asked and lost is asked again for the same."""
    state = replace(state, names={**state.names, **event.nodes}, present=state.present.union(event.nodes))
    back = [node for node in by_name(state, state.conduct.welcome(event.nodes, state.round)) if state.busy(node)]
    tasks = dict.fromkeys(state.tasks[node] for node in back)
    again = tuple(
        tries.train(task, tuple(node for node in back if state.tasks[node] == task), event.now, again=True) for task in tasks
    )
    return state, (*again, *phases.again(state, event.nodes))


def _join_waiting(state: State, event: Joined) -> Result:
    state, again = _joined(state, event)
    state, commands = tries.start_if_enough(state, event.now)
    return state, (*again, *commands)


def _join_ending(state: State, event: Joined) -> Result:
    state, _ = _joined(state, event)
    return replace(state, leaving=state.leaving.union(event.nodes)), (goodbye(state, tuple(event.nodes)),)


def _lost(state: State, event: Lost) -> Result:
    return replace(state, present=state.present - {event.node}), ()


def _revoked(state: State, event: Revoked) -> Result:
    """Nobody waits for the node any longer; what it sent and isn't in a model yet doesn't count after all."""
    node, why = event.node, "the node was revoked"
    state = replace(state, present=state.present - {node}, leaving=state.leaving - {node})
    if state.phase is Phase.ENDING and not state.leaving:
        return finish(state)
    if state.phase is Phase.UNMASKING:
        return tries.advance(phases.without(state, node), event.now)
    if node not in state.tasks or node in state.closing:
        return state, ()
    dropped = (Judge(address(state, node), digest, False, why),) if (digest := state.answers.get(node)) else ()
    state, commands = _without(state, node, why, event.now)
    return state, (*dropped, *commands)


def _without(state: State, node: str, why: str, now: float) -> Result:
    """Go on without what a node was asked for."""
    if state.phase in (Phase.KEYING, Phase.TRAINING):
        declines = {**state.declines, node: why}
        state = replace(state, answers={**state.answers, node: None}, declines=declines)
        return tries.settle(state, now) if state.phase is Phase.TRAINING else tries.advance(phases.without(state, node), now)
    answers = {one: digest for one, digest in state.answers.items() if one != node}
    return replace(state, answers=answers, tasks={one: task for one, task in state.tasks.items() if one != node}), ()


def _appended(state: State, event: Appended) -> Result:
    if reason := admits(state, event.address):
        return state, (Judge(event.address, event.digest, False, reason),)
    node = event.address.node
    if state.answered(node):
        if event.digest in (state.answers.get(node), state.closing.get(node)):
            return state, ()  # the same update again: it is in already
        return state, (Judge(event.address, event.digest, False, "the node has already answered in this round"),)
    if reason := offences.too_long(state.conduct, state.checks, event.length):
        return _offended(state, event, reason, event.length and event.length.norm)
    state = replace(state, answers={**state.answers, node: event.digest}, lengths={**state.lengths, node: event.length})
    if state.phase is Phase.TRAINING:
        return tries.settle(state, event.now)
    return tries.start_if_enough(state, event.now) if state.phase is Phase.WAITING else (state, ())


def _refused(state: State, event: Refused) -> Result:
    if admits(state, event.address) or state.answered(event.address.node):
        return _appended(state, Appended(event.now, event.address, event.digest))  # whatever it holds, it doesn't count
    return _offended(state, event, event.reason, None)


def _offended(state: State, event: Appended | Refused, reason: str, norm: float | None) -> Result:
    """Refuse an update for what it holds; nobody waits for the node in this round, nor in later ones if it does so often."""
    node = event.address.node
    conduct = state.conduct.offended(state.checks, event.address)
    if conduct.held_out(node, state.round):
        reason += f"; after {state.checks.offences} such updates the node is held out until round {conduct.until[node]} is over"
    judge = Judge(event.address, event.digest, False, reason, event.size, norm, offence=True)
    state, commands = _without(replace(state, conduct=conduct), node, reason, event.now)
    return state, (judge, *commands)


def _declined(state: State, event: Declined) -> Result:
    node = event.address.node
    if state.phase is Phase.UNMASKING and admits(state, event.address) is None:
        return tries.advance(phases.without(state, node), event.now)
    if admits(state, event.address) or state.answered(node):
        return state, ()
    return _without(state, node, event.reason, event.now)


def _answered(state: State, event: Answered) -> Result:
    heard = phases.heard(state, event)
    return tries.advance(heard, event.now) if heard else (state, ())


def _collected(state: State, event: Collected) -> Result:
    if not (relay := state.relay) or not relay.collecting or relay.phase != event.phase:
        return state, ()
    if len(event.nodes) < (fewest := state.fewest(state.steps.next(event.phase))):
        return tries.again(state, event.now, f"{len(event.nodes)} of at least {fewest} nodes are left after '{event.phase}'")
    lost: tuple[Judge, ...] = ()
    if state.phase is Phase.KEYING:  # later, their updates came, and are judged with the others
        waited = {node: why for node, why in event.lost.items() if state.busy(node)}
        lost = tuple(Judge(address(state, node), "", False, why, lost=True) for node, why in waited.items())
    state, commands = phases.next_(replace(state, lost={**state.lost, **event.lost}), event)
    settled, more = (tries.settle if state.phase is Phase.TRAINING else tries.advance)(state, event.now)
    return settled, (*lost, *commands, *more)


def _abandoned(state: State, event: Abandoned) -> Result:
    return tries.again(state, event.now, event.reason)


def _tick_waiting(state: State, event: Tick) -> Result:
    if event.now < state.until:
        return tries.expire(state, event.now), ()
    return farewell(state, "gave_up", f"round {state.round}: the deadline is over and {here(state)}{mend(state)}", event.now)


def _tick_training(state: State, event: Tick) -> Result:
    state, said = phases.once_more(state, event.now)
    state, commands = tries.settle(tries.expire(state, event.now), event.now)
    return state, (*said, *commands)


def _tick_phase(state: State, event: Tick) -> Result:
    state, said = phases.once_more(state, event.now)
    state, commands = tries.advance(tries.expire(state, event.now), event.now)
    return state, (*said, *commands)


def _tick_closing(state: State, event: Tick) -> Result:
    return tries.expire(state, event.now), ()


def _closed(state: State, event: Closed) -> Result:
    lost = event.lost
    verdicts = tuple(
        Judge(address(state, node), digest, node not in lost, lost.get(node, ""), lost=node in lost)
        for node, digest in state.closing.items()
    )
    course = state.course.after(state.stopping, event.judged)
    open_ = {node: task for node, task in state.tasks.items() if node not in state.closing}
    conduct = state.conduct.closed([one for node in state.closing if (one := state.lengths.get(node)) is not None])
    done = replace(rest(state), model=event.model, attempt=1, first=1, course=course, conduct=conduct, sealed=frozenset())
    coming = {node: length for node, length in state.lengths.items() if node in state.answers}
    done = replace(done, tasks=open_, answers=state.answers, lengths=coming)
    if state.outcome:  # somebody asked to stop while the round was closing
        ended, commands = farewell(done, state.outcome, state.reason, event.now, state.closing)
    elif state.round >= state.rounds:
        ended, commands = farewell(done, "completed", f"all {state.rounds} rounds are done", event.now, state.closing)
    elif early := course.over(state.stopping) or event.over:
        ended, commands = farewell(done, "completed", early, event.now, state.closing)
    else:
        until = event.now + state.rules.deadline
        ended, commands = tries.start_if_enough(replace(done, phase=Phase.WAITING, round=state.round + 1, until=until), event.now)
        commands = commands or (Wake(until),)
    return ended, (*verdicts, *commands)


def _ignored(state: State, event: Event) -> Result:
    """What the table leaves out has no meaning in its phase: it was under way when the phase changed."""
    del event
    return state, ()


_W, _K, _T, _U = Phase.WAITING, Phase.KEYING, Phase.TRAINING, Phase.UNMASKING
_C, _E, _X = Phase.CLOSING, Phase.ENDING, Phase.ENDED
TABLE: Mapping[tuple[Phase, type[Event]], Callable[[State, Any], Result]] = {
    (_W, Joined): _join_waiting,
    (_W, Broken): broken,
    (_W, Tick): _tick_waiting,
    (_W, Stop): stop,
    **dict.fromkeys(((phase, Answered) for phase in (_K, _U)), _answered),
    **dict.fromkeys(((phase, Collected) for phase in (_K, _U)), _collected),
    **dict.fromkeys(((phase, Abandoned) for phase in (_K, _T, _U, _C)), _abandoned),
    **dict.fromkeys(((phase, Joined) for phase in (_K, _T, _U)), _joined),
    **dict.fromkeys(((phase, Broken) for phase in (_K, _U)), broken),
    **dict.fromkeys(((phase, Tick) for phase in (_K, _U)), _tick_phase),
    (_K, Stop): stop,
    (_U, Stop): stop_unmasking,
    (_T, Broken): broken,
    (_T, Tick): _tick_training,
    (_T, Stop): stop,
    (_C, Joined): _joined,
    (_C, Closed): _closed,
    (_C, Broken): broken,
    (_C, Tick): _tick_closing,
    (_C, Stop): stop_closing,
    (_E, Joined): _join_ending,
    (_E, Left): left,
    (_E, Tick): tick_ending,
    (_X, Joined): _join_ending,
    **dict.fromkeys(((phase, Lost) for phase in Phase), _lost),
    **dict.fromkeys(((phase, Appended) for phase in Phase), _appended),
    **dict.fromkeys(((phase, Refused) for phase in Phase), _refused),
    **dict.fromkeys(((phase, Declined) for phase in (_W, _K, _T, _U, _C)), _declined),
    **dict.fromkeys(((phase, Revoked) for phase in Phase), _revoked),
}
