"""Which updates are too long to count, and which nodes are held out for what they sent: pure, the same after a restart.

An update may be so many times as long as is usual for the training behind it. Usual is the running median: over the last
closed rounds, of each round's median norm; for a node that made more steps than others, the running median of norm by step,
times its steps. How many rows a node has is its own word, so steps stretch what is usual only so far.

Only closed rounds have a say, so that what is refused doesn't depend on who is quicker; each round has one median, so that
a few hostile nodes don't move it. What isn't much longer than the longest of all rounds' medians always passes: training
settles, and a node that joins then, with rows that the model has never seen, must not be taken for hostile.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import NamedTuple

from atoll.plan import Checks, Plan
from atoll.wire import Address

WINDOW, ENOUGH = 10, 3
"""So many closed rounds say what is usual, and without so many there is no bound."""
STRETCH = 100.0
"""However many steps a node made, so many times the median norm is the most that is usual."""
EARLY = 3.0
"""So many times the longest round's median always passes: in its first round a node may lie that far from the median."""


class Length(NamedTuple):
    """How long an update is (Euclidean norm), and how many steps its node made, by the rows it says it has."""

    norm: float
    steps: int


def length_of(plan: Plan, norm: float | None, weight: float, round_: int) -> Length | None:
    """Return an update's length; None where nothing in it is averaged."""
    return None if norm is None else Length(norm, plan.training.pace(max(1, int(weight)), round_, plan.plan.rounds).steps)


@dataclass(frozen=True)
class Conduct:
    """What a run knows of its updates' lengths and of nodes that sent what can't count.

    Args:
        medians: of the accepted updates in each of the last closed rounds the median norm, and the median norm by step.
        longest: the largest of the median norms in the whole run.
        counts: node → its offences since it was last held out.
        last: node → round and attempt of its newest offence, so that a log that is read again counts none twice.
        until: node → the last round that it is held out of.
    """

    medians: tuple[tuple[float, float], ...] = ()
    longest: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict)
    last: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    until: Mapping[str, int] = field(default_factory=dict)

    def closed(self, lengths: Sequence[Length]) -> Conduct:
        """A round was closed with updates of these lengths."""
        if not lengths:
            return self
        middle = median(one.norm for one in lengths), median(one.norm / one.steps for one in lengths)
        return replace(self, medians=(*self.medians, middle)[-WINDOW:], longest=max(self.longest, middle[0]))

    def offended(self, checks: Checks, address: Address) -> Conduct:
        """A node sent what can't count; one that does so for the last time that is borne is held out from now on."""
        node, when = address.node, (address.round, address.attempt)
        if when <= self.last.get(node, (0, 0)):
            return self
        count = self.counts.get(node, 0) + 1
        noted = replace(self, last={**self.last, node: when})
        if count < checks.offences or not checks.held_out:
            return replace(noted, counts={**self.counts, node: count})
        until = {**self.until, node: address.round + checks.held_out}
        return replace(noted, counts={**self.counts, node: 0}, until=until)

    def held_out(self, node: str, round_: int) -> bool:
        """Say whether a node isn't asked in a round."""
        return round_ <= self.until.get(node, 0)

    def welcome(self, nodes: Collection[str], round_: int) -> frozenset[str]:
        """Return those of some nodes that may be asked in a round."""
        out = {node for node in self.until if self.held_out(node, round_)}  # few of many
        return frozenset(nodes) - out if out else frozenset(nodes)


def bound(conduct: Conduct, checks: Checks, steps: int = 1) -> float | None:
    """Return how long an update may be that took so many steps; None where there is no bound, or not yet."""
    if not checks.norm or len(conduct.medians) < ENOUGH:
        return None
    norm, by_step = (median(one) for one in zip(*conduct.medians, strict=True))
    usual = max(norm, min(steps * by_step, STRETCH * norm))
    return max(checks.norm * usual, EARLY * conduct.longest) if usual else None


def too_long(conduct: Conduct, checks: Checks, length: Length | None) -> str | None:
    """Say why an update of a length can't count, or None where it can."""
    if length is None or (most := bound(conduct, checks, length.steps)) is None or length.norm <= most:
        return None
    return (
        f"the update is {length.norm:.4g} long (Euclidean norm), the bound is {most:.4g}: checks.norm = {checks.norm:g} times "
        "what is usual; look at the node's data and learning rate"
    )
