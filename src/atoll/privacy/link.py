"""A link: what protects updates between a node's training and the server's step, in phases of small messages around them.

Who relays the messages knows no link's inside: phases are names, messages are bytes. The server says something to each
node, the node answers, and what the server makes of all answers is what it says in the next phase::

    begin ─▶ [say ─ answer ─ collect] for each phase of `before` ─▶ say ─ protect ─▶ the update log ─▶ fold
          ─▶ close ─▶ [say ─ answer ─ collect] for each phase of `after` but the last, whose answers go to `undo`

States are frozen values, opaque to all but the link. A state is used once, and the next one takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar

from atoll.errors import PrivacyError
from atoll.keys import Identity
from atoll.privacy.secagg.terms import Terms
from atoll.vector import Groups, Layouts, Metrics, Total, Update

T = TypeVar("T")
Own = Any
"""A side's state."""
Letters = Mapping[str, bytes]
"""A message to or from each node, by its id."""


class Undone(NamedTuple):
    """What a link makes of the fold's total.

    Args:
        total: as if no link had been there.
        metrics: the sums of all updates' metrics.
        faults: nodes that sent what was wrong, and what.
    """

    total: Total
    metrics: Metrics
    faults: Mapping[str, str]


class Bucket(NamedTuple):
    """A part of a cohort with a sum of its own.

    Args:
        nodes: those that are in the sum, as far as that is known.
        own: the state of that sum.
        lost: why it can't be made; an empty text where it can.
    """

    nodes: tuple[str, ...]
    own: Own
    lost: str = ""


class Link(NamedTuple):
    """A link, cut where the network cuts; made by a factory named after what it does.

    All of them raise `PrivacyError` for what they refuse: a node then declines the round, a server abandons it.

    Args:
        before: names of the phases before an update is protected.
        after: names of the phases after it is known whose updates are in the total.
        updates: layouts of an update's groups → those of a protected one.
        join: node: terms → its first state.
        answer: node: (state, phase, message) → (state, answer).
        protect: node: (state, message, update) → (state, the update that leaves). The update is used up.
        begin: server: terms → its first state. The first phase's message is empty, so it can go with the request to train.
        collect: server: (state, phase, answers) → (state, messages for the next one).
        close: server: (state, the nodes in the total) → (state, messages for the first phase after).
        undo: server: (state, answers of the last phase, total) → what the total really is.
        opens: the phase after, if any, in which nodes read the fold's total themselves: whoever relays shows it to those that
            are told something in this phase, by way of `see`, before they answer.
        few: how many answers that phase takes: those that are told something in it answer for all.
        see: node: (state, the groups of the fold's total) → state.
        whose: node: the ids of the nodes whose sum a state is agreed to reveal; empty before that, and after.
        buckets: server: state → the buckets of the cohort, each with the state that `undo` takes; None: one sum is of all.
        least: with buckets, how few nodes all sums together may be of.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    updates: Callable[[Layouts], Layouts]
    join: Callable[[Terms, Identity], Own]
    answer: Callable[[Own, str, bytes], tuple[Own, bytes]]
    protect: Callable[[Own, bytes, Update], tuple[Own, Update]]
    begin: Callable[[Terms], Own]
    collect: Callable[[Own, str, Letters], tuple[Own, Letters]]
    close: Callable[[Own, Collection[str]], tuple[Own, Letters]]
    undo: Callable[[Own, Letters, Total], Undone]
    opens: str = ""
    few: int = 0
    see: Callable[[Own, Groups], Own] = lambda own, _: own
    whose: Callable[[Own], tuple[str, ...]] = lambda _: ()
    buckets: Callable[[Own], tuple[Bucket, ...]] | None = None
    least: int = 0

    @property
    def gives(self) -> str:
        """The phase in which a node helps to reveal a sum, and so may help with no other of the same round; or none.

        Where some nodes open the sum for all, that is as soon as any of them says whose it is.
        """
        return self.after[0 if self.opens else -1] if self.after else ""


def reached(state: object, kind: type[T], phase: str) -> T:
    """Return a side's state as the one that a phase needs.

    Raises:
        PrivacyError: it is another one.
    """
    if not isinstance(state, kind):
        raise PrivacyError(f"{phase} was asked for out of turn: it has been, or something else comes first")
    return state
