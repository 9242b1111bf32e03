"""What is still to come in a simulated federation, in its order.

Without devices, time stands still for the server's machine: no deadline is ever over, and who answers first is told by training
steps. With devices events have times, in virtual seconds, and deadlines, grace and lateness are as they would be.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from atoll.server import events
from atoll.simulate.devices import Devices, Spell


class Coming(NamedTuple):
    """What is still to come: the time, events in their order, and how often and until when each client has been there."""

    at: float
    events: Sequence[tuple[float, events.Event]]
    seen: Mapping[str, int]
    until: Mapping[str, float]


class Clock:
    """The events of a run that haven't happened yet.

    Args:
        devices: what clients run on; None where time stands still.
    """

    def __init__(self, devices: Devices | None = None) -> None:
        self.devices = devices
        self._at: float = 0
        self._coming: list[tuple[float, int, events.Event]] = []
        self._turns = itertools.count()
        self._spells: dict[str, Iterator[Spell]] = {}
        self._until: dict[str, float] = {}
        self._seen: dict[str, int] = {}

    def __bool__(self) -> bool:
        """Whether anything is to come."""
        return bool(self._coming)

    @property
    def now(self) -> float:
        """The machine's time, in seconds."""
        return self._at if self.devices else 0.0

    @property
    def coming(self) -> Coming:
        """What is still to come, for `go_on`."""
        return Coming(self._at, [(at, event) for at, _, event in sorted(self._coming)], self._seen, self._until)

    def go_on(self, coming: Coming) -> None:
        """Take up what was still to come in a run that was stopped."""
        self._at, self._seen, self._until = coming.at, dict(coming.seen), dict(coming.until)
        self._coming = [(at, next(self._turns), event) for at, event in coming.events]  # in order, and so a heap
        if self.devices:
            self._spells = {name: itertools.islice(self.devices.spells(name), seen, None) for name, seen in self._seen.items()}

    def after(self, pause: float, event: events.Event) -> None:
        """Let something happen so many steps, or seconds, from now."""
        heapq.heappush(self._coming, (self._at + pause, next(self._turns), event))

    def done(self, name: str, steps: int, down: int, up: int, event: events.Appended | events.Refused | events.Declined) -> None:
        """Let a client's word come when it is done; never, where it goes away before: it is asked again when it is back."""
        if not self.devices:
            self.after(steps, event)
            return
        task = event.address.round, event.address.attempt
        pause = self.devices.takes(name, task, steps, down, up)
        if self._at + pause < self._until.get(name, float("inf")):
            self.after(pause, event)

    def wake(self, at: float) -> None:
        """Let the machine look at its deadlines at a time; where time stands still there is none."""
        if self.devices:
            self.after(max(0.0, at - self._at), events.Tick(at))

    def follow(self, names: Iterator[str]) -> list[events.Event]:
        """Let clients come and go as their devices do; return who is there at once."""
        here = {}
        for name in names:
            self._spells[name] = self.devices.spells(name) if self.devices else iter(())
            if (begins := self._next_spell(name)) == 0:
                here[name] = name
                self._goes(name)
            elif begins is not None:
                self.after(begins, events.Joined(0.0, {name: name}))
        return [events.Joined(0.0, here)] if here else []

    def next(self) -> events.Event:
        """Return what happens next, at its time."""
        self._at, _, event = heapq.heappop(self._coming)
        if not self.devices:
            return event
        if isinstance(event, events.Joined):
            for name in event.nodes:
                self._goes(name)
        if isinstance(event, events.Lost) and (begins := self._next_spell(event.node)) is not None:
            self.after(begins - self._at, events.Joined(0.0, {event.node: event.node}))
        return replace(event, now=self._at)

    def _next_spell(self, name: str) -> float | None:
        self._seen[name] = self._seen.get(name, 0) + 1
        begins, self._until[name] = next(self._spells[name], (None, 0.0))
        return begins

    def _goes(self, name: str) -> None:
        if (until := self._until[name]) < float("inf"):
            self.after(until - self._at, events.Lost(0.0, name))
