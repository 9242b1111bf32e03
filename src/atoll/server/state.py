"""A run as the server sees it: who is here, who was asked for what, what came; and what that says to people. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from atoll.plan import Checks, Cohort
from atoll.server.events import Outcome
from atoll.server.offences import Conduct
from atoll.stopping import Course, Stopping
from atoll.wire import Address


class Phase(Enum):
    """Where a run stands."""

    WAITING = "waiting for nodes"
    TRAINING = "training"
    CLOSING = "closing a round"
    ENDING = "saying goodbye"
    ENDED = "ended"


@dataclass(frozen=True)
class State:
    """A run, as the server sees it.

    Args:
        run: its id.
        rounds, seed, rules, stopping, checks: from the plan.
        model: digest of the newest global model.
        round, attempt: the one that is open, or next to open.
        names: every node that ever joined: id → name.
        present: the nodes that are connected.
        cohort: the nodes asked in the open round, in the order of their names; `asked` holds the same, to look them up.
        answers: node → digest of its update, or None where it declined.
        norms: node → how long its update is.
        declines: why nodes declined, for people.
        until: when the present wait ends.
        enough: since when the quorum is there.
        leaving: the nodes that have not taken the final model yet.
        course: how models have done so far.
        conduct: how nodes have behaved so far.
    """

    run: str
    rounds: int
    seed: int
    rules: Cohort
    stopping: Stopping
    checks: Checks
    model: str
    until: float
    phase: Phase = Phase.WAITING
    round: int = 1
    attempt: int = 1
    names: Mapping[str, str] = field(default_factory=dict)
    present: frozenset[str] = frozenset()
    cohort: tuple[str, ...] = ()
    asked: frozenset[str] = frozenset()
    answers: Mapping[str, str | None] = field(default_factory=dict)
    norms: Mapping[str, float | None] = field(default_factory=dict)
    declines: Mapping[str, str] = field(default_factory=dict)
    enough: float | None = None
    leaving: frozenset[str] = frozenset()
    course: Course = field(default_factory=Course)
    conduct: Conduct = field(default_factory=Conduct)
    outcome: Outcome | None = None
    reason: str = ""

    @property
    def accepted(self) -> dict[str, str]:
        """The updates that are in, in the order of their nodes' names."""
        return {node: digest for node in self.cohort if (digest := self.answers.get(node)) is not None}

    @property
    def missing(self) -> tuple[str, ...]:
        """The asked nodes that have neither answered nor declined."""
        return tuple(node for node in self.cohort if node not in self.answers)

    @property
    def needed(self) -> int:
        """How many updates of the cohort are a quorum."""
        return max(self.rules.minimum, math.ceil(self.rules.quorum * len(self.cohort)))


def admits(state: State, address: Address) -> str | None:
    """Say why an update with this address can't count now, or None where it can."""
    if address.node not in state.names:
        return "the node never joined this run"
    if (address.round, address.attempt) != (state.round, state.attempt) or state.phase is not Phase.TRAINING:
        return (
            f"it came too late or too early: it is for round {address.round} attempt {address.attempt}, "
            f"the run is {state.phase.value} in round {state.round} attempt {state.attempt}"
        )
    if address.node not in state.asked:
        return f"the node was not asked in round {state.round}"
    return None


def waiting_for(state: State, now: float) -> str:
    """Say in one line what a run waits for, and until when."""
    left = f"; {max(0.0, state.until - now):.0f} s left"
    if state.phase is Phase.WAITING:
        return f"round {state.round}: {here(state)}{left}"
    if state.phase is Phase.TRAINING:
        who = ", ".join(state.names[node] + ("" if node in state.present else " (lost)") for node in state.missing[:5])
        more = f" and {len(state.missing) - 5} more" if len(state.missing) > 5 else ""
        return f"round {state.round}: {len(state.accepted)} of {len(state.cohort)} updates are in, waiting for {who}{more}{left}"
    if state.phase is Phase.ENDING:
        return f"{len(state.leaving)} nodes have not taken the final model yet{left}"
    return (
        f"round {state.round}: {len(state.accepted)} updates become the next model"
        if state.phase is Phase.CLOSING
        else state.reason
    )


def here(state: State) -> str:
    """Say how many nodes can be asked, and who is here besides."""
    welcome = state.conduct.welcome(state.present, state.round)
    held = [f"{state.names[node]} until round {state.conduct.until[node]} is over" for node in state.present - welcome]
    more = f"; held out for refused updates: {', '.join(sorted(held)[:3])}{' …' if len(held) > 3 else ''}" if held else ""
    return f"{len(welcome)} of at least {state.rules.minimum} nodes are here{more}"
