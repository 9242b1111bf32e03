"""A run as the server sees it: who is here, who was asked for what, what came; and what that says to people. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from atoll.plan import Checks, Cohort
from atoll.server.events import NO_STEPS, Outcome, Steps, Task
from atoll.server.offences import Conduct, Length
from atoll.stopping import Course, Stopping
from atoll.wire import Address


class Phase(Enum):
    """Where a run stands."""

    WAITING = "waiting for nodes"
    KEYING = "agreeing on keys"
    TRAINING = "training"
    UNMASKING = "taking off masks"
    CLOSING = "closing a round"
    ENDING = "saying goodbye"
    ENDED = "ended"


@dataclass(frozen=True)
class Relay:
    """A phase of the link that is under way.

    Args:
        phase: its name.
        asked: the nodes that are to answer.
        said: those of them that did.
        silent: those of them that won't.
        collecting: whether what comes of the answers is being made.
        again: when those that haven't answered are told once more; `pause` seconds after the last time.
    """

    phase: str
    asked: frozenset[str]
    said: frozenset[str] = frozenset()
    silent: frozenset[str] = frozenset()
    collecting: bool = False
    pause: float = 0.0
    again: float = 0.0

    @property
    def left(self) -> frozenset[str]:
        """The nodes that are waited for."""
        return self.asked - self.said - self.silent


@dataclass(frozen=True)
class State:
    """A run, as the server sees it.

    Args:
        run: its id.
        rounds, seed, rules, stopping, checks: from the plan.
        late: whether an update that missed its round counts in a later one.
        steps: the phases of the plan's link.
        relay: the one of these that is under way.
        first: the attempt that this server began the round with.
        model: digest of the newest global model.
        round, attempt: the one that is open, or next to open.
        names: every node that ever joined: id → name.
        present: the nodes that are connected.
        tasks: node → what it was asked for: until its update is in a model, it declines, or the task's own deadline.
        cohort: the nodes at work in the open round, in the order of their names: those asked in it, and those that still
            work for an earlier one.
        asked: those of the cohort that were asked in this round.
        answers: node → digest of its update, or None where it declined, for the open round or else the next.
        lengths: node → how long its update is.
        closing: the updates that are becoming a model just now, as `accepted` was.
        declines: why nodes declined, for people.
        lost: nodes whose sum can't be made in this try any more, and why, for people.
        until: when the present wait ends.
        enough: since when the quorum is there.
        sealed: the nodes whose sum was begun to be revealed in this round: another try is of just these, and all of them.
        leaving: the nodes that have not taken the final model yet.
        course: how models have done so far.
        conduct: how nodes have behaved so far.
        secret: what draws are made with that nobody may foretell.
    """

    run: str
    rounds: int
    seed: int
    rules: Cohort
    stopping: Stopping
    checks: Checks
    model: str
    until: float
    late: bool = True
    steps: Steps = NO_STEPS
    relay: Relay | None = None
    first: int = 1
    phase: Phase = Phase.WAITING
    round: int = 1
    attempt: int = 1
    names: Mapping[str, str] = field(default_factory=dict)
    present: frozenset[str] = frozenset()
    tasks: Mapping[str, Task] = field(default_factory=dict)
    cohort: tuple[str, ...] = ()
    asked: frozenset[str] = frozenset()
    answers: Mapping[str, str | None] = field(default_factory=dict)
    lengths: Mapping[str, Length | None] = field(default_factory=dict)
    closing: Mapping[str, str] = field(default_factory=dict)
    declines: Mapping[str, str] = field(default_factory=dict)
    lost: Mapping[str, str] = field(default_factory=dict)
    enough: float | None = None
    sealed: frozenset[str] = frozenset()
    leaving: frozenset[str] = frozenset()
    course: Course = field(default_factory=Course)
    conduct: Conduct = field(default_factory=Conduct)
    secret: bytes = b""
    outcome: Outcome | None = None
    reason: str = ""

    @property
    def accepted(self) -> Mapping[str, str]:
        """The updates that are in, in the order of their nodes' names."""
        if self.phase in (Phase.UNMASKING, Phase.CLOSING):
            return self.closing
        return {node: digest for node in self.cohort if (digest := self.answers.get(node)) is not None}

    @property
    def missing(self) -> tuple[str, ...]:
        """The nodes at work that have neither answered nor declined."""
        return tuple(node for node in self.cohort if self.busy(node))

    @property
    def needed(self) -> int:
        """How many updates close the round: as many as the buffer holds, or else a quorum of the nodes at work."""
        return self.rules.buffer or self.quorum(len(self.cohort))

    def quorum(self, nodes: int, phase: str = "") -> int:
        """How many of so many nodes are enough."""
        return max(self.fewest(phase) if phase else self.least, math.ceil(self.rules.quorum * nodes))

    def fewest(self, phase: str) -> int:
        """How many nodes there must be in a phase of the link."""
        if self.sealed and phase not in self.steps.after:
            return len(self.sealed)
        if phase == self.steps.opens:
            return self.steps.few
        if self.steps.least and phase in self.steps.after:
            return 1  # the link looks at each bucket by itself
        return self.steps.least or self.rules.minimum

    @property
    def least(self) -> int:
        """The fewest updates that a round is closed with; where each is drawn for itself it counts whoever it is, even nobody."""
        if self.sealed:
            return len(self.sealed)
        return 0 if self.rules.draw == "poisson" or self.rules.turns else self.steps.least or self.rules.minimum

    def busy(self, node: str) -> bool:
        """Say whether a node still works for what it was asked."""
        return node in self.tasks and not self.answered(node)

    def answered(self, node: str) -> bool:
        """Say whether a node's word on its task is in."""
        return node in self.answers or node in self.closing


