"""A node's rows made ready: read in a thread that can be told to stop, and shown to whoever watches."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from atoll.errors import GaveUpError
from atoll.learner import Data
from atoll.plan import Plan
from atoll.preprocess import Given, prepare
from atoll.preprocess.spool import remove

_QUIET, _EVERY = 2.0, 0.25
"""Reading shows nothing for the first seconds, and then not more often than this."""


class Holding:
    """What a node's owner gave it, and how far it is read.

    Args:
        source: a file, a folder, a database's address, or arrays, as `prepare` takes them.
        directory: the node's; rows that are too many for memory are kept there while it runs.
        tell: told `reading` and `standardising` with `rows` and `of`, and `waiting` with a reason.
    """

    def __init__(self, source: Given, directory: Path, tell: Callable[..., None]) -> None:
        self._source, self._tell = source, tell
        self._spool = directory / f"spool-{os.getpid()}"  # never another process's files
        for stale in directory.glob("spool-*"):  # of a crash
            remove(stale)
        self._stopped = threading.Event()
        self._shown = 0.0
        self.read = 0

    async def ready(self, plan: Plan) -> Data:
        """Return the rows that the plan makes of it.

        Raises:
            DataError: they don't fit the plan, or can't be read.
            GaveUpError: it was stopped.
        """
        self._shown = time.monotonic() + _QUIET - _EVERY
        return await asyncio.to_thread(prepare, self._source, plan, spool=self._spool, progress=self._progress, pause=self._pause)

    def stop(self) -> None:
        """Let reading break off, soon."""
        self._stopped.set()

    def close(self) -> None:
        """Let go of what is on disk."""
        self.stop()
        remove(self._spool)

    def _progress(self, what: str, through: int, rows: int | None) -> None:
        self._unless_stopped()
        if what == "reading":
            self.read = through
        if (now := time.monotonic()) - self._shown >= _EVERY:
            self._shown = now
            self._tell(what, rows=through, of=rows)

    def _pause(self, seconds: float, why: str) -> None:
        self._tell("waiting", reason=why)
        self._stopped.wait(seconds)
        self._unless_stopped()

    def _unless_stopped(self) -> None:
        if self._stopped.is_set():
            raise GaveUpError("reading was stopped")
