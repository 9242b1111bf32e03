"""The shapes of a method: an `Algorithm` is a small value of pure functions, a `Fold` adds updates up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from atoll.learner import Learner, Rows
from atoll.training import Pace
from atoll.vector import Flat, Groups, Layouts, Total, Update

State = Groups
"""What the server keeps between rounds: groups, so that a checkpoint of any method is one file of arrays."""

Memory = Groups
"""What a node keeps between rounds; empty at first. A new one counts only once its update was aggregated."""


class Bodies(Protocol):
    """The accepted updates of a closed round, in the order of their nodes."""

    @property
    def ids(self) -> Sequence[str]:
        """The nodes, in fold order."""
        ...

    @property
    def layouts(self) -> Layouts:
        """The layouts that every body has."""
        ...

    @property
    def reference(self) -> Groups | None:
        """The server's own update of this round, where the method has it train too."""
        ...

    def block(self, group: str, lo: int, hi: int) -> Sequence[Flat]:
        """Return numbers `lo` to `hi` of one group of every body, `[updates][hi - lo]`: views, not copies."""
        ...


Fold = Callable[[Bodies, Sequence[float], int], Total]
"""`fold(bodies, weights, registered)`: same bits whatever the order of arrival; memory: models, and a block of every update."""


Own = Callable[[Learner, Groups, Memory, Rows, Pace, np.random.Generator], Groups]
"""`own(learner, brief, memory, rows, pace, rng)`: the model that a node itself uses, from the one that it received."""


Late = Callable[[int], float]
"""`late(τ)`: how much of its step an update keeps that is late by τ rounds; 1 where τ is 0."""


class Algorithm(NamedTuple):
    """A method, cut where the network cuts; made by a factory named after its paper.

    Args:
        init: a new model's groups → the server's first state.
        brief: state → what a node is sent; holds the model's own groups.
        updates: the model's layouts → the layouts of an update's groups.
        local: (learner, brief, memory, rows, pace, rng) → (new memory, update), on the node.
        step: (state, total) → the next state, on the server.
        fold: how updates are added up.
        needs: what the learner must be able to do (see `Learner.can`).
        least: how few updates it can be computed from; `cohort.minimum` is no less.
        root: whether the server does the local half too, on rows of its own, for the fold to compare with.
        own: what a node makes of the model for itself, judges, and keeps at the end; None: it is the received one.
        fits: raises PlanError for a learner that can't do what the options ask of it; beyond `needs`.
        verify: (the model's layouts, an update's groups): raises LayoutError where layouts and finite numbers are not enough.
        late: what an update is multiplied with that is late by τ rounds, made from an earlier model; None: it can't be folded.
        teach: (learner, state before, state after, the server's rows, pace, rng) → an update's groups: what the server makes of
            a round's outcome on rows of its own, for the fold to see in a second pass.
        robust: whether the fold bears a part of what it compares being anything, so that means of some nodes' updates each will
            do in place of updates.
        silent: whether nodes tell no metrics: what is said of their rows has to be protected too, and these aren't.
    """

    init: Callable[[Groups], State]
    brief: Callable[[State], Groups]
    updates: Callable[[Layouts], Layouts]
    local: Callable[[Learner, Groups, Memory, Rows, Pace, np.random.Generator], tuple[Memory, Update]]
    step: Callable[[State, Total], State]
    fold: Fold
    needs: frozenset[str] = frozenset()
    least: int = 1
    root: bool = False
    own: Own | None = None
    fits: Callable[[Learner], None] | None = None
    verify: Callable[[Layouts, Groups], None] | None = None
    late: Late | None = None
    robust: bool = False
    silent: bool = False
    teach: Callable[[Learner, State, State, Rows, Pace, np.random.Generator], Groups] | None = None