def admits(state: State, address: Address) -> str | None:
    """Say why an update with this address can't count now, or None where it can."""
    if address.node not in state.names:
        return "the node never joined this run"
    task = state.tasks.get(address.node)
    if task and task[:2] == (address.round, address.attempt):
        return None
    if state.phase in (Phase.KEYING, Phase.TRAINING) and (address.round, address.attempt) == (state.round, state.attempt):
        return f"the node was not asked in round {state.round}"
    return (
        f"it came too late or too early: it is for round {address.round} attempt {address.attempt}, "
        f"the run is {state.phase.value} in round {state.round} attempt {state.attempt}"
    )


def waiting_for(state: State, now: float) -> str:
    """Say in one line what a run waits for, and until when."""
    left = "".join(f"; {why}" for why in dict.fromkeys(state.lost.values())) + f"; {max(0.0, state.until - now):.0f} s left"
    if state.phase is Phase.WAITING:
        return f"round {state.round}: {here(state)}{left}"
    if state.phase is Phase.TRAINING:
        said = f"{len(state.accepted)} of {len(state.cohort)} updates are in"
        return f"round {state.round}: {said}, waiting for {_some(state, state.missing)}{left}"
    if state.phase in (Phase.KEYING, Phase.UNMASKING) and (relay := state.relay):
        said = f"{state.phase.value} ({relay.phase}): {len(relay.said)} of {len(relay.asked)} nodes have answered"
        missing = [node for node in state.names if node in relay.left]
        return f"round {state.round}: {said}" + ("" if relay.collecting else f", waiting for {_some(state, missing)}{left}")
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
    if away := [name for node, name in state.names.items() if node in state.sealed - welcome]:
        more = " …" if len(away) > 5 else ""
        return f"its sum can only be made over the same {len(state.sealed)} nodes, and {', '.join(away[:5])}{more} can't be asked"
    held = [f"{state.names[node]} until round {state.conduct.until[node]} is over" for node in state.present - welcome]
    more = f"; held out for refused updates: {', '.join(sorted(held)[:3])}{' …' if len(held) > 3 else ''}" if held else ""
    return f"{len(welcome)} of at least {state.rules.minimum} nodes are here{more}"


def mend(state: State) -> str:
    """Say how to go on after a round whose sum nodes had begun to reveal; an empty text where they hadn't."""
    if not state.sealed:
        return ""
    return (
        "; they reveal no sum over other nodes from this model, since both would tell of single ones: bring all of them back and "
        "`atoll serve --resume`; or go on without some: `atoll export RUN --which last --to last.safetensors`, then "
        "`atoll serve --start last.safetensors` with another plan.seed"
    )


def _some(state: State, nodes: Sequence[str]) -> str:
    more = f" and {len(nodes) - 5} more" if len(nodes) > 5 else ""
    return ", ".join(_named(state, node) for node in nodes[:5]) + more


def _named(state: State, node: str) -> str:
    lost = () if node in state.present else ("lost",)
    notes = (*lost, *(() if node in state.asked else (f"since round {state.tasks[node].round}",)))
    return state.names[node] + (f" ({', '.join(notes)})" if notes else "")
