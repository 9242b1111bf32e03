"""A try of a round, for the server's machine: who is asked, when enough is in or it is too late, and what follows. Pure."""

from __future__ import annotations

from dataclasses import replace

from atoll.server import phases
from atoll.server.draw import by_name, draw
from atoll.server.ending import Result, drop, farewell, rest
from atoll.server.events import Close, Collect, Task, Train, Wake
from atoll.server.state import Phase, State, mend

ATTEMPTS = 3
"""How often a round is tried before the run gives up."""


def start_if_enough(state: State, now: float) -> Result:
    """Open the next round where enough nodes are here, at work or not, or have answered for it already."""
    state = expire(state, now)
    welcome, cycle = state.conduct.welcome(state.present, state.round), state.rules.cycle
    if len(welcome) < cycle if cycle else len(welcome | state.answers.keys()) < state.rules.minimum:
        return state, ()
    if not state.sealed <= welcome:
        return state, ()
    until = now + state.rules.deadline
    task = Task(state.round, state.attempt, state.model, until)
    drawn = draw(state)
    asked = replace(train(task, by_name(state, drawn), now), late=state.tasks)
    tasks = {**state.tasks, **dict.fromkeys(drawn, task)}
    cohort = by_name(state, tasks)
    state = phases.opened(replace(state, tasks=tasks, cohort=cohort, asked=frozenset(drawn), until=until, enough=None), now)
    # Those that are late may be enough by themselves.
    settled, commands = settle(state, now) if state.phase is Phase.TRAINING else (state, ())
    return settled, (asked, Wake(until), *phases.wakes(state), *commands)


def train(task: Task, nodes: tuple[str, ...], now: float, *, again: bool = False) -> Train:
    """Ask nodes to do a task, in what is left of its time."""
    return Train(nodes, task.round, task.attempt, task.model, max(0.0, task.until - now), again)


def settle(state: State, now: float) -> Result:
    """Close the open round if it is over: all have answered, the buffer is full, quorum + grace, or the deadline."""
    count = len(state.answers) - len(state.declines)  # told apart node by node only at the end: cohorts are large
    if len(state.answers) == len(state.cohort) or now >= state.until:
        return _close(state, now) if count >= state.least else again(state, now)
    if count < state.needed:
        return state, ()
    if state.rules.buffer or _late_only(state):
        return _close(state, now)
    return _grace(state, now)


def _grace(state: State, now: float) -> Result:
    """Enough are in: the others have so much longer."""
    if state.enough is not None:
        return state, ()
    state = replace(state, enough=now, until=min(state.until, now + state.rules.grace))
    if now < state.until:
        return state, (Wake(state.until),)
    return _close(state, now) if state.phase is Phase.TRAINING else advance(state, now)


def _late_only(state: State) -> bool:
    """Say whether only nodes are missing that are late already: for them there is no grace."""
    late = len(state.cohort) - len(state.asked)
    return len(state.cohort) - len(state.answers) <= late and state.asked.isdisjoint(state.missing)


def advance(state: State, now: float) -> Result:
    """Go on from a phase of the link that is over: all have answered, quorum + grace, or the deadline."""
    relay = state.relay
    if relay is None or relay.collecting:
        return state, ()
    if relay.left and now < state.until:
        return _grace(state, now) if len(relay.said) >= state.quorum(len(relay.asked), relay.phase) else (state, ())
    if len(relay.said) < (fewest := state.fewest(relay.phase)):
        return again(state, now, f"{len(relay.said)} of at least {fewest} nodes answered in phase '{relay.phase}'")
    if relay.phase == state.steps.last:
        return _fold(state)
    said = tuple(node for node in state.cohort if node in relay.said)
    return replace(state, relay=replace(relay, collecting=True)), (Collect(relay.phase, said),)


def _close(state: State, now: float) -> Result:
    """Make a model of what is in. Who isn't done goes on until its own deadline, and counts in a later round."""
    accepted = dict(state.accepted)
    goes_on = {node for node in state.missing if state.late and state.tasks[node].until > now}
    tasks = {node: task for node, task in state.tasks.items() if node in accepted or node in goes_on}
    state = replace(state, closing=accepted, answers={}, declines={}, tasks=tasks)
    return phases.unmask(state, now) if state.steps.after else _fold(state)


def _fold(state: State) -> Result:
    return replace(state, phase=Phase.CLOSING, relay=None), (closing(state),)


def closing(state: State) -> Close:
    """Return what a round is made of, once that is known."""
    late = {node: state.tasks[node] for node in state.closing if node not in state.asked}
    return Close(state.round, state.attempt, state.closing, len(state.cohort), len(state.names), late)


def again(state: State, now: float, why: str = "") -> Result:
    """Try a round with too few updates, or that its link gave up, again; what had come for it doesn't count."""
    said = "; ".join(f"{state.names[node]}: {why}" for node, why in list(state.declines.items())[:3])
    why = why or f"{len(state.accepted)} of at least {state.least} updates came"
    reason = f"round {state.round} attempt {state.attempt}: {why}{f' ({said})' if said else ''}"
    if state.outcome:  # somebody asked to stop meanwhile
        return farewell(state, state.outcome, state.reason, now)
    if state.attempt - state.first + 1 >= ATTEMPTS:
        return farewell(state, "gave_up", reason + mend(state), now)
    dropped = drop(state, f"{reason}; the round is tried again")
    waiting = replace(rest(state), phase=Phase.WAITING, attempt=state.attempt + 1, until=now + state.rules.deadline)
    started, commands = start_if_enough(waiting, now)
    return started, (*dropped, *commands, *(() if started.phase is not Phase.WAITING else (Wake(waiting.until),)))


def expire(state: State, now: float) -> State:
    """Wait no longer for what was asked before the open round and is past its deadline: these nodes can be asked anew."""
    kept = state.asked if state.phase in (Phase.KEYING, Phase.TRAINING) else frozenset[str]()
    gone = {node for node, task in state.tasks.items() if task.until <= now and state.busy(node) and node not in kept}
    if not gone:
        return state
    tasks = {node: task for node, task in state.tasks.items() if node not in gone}
    return replace(state, tasks=tasks, cohort=tuple(node for node in state.cohort if node not in gone))
