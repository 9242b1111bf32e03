"""Which updates are too long to count, and which nodes are held out for what they sent: pure, the same after a restart.

An update may be so many times as long as is usual: the median, over the last closed rounds, of each round's median norm.
Only closed rounds have a say, so that what is refused doesn't depend on who is quicker; each round has one median, so
that a few hostile nodes don't move it. What is no longer than the longest of all rounds' medians always passes: training
settles, and a node that joins then, with rows that the model has never seen, must not be taken for hostile.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from atoll.plan import Checks
from atoll.wire import Address

WINDOW, ENOUGH = 10, 3
"""So many closed rounds say what is usual, and without so many there is no bound."""


@dataclass(frozen=True)
class Conduct:
    """What a run knows of its updates' lengths and of nodes that sent what can't count.

    Args:
        medians: the median norm of the accepted updates in each of the last closed rounds.
        longest: the largest of these medians in the whole run.
        counts: node → its offences since it was last held out.
        last: node → round and attempt of its newest offence, so that a log that is read again counts none twice.
        until: node → the last round that it is held out of.
    """

    medians: tuple[float, ...] = ()
    longest: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict)
    last: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    until: Mapping[str, int] = field(default_factory=dict)

    def closed(self, norms: Sequence[float]) -> Conduct:
        """A round was closed with updates of these norms."""
        if not norms:
            return self
        middle = median(norms)
        return replace(self, medians=(*self.medians, middle)[-WINDOW:], longest=max(self.longest, middle))

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
        return frozenset(node for node in nodes if not self.held_out(node, round_))


def bound(conduct: Conduct, checks: Checks) -> float | None:
    """Return how long an update may be; None where there is no bound, or not yet."""
    usual = median(conduct.medians) if len(conduct.medians) >= ENOUGH else 0.0
    return max(checks.norm * usual, conduct.longest) if checks.norm and usual else None


def too_long(conduct: Conduct, checks: Checks, norm: float | None) -> str | None:
    """Say why an update of a length can't count, or None where it can."""
    most = bound(conduct, checks)
    if most is None or norm is None or norm <= most:
        return None
    return (
        f"the update is {norm:.4g} long (Euclidean norm), the bound is {most:.4g}: checks.norm = {checks.norm:g} times the "
        "running median; look at the node's data and learning rate"
    )
