"""Closing a round, as a pure function of the accepted bodies: read, fold, undo the guard, step.

The same bodies in the same order give the same bits, whoever computes it: the server, a simulation, a replay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from atoll.algorithms import Algorithm, Bodies, Fold, State
from atoll.compression import OPEN, Press, Read
from atoll.guards import BUCKETS
from atoll.server.means import over_means
from atoll.vector import Flat, Groups, Layouts, Total, Update
from atoll.wire import Buffer, decode

Undo = Callable[[Total], Total]


class Guard(NamedTuple):
    """What hid the updates of a round.

    Args:
        layouts: of a protected update's groups.
        fold: how these are added up.
        undo: what the total of these nodes' updates really is, in the algorithm's own layouts.
        apart: the nodes of each sum, where updates are added up in buckets.
    """

    layouts: Layouts
    fold: Fold
    undo: Callable[[Total, Sequence[str]], Total]
    apart: Callable[[Sequence[str]], Collection[Sequence[str]]] | None = None


See = Callable[[Bodies, Sequence[float]], None]
"""Is shown the updates and their weights before they are folded; what it makes of them is no part of the state."""


class Accepted(NamedTuple):
    """An accepted update: whose, and how to get at its bytes.

    One that is late by τ rounds started from another model than the round's: `started` is its digest. `round` is the one
    that it was asked for in.
    """

    node: str
    body: Callable[[], Buffer]
    late: int = 0
    started: str = ""
    round: int = 0


class _Block(Sequence[Flat]):
    """One stretch of every update, each opened when it is looked at: who adds them up holds one at a time."""

    def __init__(self, reads: Sequence[Read], lo: int, hi: int, scales: Mapping[int, float]) -> None:
        self._reads, self._lo, self._hi, self._scales = reads, lo, hi, scales

    def __len__(self) -> int:
        return len(self._reads)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[k] for k in range(len(self))[place]]
        values = self._reads[place](self._lo, self._hi)
        scale = self._scales.get(range(len(self))[place])
        return values if scale is None else values * values.dtype.type(scale)


class _Bodies:
    """Updates as a fold wants them: blocks of views into their bytes, or opened by blocks; of late ones, made smaller."""

    def __init__(
        self,
        ids: Sequence[str],
        updates: Sequence[Update],
        layouts: Layouts,
        reference: Groups | None = None,
        scales: Mapping[str, float] = {},
        reads: Sequence[Mapping[str, Read]] | None = None,
    ) -> None:
        self.ids, self.layouts, self.reference = ids, layouts, reference
        self._reads = reads or [OPEN.open(update.groups, layouts, 0) for update in updates]
        self._scales = {place: scales[node] for place, node in enumerate(ids) if node in scales}

    def block(self, group: str, lo: int, hi: int) -> Sequence[Flat]:
        averaged = self.layouts[group].total == "weighted"  # what is added up whole (counts) is no step to be shortened
        return _Block([read[group] for read in self._reads], lo, hi, self._scales if averaged else {})


def close(  # noqa: PLR0913  what is rare by its name
    algorithm: Algorithm,
    state: State,
    model_layouts: Layouts,
    model: str,
    accepted: Sequence[Accepted],
    registered: int,
    reference: Groups | None = None,
    *,
    guard: Guard | None = None,
    undo: Undo | None = None,
    press: Press = OPEN,
    see: See | None = None,
) -> State:
    """Return the next state.

    Args:
        algorithm: the plan's method.
        state: the state at the round's start.
        model_layouts: the layouts of the model's groups.
        model: digest of the model that nodes were asked with in this round.
        accepted: the updates that count, in fold order.
        registered: how many nodes belong to the run.
        reference: the server's own update, where the method has it train too.
        guard: what hid the updates, if something did.
        undo: what becomes of the total before the step, such as noise.
        press: what made the updates small, before a guard hid them.
        see: who looks at the updates on the way.

    Raises:
        WireError, LayoutError: a body is not what was verified when it arrived: the disk altered it.
    """
    layouts = guard.layouts if guard else algorithm.updates(model_layouts)
    small = press.layouts(layouts)
    updates = {one.node: decode(one.body(), small, one.started or model) for one in accepted}
    reads = [press.open(updates[one.node].groups, layouts, one.round) for one in accepted]
    late = {one.node: one.late for one in accepted if one.late}
    if guard:
        guard = expanded(guard, press, algorithm.updates(model_layouts), accepted[0].round)
    return step(algorithm, state, layouts, updates, registered, reference, late, guard, reads, undo, see)


def expanded(guard: Guard, press: Press, layouts: Layouts, round_: int) -> Guard:
    """Return a guard whose total is opened: what hid the updates added up what stages made of them, the same for every node.

    Args:
        guard: over small updates.
        press: what made them small.
        layouts: of whole updates.
        round_: the one that all of them were asked for in.
    """

    def undo(total: Total, nodes: Sequence[str]) -> Total:
        small = guard.undo(total, nodes)
        return replace(small, groups=press.decode(small.groups, layouts, round_))

    return guard._replace(undo=undo) if press.stages else guard


def opened(layouts: Layouts, model: str, accepted: Sequence[Accepted]) -> dict[str, Update]:
    """Return protected updates of one round as they are, in fold order; the arguments are those of `close`."""
    return {one.node: decode(one.body(), layouts, model) for one in accepted}


def folded(guard: Guard, updates: Mapping[str, Update], registered: int) -> Total:
    """Add up protected updates, which stay hidden; the arguments are those of `step`."""
    bodies = _Bodies(list(updates), list(updates.values()), guard.layouts)
    return guard.fold(bodies, [update.weight for update in updates.values()], registered)


def step(  # noqa: PLR0913, PLR0917  what is rare is rarely given
    algorithm: Algorithm,
    state: State,
    layouts: Layouts,
    updates: Mapping[str, Update],
    registered: int,
    reference: Groups | None = None,
    late: Mapping[str, int] = {},
    guard: Guard | None = None,
    reads: Sequence[Mapping[str, Read]] | None = None,
    undo: Undo | None = None,
    see: See | None = None,
) -> State:
    """Return the next state from updates as they are once read: node → update, in fold order; see `close`.

    `late` says by how many rounds those are late that are; `reads` how to read updates that are small yet.
    """
    scales = {node: algorithm.late(rounds) for node, rounds in late.items()} if algorithm.late else {}
    bodies = _Bodies(list(updates), list(updates.values()), layouts, reference, scales, reads)
    weights = [update.weight for update in updates.values()]
    if see:
        see(bodies, weights)
    if guard and guard.apart:
        enough = max(BUCKETS, algorithm.least)
        total = over_means(bodies, guard.apart(bodies.ids), guard.fold, guard.undo, algorithm.fold, enough, registered)
    elif guard:
        total = guard.undo(guard.fold(bodies, weights, registered), bodies.ids)
    else:
        total = algorithm.fold(bodies, weights, registered)
    return algorithm.step(state, undo(total) if undo else total)
