"""A store that fails is waited for: a full disk, or one gone read-only, is an operator's to mend, and no reason to lose a run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from atoll.errors import StoreError

T = TypeVar("T")
log = logging.getLogger("atoll.server")
FIRST, LONGEST = 0.25, 5.0
"""The first and the longest pause between tries, in seconds; each is twice the one before."""


class Patience:
    """What the store refuses is tried again, until it takes it or a deadline is over.

    Args:
        seconds: how long.
        tell: told once, as the trouble begins, of what fails and why.

    Attributes:
        waiting: what fails at present and why, in one line; None where all is well.
    """

    def __init__(self, seconds: float, tell: Callable[[str], None]) -> None:
        self.waiting: str | None = None
        self._seconds, self._tell = seconds, tell
        self._spent = False

    async def until_stored(self, act: Callable[[], Awaitable[T]]) -> T:
        """Do what writes to the store, again and again until that works; return its result.

        Raises:
            StoreError: the deadline is over; what fails after that is not waited for, until something has been stored.
        """
        now = asyncio.get_running_loop().time
        until, pause = now() + self._seconds, FIRST
        while True:
            try:
                done = await act()
            except StoreError as error:
                if self._spent or now() + pause > until:
                    self._spent = True
                    raise
                self._fails(str(error), until - now())
            else:
                if self.waiting:
                    log.warning("the store works again")
                self.waiting, self._spent = None, False
                return done
            await asyncio.sleep(pause)
            pause = min(LONGEST, 2 * pause)

    def end(self) -> None:
        """Wait for no mend any more: somebody wants to stop."""
        self._spent = True

    def _fails(self, why: str, left: float) -> None:
        if not self.waiting:
            log.warning("%s; it is tried again for %.0f s", why, left)
            self._tell(why)
        self.waiting = f"{why}; it is tried again for {left:.0f} s"
