"""Time and chance of a simulated world, all from one seed."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Faults:
    """How unkind the world is: chances a message, and means of seconds.

    Args:
        lost, doubled: chance that a control message is.
        delay, longest: a message's mean delay, and the longest.
        breaks: chance that a connection breaks at a message.
        dies: chance that the server, or a node, dies at one of its events.
        away: how long what died stays away, on average.
        broken: chance that a try at the log, or at a model, fails half-way.
        drift: how much faster or slower a clock may run.
        fit: how long a node trains, on average.
        revokes: chance that the operator revokes a node at one of the server's events.
    """

    lost: float = 0.0
    doubled: float = 0.0
    delay: float = 0.05
    longest: float = 5.0
    breaks: float = 0.0
    dies: float = 0.0
    away: float = 2.0
    broken: float = 0.0
    drift: float = 0.0
    fit: float = 1.0
    revokes: float = 0.0


class World:
    """What happens next, and when.

    Args:
        seed: of all chance.

    Attributes:
        now: in seconds since the beginning.
        chance: the dice.
    """

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.chance = random.Random(seed)  # noqa: S311  a simulation's dice
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        """Let something happen after a while."""
        heapq.heappush(self._due, (self.now + seconds, next(self._order), act))

    def next(self) -> bool:
        """Let the next thing happen; return whether there was one."""
        if self._due:
            self.now, _, act = heapq.heappop(self._due)
            act()
            return True
        return False

    def about(self, mean: float, longest: float) -> float:
        """Return a time around a mean, exponentially distributed."""
        return min(self.chance.expovariate(1 / mean), longest) if mean else 0.0

    def happens(self, chance: float) -> bool:
        """Say whether something happens that does with this chance."""
        return chance > 0 and self.chance.random() < chance

    def clock(self, drift: float) -> float:
        """Return how fast a clock runs."""
        return 1 + drift * self.chance.uniform(-1, 1)
