"""The phases of a link as the server's machine sees them: names, and who has answered. It knows nothing of what is said.

    KEYING     the phases before updates are protected; nodes train meanwhile, and who drops out leaves the cohort
    TRAINING   as ever: protected updates come by the log
    UNMASKING  the phases after it is known whose updates are in; who drops out is in the sum, and others answer for it

A phase ends like a round: all have answered, quorum + grace, or the deadline. Then the link makes the next one's messages.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from atoll.messages import UPDATE
from atoll.server.events import Answered, Collect, Collected, Command, Say, Wake
from atoll.server.state import Phase, Relay, State

SOON = 1.0
"""Seconds, at least, until what a phase says is said once more to who hasn't answered."""


def opened(state: State, now: float) -> State:
    """A round begins: with the link's first phase, or at once with training."""
    if not state.steps.before:
        return replace(state, phase=Phase.TRAINING)
    return replace(state, phase=Phase.KEYING, relay=_relay(state, state.steps.before[0], frozenset(state.cohort), now))


def _relay(state: State, phase: str, nodes: frozenset[str], now: float, silent: frozenset[str] = frozenset()) -> Relay:
    pause = max(state.rules.grace, SOON)
    return Relay(phase, nodes, silent=silent, pause=pause, again=now + pause)


def heard(state: State, event: Answered) -> State | None:
    """Count an answer; None where it is for another phase, or nobody waits for it."""
    relay, (_, round_, attempt, node) = state.relay, event.address
    open_ = relay and not relay.collecting and (relay.phase, state.round, state.attempt) == (event.phase, round_, attempt)
    if not relay or not open_ or node not in relay.left:
        return None
    return replace(state, relay=replace(relay, said=relay.said | {node}))


def without(state: State, node: str) -> State:
    """Wait no longer for a node."""
    relay = state.relay
    return replace(state, relay=replace(relay, said=relay.said - {node}, silent=relay.silent | {node})) if relay else state


def again(state: State, nodes: Collection[str]) -> tuple[Command, ...]:
    """Tell nodes that are back what the present phase tells them; the first one says nothing that isn't in the task."""
    relay = state.relay
    if not relay or relay.collecting or relay.phase in state.steps.before[:1]:
        return ()
    back = tuple(node for node in nodes if node in relay.left)
    return (Say(relay.phase, back),) if back else ()


def once_more(state: State, now: float) -> tuple[State, tuple[Command, ...]]:
    """Tell those that are missing, now and then, what the phase tells them: it, or their answer, may have been lost."""
    relay = state.relay
    if not relay or relay.collecting or now < relay.again:
        return state, ()
    left = sorted(relay.left.intersection(state.missing) if relay.phase == UPDATE else relay.left)
    state = replace(state, relay=replace(relay, pause=2 * relay.pause, again=now + 2 * relay.pause))
    return state, (*((Say(relay.phase, tuple(left)),) if left else ()), *wakes(state))


def wakes(state: State) -> tuple[Command, ...]:
    """Ask for the time when something is said once more."""
    return (Wake(state.relay.again),) if state.relay and not state.relay.collecting and state.relay.again < state.until else ()


def next_(state: State, event: Collected) -> tuple[State, tuple[Command, ...]]:
    """Go on to the next phase, with the nodes that are left."""
    relay, nodes = state.relay or Relay(event.phase, event.nodes), event.nodes
    phase = state.steps.next(event.phase)
    if state.phase is Phase.KEYING:
        left = [node for node in state.cohort if node in nodes]
        until = max(state.tasks[node].until for node in left)
        state = replace(
            state,
            phase=Phase.TRAINING if phase == UPDATE else Phase.KEYING,
            cohort=tuple(left),
            asked=state.asked & nodes,
            tasks={node: state.tasks[node] for node in left},
            answers={node: said for node, said in state.answers.items() if node in nodes},
            declines={node: why for node, why in state.declines.items() if node in nodes},
        )
    else:
        until = event.now + state.rules.deadline
    if phase == state.steps.gives:
        state = replace(state, sealed=frozenset(state.closing))
    state = replace(state, relay=_relay(state, phase, nodes, event.now, relay.silent & nodes), until=until, enough=None)
    return state, (Say(phase, tuple(sorted(nodes))), Wake(until), *wakes(state))


def unmask(state: State, now: float) -> tuple[State, tuple[Command, ...]]:
    """It is known whose updates are in: the phases after that begin."""
    accepted = frozenset(state.closing)
    relay, until = Relay(UPDATE, accepted, accepted, collecting=True), now + state.rules.deadline
    state = replace(state, phase=Phase.UNMASKING, relay=relay, until=until, enough=None)
    return state, (Collect(UPDATE, tuple(state.closing)), Wake(until))
