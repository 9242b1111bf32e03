"""What every update log holds to: durable before acknowledged, each body once, and nobody else's."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import NamedTuple

import pytest

from atoll.errors import AtollError, RefusedError
from atoll.keys import Identity
from atoll.logs import Appender, Reader, Record
from atoll.wire import Address, Envelope, seal

RUN = "run-under-test"
LIMIT = 8 << 20
"""The limit, in bytes, that the log under test is opened with."""
_PLAN = "0" * 64
_PATIENCE = 20.0


class Ends(NamedTuple):
    """A log's two ends, open."""

    appender: Appender
    reader: Reader


Open = Callable[[], AbstractAsyncContextManager[Ends]]


def check_log(open_: Open, *, keeps: bool = True, refuses: bool = True) -> None:
    """Check a log.

    Args:
        open_: opens both ends on the run `RUN` with the limit `LIMIT`; called again, it opens the same place again.
        keeps: whether the reader that is opened again finds what was there.
        refuses: whether the appender itself hears of a second body; else the reader says so of the record.

    Raises:
        AssertionError: it breaks one of the rules.
    """
    asyncio.run(asyncio.wait_for(_check(open_, keeps=keeps, refuses=refuses), 100))


async def _check(open_: Open, *, keeps: bool, refuses: bool) -> None:
    rules = (_one_body, _many_at_once, _two_under_one_address, _other_runs, _too_long, _other_bytes, _large, _interrupted, _file)
    came: list[Record] = []
    async with open_() as ends:
        log = _Log(ends, ends.reader.records(), refuses, came)
        for rule in rules:
            await rule(log)
    if keeps:
        async with open_() as ends:
            records = ends.reader.records()
            again = [await _next(records) for _ in came]
            assert again == came, "after a restart: the same records in the same order, and nothing else"
            for record in again:
                if not record.refused:
                    assert hashlib.sha256(ends.reader.body(record.envelope)).hexdigest() == record.envelope.digest
            # What is already there isn't there twice.
            await _one_body(_Log(ends, records, refuses, []))


class _Log(NamedTuple):
    """The log under test, and what has come out of it."""

    ends: Ends
    records: AsyncIterator[Record]
    refuses: bool
    came: list[Record]

    async def next(self) -> Record:
        """Return the next record: what a rule appends comes out before the rule ends, so nothing may stand before it."""
        record = await _next(self.records)
        self.came.append(record)
        return record

    async def comes(self, envelope: Envelope) -> None:
        """Check that the next record is this one, and that it counts."""
        record = await self.next()
        assert record.envelope == envelope, "each body comes once, in the order of the log"
        assert record.refused is None
        assert hashlib.sha256(self.ends.reader.body(envelope)).hexdigest() == envelope.digest, "bytes come out as they went in"

    async def refused(self, envelope: Envelope, body: list[memoryview], match: str) -> None:
        """Check that a body is refused, by whichever end can know."""
        if self.refuses:
            with pytest.raises(RefusedError, match=match):
                await self.ends.appender.append(envelope, body)
        else:
            await self.ends.appender.append(envelope, body)
            record = await self.next()
            assert record.envelope == envelope
            assert match in str(record.refused)
        with pytest.raises(AtollError):
            self.ends.reader.body(envelope)


def body_of(
    identity: Identity, round_: int, content: bytes, run: str = RUN, attempt: int = 1
) -> tuple[Envelope, list[memoryview]]:
    """Return a sealed body with some content; the log doesn't care what is in it."""
    body = [memoryview(content[:7]), memoryview(content[7:])]
    return seal(identity, Address(run, round_, attempt, identity.node), _PLAN, body), body


async def _next(records: AsyncIterator[Record]) -> Record:
    return await asyncio.wait_for(anext(records), _PATIENCE)


async def _one_body(log: _Log) -> None:
    content = b"the first body, in two buffers" * 99
    envelope, body = body_of(Identity.new(), 1, content)
    sent: list[int] = []
    await log.ends.appender.append(envelope, body, sent.append)
    await log.comes(envelope)
    assert envelope.address not in log.ends.reader.arriving(), "what has come is no longer on its way"
    assert bytes(log.ends.reader.body(envelope)) == content
    assert sent == sorted(sent), "progress only grows"
    assert sent[-1] == len(content), "and ends at the whole"
    await log.ends.appender.append(envelope, body)  # again: no error, and no second record before the next rule's


