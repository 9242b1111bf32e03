"""Closing a round, as a pure function of the accepted bodies: read, fold, undo the guard, step.

The same bodies in the same order give the same bits, whoever computes it: the server, a simulation, a replay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from atoll.algorithms import Algorithm, State
from atoll.vector import Flat, Groups, Layouts, Update
from atoll.wire import Buffer, decode


class Accepted(NamedTuple):
    """An accepted update: whose, and how to get at its bytes."""

    node: str
    body: Callable[[], Buffer]


class _Bodies:
    """Updates as a fold wants them: blocks of views into their bytes."""

    def __init__(self, ids: Sequence[str], updates: Sequence[Update], layouts: Layouts, reference: Groups | None = None) -> None:
        self.ids, self.layouts, self.reference = ids, layouts, reference
        self._flats = {name: [update.groups[name].values for update in updates] for name in layouts}

    def block(self, group: str, lo: int, hi: int) -> Sequence[Flat]:
        return [flat[lo:hi] for flat in self._flats[group]]


def close(
    algorithm: Algorithm,
    state: State,
    model_layouts: Layouts,
    model: str,
    accepted: Sequence[Accepted],
    registered: int,
    reference: Groups | None = None,
) -> State:
    """Return the next state.

    Args:
        algorithm: the plan's method.
        state: the state at the round's start.
        model_layouts: the layouts of the model's groups.
        model: digest of the model that the nodes started from.
        accepted: the updates that count, in fold order.
        registered: how many nodes belong to the run.
        reference: the server's own update, where the method has it train too.

    Raises:
        WireError, LayoutError: a body is not what was verified when it arrived: the disk altered it.
    """
    layouts = algorithm.updates(model_layouts)
    updates = {one.node: decode(one.body(), layouts, model) for one in accepted}
    return step(algorithm, state, layouts, updates, registered, reference)


def step(
    algorithm: Algorithm,
    state: State,
    layouts: Layouts,
    updates: Mapping[str, Update],
    registered: int,
    reference: Groups | None = None,
) -> State:
    """Return the next state from updates as they are once read: node → update, in fold order; see `close`."""
    bodies = _Bodies(list(updates), list(updates.values()), layouts, reference)
    return algorithm.step(state, algorithm.fold(bodies, [update.weight for update in updates.values()], registered))
