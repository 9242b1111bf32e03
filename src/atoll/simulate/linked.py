"""A plan's link in a simulation: all of its ends in one process, with letters passed by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atoll import algorithms
from atoll.algorithms import Algorithm
from atoll.algorithms.algorithm import Bodies
from atoll.algorithms.folds import mean
from atoll.errors import LayoutError, PrivacyError
from atoll.keys import Identity
from atoll.messages import UPDATE
from atoll.plan import Plan
from atoll.privacy import bucketing
from atoll.privacy.choose import protect, terms
from atoll.privacy.link import Letters, Link, Own
from atoll.server import events
from atoll.server.close import Guard, folded
from atoll.vector import Layouts, Metrics, Total, Update, add
from atoll.wire import Address


class Linked:
    """Both halves of a link, for one try of a round at a time.

    Args:
        link: the plan's.
        plan: what everyone agreed to.
        algorithm: the plan's.
        layouts: of a protected update's groups.

    Attributes:
        metrics: the sums of the metrics of all updates that could be opened.
        lost: the clients whose updates couldn't be, in buckets that were left out; and why.
    """

    def __init__(self, link: Link, plan: Plan, algorithm: Algorithm, layouts: Layouts) -> None:
        gives = "" if plan.privacy.distributed_noise else link.gives
        self.steps = events.Steps(link.before, link.after, link.opens, link.few, link.least, gives)
        self.metrics: Metrics = {}
        self.lost: dict[str, str] = {}
        self._layouts = layouts
        self._total: Total | None = None
        self._link, self._plan, self._algorithm = link, plan, algorithm
        self._who: dict[str, Identity] = {}
        self._names: dict[str, str] = {}
        self.tried = (0, 0)
        self._server: Own = None
        self._own: dict[str, Any] = {}
        self._inbox: dict[str, bytes] = {}
        self._outbox: Letters = {}
        self._updates: dict[str, Update] = {}

    def train(self, command: events.Train, updates: Mapping[str, Update]) -> list[events.Event]:
        """Begin a try: clients join, keep their updates, and answer the first phase."""
        of = terms(self._plan, "simulated", command.round, command.attempt, command.model)
        self.tried, self._updates, self._inbox = (command.round, command.attempt), dict(updates), {}
        self._total = None
        self.metrics, self.lost = {}, {}
        self._server = self._link.begin(of)
        for name in updates:
            if name not in self._who:
                self._who[name] = identity = Identity.new()
                self._names[identity.node] = name
        self._own = {name: self._link.join(of, self._who[name]) for name in updates}
        self._outbox = {self._who[name].node: b"" for name in updates}
        first = self.steps.next("")
        return [] if first == UPDATE else self.say(events.Say(first, tuple(updates)))

    def say(self, command: events.Say) -> list[events.Event]:
        """Let clients answer what the link says to them in a phase."""
        happened: list[events.Event] = []
        for name in command.nodes:
            address, node = Address("simulated", *self.tried, name), self._who[name].node
            try:
                if self._total and command.phase == self._link.opens:
                    self._own[name] = self._link.see(self._own[name], self._total.groups)
                self._own[name], self._inbox[node] = self._link.answer(self._own[name], command.phase, self._outbox[node])
            except PrivacyError as error:
                happened.append(events.Declined(0.0, address, str(error)))
            else:
                happened.append(events.Answered(0.0, address, command.phase))
        return happened

    def protect(self, name: str) -> Update | str:
        """Return a client's update as it may leave, or why it can't."""
        update = algorithms.voiced(self._algorithm, self._updates.pop(name))
        try:
            message = self._outbox[self._who[name].node]
            self._own[name], hidden = protect(self._plan, self._link, self._own[name], message, update)
        except (PrivacyError, LayoutError) as error:
            return str(error)
        return hidden

    def collect(self, command: events.Collect, updates: Mapping[str, Update], registered: int) -> list[events.Event]:
        """Let the link make the next phase's messages; `updates` are the protected ones."""
        nodes = [self._who[name].node for name in command.nodes]
        try:
            if command.phase == UPDATE:
                self._server, self._outbox = self._link.close(self._server, nodes)
                if self._link.opens:
                    self._total = folded(self.guard(), {name: updates[name] for name in command.nodes}, registered)
            else:
                inbox = {node: self._inbox[node] for node in nodes}
                self._server, self._outbox = self._link.collect(self._server, command.phase, inbox)
        except PrivacyError as error:
            return [events.Abandoned(0.0, str(error))]
        self._inbox = {}
        known, found = self.lost, bucketing.lost(self._link, self._server)
        self.lost = {self._names[node]: why for node, why in found.items()}
        new = {name: why for name, why in self.lost.items() if name not in known}
        return [events.Collected(0.0, command.phase, frozenset(self._names[node] for node in self._outbox), new)]

    def guard(self) -> Guard:
        """Return how this try's updates are added up and made out."""
        by_node = bucketing.apart(self._link, self._server)

        def apart(names: Sequence[str]) -> list[list[str]]:
            assert by_node  # noqa: S101  it is asked for with buckets only
            return [[self._names[node] for node in nodes] for nodes in by_node([self._who[name].node for name in names])]

        return Guard(self._layouts, self._fold, self._undo, apart if by_node else None)

    def _fold(self, bodies: Bodies, weights: Sequence[float], registered: int) -> Total:
        return self._total or mean(bodies, weights, registered)

    def _undo(self, total: Total, names: Sequence[str]) -> Total:
        nodes = [self._who[name].node for name in names]
        try:
            undone = bucketing.undo(self._link, self._server, self._inbox, total, nodes)
        except PrivacyError as error:
            self.lost |= dict.fromkeys(names, str(error))
            raise
        self.metrics = add([self.metrics, undone.metrics])
        return undone.total