async def _many_at_once(log: _Log) -> None:
    sealed = [body_of(Identity.new(), 1, bytes([k]) * 1000 * (k + 1)) for k in range(20)]
    await asyncio.gather(*(log.ends.appender.append(envelope, body) for envelope, body in sealed))
    came = [await log.next() for _ in sealed]
    assert sorted(record.envelope for record in came) == sorted(envelope for envelope, _ in sealed), "each body exactly once"
    assert len({record.position for record in came}) == 20
    for envelope, body in sealed:
        assert bytes(log.ends.reader.body(envelope)) == b"".join(body)


async def _two_under_one_address(log: _Log) -> None:
    identity = Identity.new()
    one, body = body_of(identity, 2, b"the first complete one counts")
    two, other = body_of(identity, 2, b"another one under its address")
    await log.ends.appender.append(one, body)
    await log.comes(one)
    await log.refused(two, other, "another update is already in the log under this address")
    assert bytes(log.ends.reader.body(one)) == b"".join(body), "the first one is as it was"


async def _other_runs(log: _Log) -> None:
    identity = Identity.new()
    stranger, content = body_of(identity, 1, b"of another run", run="another-run")
    with contextlib.suppress(RefusedError):  # a log that belongs to one run may say so at once
        await log.ends.appender.append(stranger, content)
    early, body = body_of(identity, 1, b"of an earlier round: whether it counts is not the log's to say", attempt=2)
    await log.ends.appender.append(early, body)
    await log.comes(early)  # another run's body never comes out; an earlier round's does


async def _too_long(log: _Log) -> None:
    envelope, body = body_of(Identity.new(), 3, bytes(LIMIT + 1))
    await log.refused(envelope, body, "limit")


async def _other_bytes(log: _Log) -> None:
    identity = Identity.new()
    envelope, body = body_of(identity, 3, b"what was signed")
    await log.refused(envelope, [memoryview(b"what wasn't 123")], "the body isn't what its envelope says")
    for length in (0, 14, 16):
        with pytest.raises(RefusedError, match="the body isn't what its envelope says"):
            await log.ends.appender.append(envelope, [memoryview(bytes(length))])
    if log.refuses:  # a reader that said no to a record means it; an appender's no leaves the address free
        await log.ends.appender.append(envelope, body)
        await log.comes(envelope)


async def _large(log: _Log) -> None:
    envelope, body = body_of(Identity.new(), 3, hashlib.shake_128(b"large").digest(LIMIT - 1))
    sent: list[int] = []
    await log.ends.appender.append(envelope, body, sent.append)
    await log.comes(envelope)
    assert sent == sorted(sent)
    assert sent[-1] == envelope.size


async def _interrupted(log: _Log) -> None:
    """A sender that stops half-way and comes back later, again and again, with the same bytes."""
    envelope, body = body_of(Identity.new(), 4, hashlib.shake_128(b"interrupted").digest(LIMIT - 3))
    for _ in range(3):
        sending = asyncio.create_task(_stopping(log.ends.appender, envelope, body))
        await asyncio.wait([sending], timeout=_PATIENCE)
        assert sending.done()
    await log.ends.appender.append(envelope, body)
    await log.comes(envelope)


async def _stopping(appender: Appender, envelope: Envelope, body: list[memoryview]) -> None:
    """Send a body until a part of it has gone, and break off."""
    sending = asyncio.current_task()
    assert sending

    def stop(sent: int) -> None:
        if sent < envelope.size:
            sending.cancel()

    await appender.append(envelope, body, stop)


async def _file(log: _Log) -> None:
    """A body is sent from a file as from memory; its size is not a multiple of anything."""
    content = hashlib.shake_128(b"file").digest(2_500_001)
    envelope, _ = body_of(Identity.new(), 5, content)
    path = Path(await asyncio.to_thread(_written, content))
    try:
        await log.ends.appender.append(envelope, path)
    finally:
        path.unlink()
    await log.comes(envelope)
    with pytest.raises(RefusedError, match="can't be read"):
        await log.ends.appender.append(body_of(Identity.new(), 5, content)[0], path)


def _written(content: bytes) -> str:
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(content)
    return file.name
