"""What happens to a run (events), and what is to be done about it (commands): plain frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from atoll.messages import UPDATE
from atoll.server.offences import Conduct, Length
from atoll.stopping import Course
from atoll.wire import Address

Outcome = Literal["completed", "gave_up", "stopped"]


class Steps(NamedTuple):
    """The phases of a link, by their names: before updates are protected, and after it is known which are in.

    In the phase `opens` a few nodes answer for all, and `few` of them are enough. `least` is how few updates make a round,
    where that isn't the plan's minimum. From `gives` on nodes help to reveal a sum, and help with another one of the round only
    over the same nodes; it is empty where they help with any.
    """

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    opens: str = ""
    few: int = 0
    least: int = 0
    gives: str = ""

    def next(self, phase: str) -> str:
        """Return the phase that follows on one, which isn't the last; on none, an empty text, follows the first."""
        order = ("", *self.before, UPDATE, *self.after)
        return order[order.index(phase) + 1]

    @property
    def last(self) -> str:
        """The last phase."""
        return (UPDATE, *self.after)[-1]


NO_STEPS = Steps()
"""Those of a run without a link."""


class Task(NamedTuple):
    """What a node is asked for: an update for a try of a round, made from this model, by this time.

    It belongs to the node, with a deadline of its own: rounds may close meanwhile.
    """

    round: int
    attempt: int
    model: str
    until: float


@dataclass(frozen=True)
class Event:
    """Something that happened, at a time in seconds."""

    now: float


@dataclass(frozen=True)
class Joined(Event):
    """Nodes are connected: id → name. A node that comes back joins again."""

    nodes: Mapping[str, str]


@dataclass(frozen=True)
class Lost(Event):
    """A node's connection is gone."""

    node: str


@dataclass(frozen=True)
class Revoked(Event):
    """A node may take part no more."""

    node: str


@dataclass(frozen=True)
class Appended(Event):
    """An update is complete and durable in the log, and was verified; `size` is in bytes."""

    address: Address
    digest: str
    size: int = 0
    length: Length | None = None


@dataclass(frozen=True)
class Refused(Event):
    """What a node signed and appended can't count, whatever the network did: other arrays than agreed, NaN, no weight."""

    address: Address
    digest: str
    size: int
    reason: str


@dataclass(frozen=True)
class Declined(Event):
    """A node says that nothing will come from it, or what came can't count."""

    address: Address
    reason: str


@dataclass(frozen=True)
class Answered(Event):
    """A node's answer in a phase of the link is here; `address` is of the try that it is for."""

    address: Address
    phase: str


@dataclass(frozen=True)
class Collected(Event):
    """What the link makes of a phase's answers is made: messages for these nodes, which are left in the round.

    `lost` are nodes whose sum can't be made any more, and why.
    """

    phase: str
    nodes: frozenset[str]
    lost: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Abandoned(Event):
    """The link won't go on with this try of the round."""

    reason: str


@dataclass(frozen=True)
class Closed(Event):
    """The round's new model is made and stored; `judged` are the newest figures: of it, or of the one that the nodes received.

    `over` says why there can be no further round, where that is so: the plan's privacy budget is spent. `lost` are nodes
    whose updates are not in it after all, since their sum couldn't be made, and why.
    """

    model: str
    judged: Mapping[str, float] = field(default_factory=dict)
    over: str = ""
    lost: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Broken(Event):
    """The run can't go on: the server itself failed."""

    reason: str


@dataclass(frozen=True)
class Left(Event):
    """A node has taken the final model."""

    node: str


@dataclass(frozen=True)
class Tick(Event):
    """Time has passed."""


@dataclass(frozen=True)
class Stop(Event):
    """Somebody asks the run to end."""

    reason: str


@dataclass(frozen=True)
class Train:
    """Tell these nodes to train; `again` where they were asked before and lost.

    Else a round opens, and `late` are the nodes that still work for an earlier one.
    """

    nodes: tuple[str, ...]
    round: int
    attempt: int
    model: str
    seconds: float
    again: bool = False
    late: Mapping[str, Task] = field(default_factory=dict)


@dataclass(frozen=True)
class Collect:
    """Let the link make the next phase's messages of these nodes' answers; in phase `UPDATE`, of whose updates are in."""

    phase: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Say:
    """Tell these nodes what the link says to each of them in a phase."""

    phase: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Judge:
    """Tell a node whether its update counts, and record it; an `offence` is refused for what the node itself put into it.

    Without a digest nothing came, and nothing will. What is `lost` came in time for a sum that couldn't be made.
    """

    address: Address
    digest: str
    accepted: bool
    reason: str = ""
    size: int = 0
    norm: float | None = None
    offence: bool = False
    lost: bool = False


@dataclass(frozen=True)
class Close:
    """Fold these updates, in this order: node → digest; of a cohort of so many nodes, in a run that so many belong to.

    `late` are the tasks of those that are for an earlier round.
    """

    round: int
    attempt: int
    accepted: Mapping[str, str]
    cohort: int
    registered: int
    late: Mapping[str, Task] = field(default_factory=dict)

    def address(self, run: str, node: str) -> Address:
        """Return what a node's update is addressed by."""
        return Address(run, *(self.late[node][:2] if node in self.late else (self.round, self.attempt)), node)


@dataclass(frozen=True)
class End:
    """Tell these nodes that the run is over."""

    nodes: tuple[str, ...]
    outcome: Outcome
    reason: str


@dataclass(frozen=True)
class Wake:
    """Send a `Tick` at this time."""

    at: float


@dataclass(frozen=True)
class Finish:
    """Nothing more will happen: close everything."""

    outcome: Outcome
    reason: str


Command = Train | Collect | Say | Judge | Close | End | Wake | Finish


class Past(NamedTuple):
    """A run so far, as another server left it.

    Args:
        closed: how many rounds are.
        attempt: of the next round.
        tasks: node → what it was asked for and hasn't given yet; where one is of the next round, that had begun.
        names: every node that ever joined: id → name.
        model: digest of the newest global model.
        course: how models have done.
        answered: the nodes whose updates made that model.
        conduct: how long updates were, and who sent what can't count.
        summed: with a link, the nodes whose sum was about to be revealed when the other server died.
        sealed: with a link, the nodes whose sum was about to be revealed in any try of the next round.
    """

    closed: int
    attempt: int
    tasks: Mapping[str, Task]
    names: Mapping[str, str]
    model: str
    course: Course
    answered: tuple[str, ...]
    conduct: Conduct = Conduct()
    summed: tuple[str, ...] = ()
    sealed: tuple[str, ...] = ()
