"""Sums in buckets, as a round's rule sees them: each bucket's mean stands for an update. Pure.

Enters: the protected updates of a round, and how each bucket's sum of them is opened. Leaves: the plan's rule over the means,
as one total. Memory: a model a bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from atoll.algorithms import Bodies, Fold
from atoll.errors import PrivacyError
from atoll.vector import Flat, Group, Groups, Layouts, Total, layouts_of


class _Some:
    """Some of the updates."""

    def __init__(self, bodies: Bodies, nodes: Sequence[str]) -> None:
        places = {node: place for place, node in enumerate(bodies.ids)}
        self.ids, self.layouts, self.reference = nodes, bodies.layouts, None
        self._bodies, self._places = bodies, [places[node] for node in nodes]

    def block(self, group: str, lo: int, hi: int) -> Sequence[Flat]:
        block = self._bodies.block(group, lo, hi)
        return [block[place] for place in self._places]


class _Means:
    """The means of sums, in the place of updates; what is added up whole stays a sum."""

    def __init__(self, means: Sequence[Groups], reference: Groups | None) -> None:
        self.ids, self.reference = [str(number) for number in range(1, len(means) + 1)], reference
        self.layouts: Layouts = layouts_of(means[0])
        self._means = means

    def block(self, group: str, lo: int, hi: int) -> Sequence[Flat]:
        return [mean[group].values[lo:hi] for mean in self._means]


def over_means(
    bodies: Bodies,
    buckets: Collection[Sequence[str]],
    fold: Fold,
    undo: Callable[[Total, Sequence[str]], Total],
    rule: Fold,
    enough: int,
    registered: int,
) -> Total:
    """Return what a rule makes of the buckets' means, each with its sum's weight; a bucket that can't be opened is left out.

    Args:
        bodies: the protected updates.
        buckets: the nodes of each.
        fold: how protected updates are added up.
        undo: what the total of some nodes' updates really is.
        rule: the plan's.
        enough: how few means it takes.
        registered: how many nodes belong to the run.

    Raises:
        PrivacyError: fewer can be opened.
    """
    means, weights, participants, why = list[Groups](), list[float](), 0, ""
    for nodes in buckets:
        try:
            total = undo(fold(_Some(bodies, nodes), [1.0] * len(nodes), registered), nodes)
        except PrivacyError as error:
            why = str(error)
            continue
        means.append({name: Group(group.layout, total.mean(name)) for name, group in total.groups.items()})
        weights.append(total.weight)
        participants += total.participants
    if len(means) < enough:
        raise PrivacyError(f"{len(means)} of {len(buckets)} buckets are left, and it takes {enough}: {why}")
    return replace(rule(_Means(means, bodies.reference), weights, registered), participants=participants)
