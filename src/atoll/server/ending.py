"""How a run ends for the server's machine: goodbye to who is here, what doesn't count after all, and nothing more. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from atoll.server.events import Broken, Command, End, Finish, Judge, Left, Outcome, Stop, Tick, Wake
from atoll.server.state import Phase, State
from atoll.wire import Address

FAREWELL = 10.0
"""How long the server waits, in seconds, for nodes to take the final model; one that was just lost may come back for it."""

Result = tuple[State, tuple[Command, ...]]


def farewell(state: State, outcome: Outcome, reason: str, now: float, answered: Iterable[str] = ()) -> Result:
    """Say goodbye to who is here, and to who answered in the last round and is away just now."""
    until = now + FAREWELL
    leaving, dropped = state.present | set(answered), drop(state, reason)
    state = replace(rest(state), phase=Phase.ENDING, outcome=outcome, reason=reason, until=until, leaving=leaving)
    if leaving:
        return state, (*dropped, goodbye(state, tuple(sorted(state.present))), Wake(until))
    ended, commands = finish(state)
    return ended, (*dropped, *commands)


def finish(state: State) -> Result:
    """Nothing more will happen."""
    return replace(state, phase=Phase.ENDED), (Finish(state.outcome or "stopped", state.reason),)


def goodbye(state: State, nodes: tuple[str, ...]) -> End:
    """Tell nodes that the run is over."""
    return End(nodes, state.outcome or "stopped", state.reason)


def drop(state: State, reason: str) -> tuple[Command, ...]:
    """Tell the nodes whose updates were in that they don't count after all."""
    came = {**state.closing, **state.answers}
    return tuple(Judge(address(state, node), digest, False, reason) for node, digest in came.items() if digest is not None)


def rest(state: State) -> State:
    """Nobody is asked for anything, and nothing has come."""
    return replace(
        state, cohort=(), asked=frozenset(), tasks={}, answers={}, lengths={}, closing={}, declines={}, lost={}, enough=None,
        relay=None,
    )  # fmt: skip


def address(state: State, node: str) -> Address:
    """Return what a node's update is addressed by."""
    return Address(state.run, *state.tasks[node][:2], node)


def left(state: State, event: Left) -> Result:
    """A node has taken the final model, and is gone."""
    state = replace(state, leaving=state.leaving - {event.node})
    return (state, ()) if state.leaving else finish(state)


def tick_ending(state: State, event: Tick) -> Result:
    """Whoever isn't back by now isn't waited for."""
    return finish(state) if event.now >= state.until else (state, ())


def stop(state: State, event: Stop) -> Result:
    """Somebody asks the run to end."""
    return farewell(state, "stopped", event.reason, event.now)


def stop_unmasking(state: State, event: Stop) -> Result:
    """What nodes gave to unmask they give for no other nodes' sum: it is finished where that can be done soon."""
    until = min(state.until, event.now + FAREWELL)
    return replace(state, outcome="stopped", reason=event.reason, until=until), (Wake(until),)


def stop_closing(state: State, event: Stop) -> Result:
    """The round is closed first."""
    return replace(state, outcome="stopped", reason=event.reason), ()


def broken(state: State, event: Broken) -> Result:
    """The server itself failed."""
    return farewell(state, "gave_up", event.reason, event.now)
