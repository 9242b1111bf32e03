"""The update log in memory: both ends in one process, for simulations and tests. As durable as the process."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path

from atoll.errors import LogError, RefusedError
from atoll.logs import Progress, Record, pieces
from atoll.logs.bodies import check_size
from atoll.wire import Address, Buffer, Envelope


class InprocLog:
    """An `Appender` and a `Reader` over a dictionary.

    Args:
        run: the run whose updates are read.
        limit: the longest body, in bytes.
    """

    waiting: str | None = None
    positions: str | None = None

    def __init__(self, run: str, limit: int = 1 << 40) -> None:
        self._run, self._limit = run, limit
        self._bodies: dict[Address, tuple[str, bytes]] = {}
        self._records: list[Record | None] = []
        self._news = asyncio.Condition()

    async def append(self, envelope: Envelope, body: Sequence[Buffer] | Path, progress: Progress | None = None) -> None:
        """See `Appender.append`."""
        if envelope.size > self._limit:
            raise RefusedError(f"the update has {envelope.size} bytes, the limit is {self._limit}")
        check_size(envelope, body)
        there = self._bodies.get(envelope.address)
        if there and there[0] != envelope.digest:
            raise RefusedError("another update is already in the log under this address: the first complete one counts")
        whole = b"".join(pieces(body))
        if hashlib.sha256(whole).hexdigest() != envelope.digest:
            raise RefusedError("the body isn't what its envelope says: size or digest differ")
        if not there:
            self._bodies[envelope.address] = (envelope.digest, whole)
            if envelope.address.run == self._run:
                self._records.append(Record(envelope, str(len(self._records))))
                await self._tell()
        if progress:
            progress(envelope.size)

    def follow(self, node: str) -> None:
        """See `Reader.follow`: there is one place for all."""

    async def records(self) -> AsyncIterator[Record]:
        """See `Reader.records`."""
        for seen in itertools.count():
            async with self._news:
                while len(self._records) == seen:
                    await self._news.wait()
            if (record := self._records[seen]) is None:
                return
            yield record

    def arriving(self) -> Mapping[Address, tuple[int, int]]:
        """See `Reader.arriving`: here a body comes all at once."""
        return {}

    def body(self, envelope: Envelope) -> memoryview:
        """See `Reader.body`."""
        digest, whole = self._bodies.get(envelope.address, ("", b""))
        if digest != envelope.digest:
            raise LogError(f"the log holds no update {envelope.digest[:12]} of round {envelope.address.round}")
        return memoryview(whole)

    def forget(self, round_: int, keep: Collection[Address] = ()) -> None:
        """See `Reader.forget`: here are no copies, the dictionary is the log."""

    async def close(self) -> None:
        """See `Reader.close`."""
        self._records.append(None)
        await self._tell()

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()
