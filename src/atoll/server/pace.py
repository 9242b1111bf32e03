"""How much of a server one node may have: so many messages a second, more at once where it was quiet before.

Far above what a node needs that does its part, so there is nothing to set: a round takes a few messages and one upload, and
no server closes as many rounds a second.
"""

from __future__ import annotations

RATE, BURST = 100.0, 1000.0
"""Messages a second in the long run, and at once. What is long, or costs more than reading it, counts as several."""
BYTES, UPLOAD, HANDSHAKE = 4096, 5.0, 20.0
"""So many bytes count as one message; an upload that begins, and a handshake, as so many messages."""


class Pace:
    """What one node has left."""

    __slots__ = ("_at", "_left")

    def __init__(self, now: float) -> None:
        self._left, self._at = BURST, now

    def take(self, cost: float, now: float) -> float:
        """Take something, and return for how many seconds it has to wait: 0 where there is enough left.

        >>> pace = Pace(0.0)
        >>> pace.take(BURST, 0.0), pace.take(RATE, 0.0), pace.take(1, 1.0)
        (0.0, 1.0, 0.01)
        """
        self._left = min(BURST, self._left + RATE * (now - self._at)) - cost
        self._at = now
        return max(0.0, -self._left / RATE)

    def spare(self, cost: float, now: float) -> float:
        """Take something that is refused where too little is left; return 0, or in how many seconds there will be enough."""
        if (wait := self.take(cost, now)) > 0:
            self._left += cost
        return wait
