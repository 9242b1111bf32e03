"""What every update log holds to: durable before acknowledged, each body once, and nobody else's."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
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
    async with open_() as ends:
        records = ends.reader.records()
        first = await _one_body(ends, records)
        await _many_at_once(ends, records)
        await _two_under_one_address(ends, records, first, refuses=refuses)
        await _earlier_and_other_runs(ends, records)
        await _too_long(ends, records, refuses=refuses)
        await _large(ends, records)
    if keeps:
        async with open_() as ends:
            record = await _next(ends.reader.records())
            assert record.envelope == first, "what was acknowledged is there after a restart, the first one first"
            assert hashlib.sha256(ends.reader.body(first)).hexdigest() == first.digest


def body_of(
    identity: Identity, round_: int, content: bytes, run: str = RUN, attempt: int = 1
) -> tuple[Envelope, list[memoryview]]:
    """Return a sealed body with some content; the log doesn't care what is in it."""
    body = [memoryview(content[:7]), memoryview(content[7:])]
    return seal(identity, Address(run, round_, attempt, identity.node), _PLAN, body), body


async def _next(records: AsyncIterator[Record]) -> Record:
    return await asyncio.wait_for(anext(records), _PATIENCE)


async def _one_body(ends: Ends, records: AsyncIterator[Record]) -> Envelope:
    content = b"the first body, in two buffers" * 99
    envelope, body = body_of(Identity.new(), 1, content)
    sent: list[int] = []
    await ends.appender.append(envelope, body, sent.append)
    record = await _next(records)
    assert record.envelope == envelope
    assert record.refused is None
    assert bytes(ends.reader.body(envelope)) == content, "the bytes come out as they went in"
    assert sent == sorted(sent), "progress only grows"
    assert sent[-1] == len(content), "and ends at the whole"
    await ends.appender.append(envelope, body)  # again: no error, and (below) no second record
    return envelope


async def _many_at_once(ends: Ends, records: AsyncIterator[Record]) -> None:
    sealed = [body_of(Identity.new(), 1, bytes([k]) * 1000 * (k + 1)) for k in range(20)]
    await asyncio.gather(*(ends.appender.append(envelope, body) for envelope, body in sealed))
    came = [await _next(records) for _ in sealed]
    assert sorted(record.envelope for record in came) == sorted(envelope for envelope, _ in sealed), "each body exactly once"
    assert len({record.position for record in came}) == 20
    for envelope, body in sealed:
        assert bytes(ends.reader.body(envelope)) == b"".join(body)


async def _two_under_one_address(ends: Ends, records: AsyncIterator[Record], first: Envelope, *, refuses: bool) -> None:
    identity = Identity.new()
    one, body = body_of(identity, 2, b"the first complete one counts")
    two, other = body_of(identity, 2, b"another one under its address")
    await ends.appender.append(one, body)
    assert (await _next(records)).envelope == one
    if refuses:
        with pytest.raises(RefusedError):
            await ends.appender.append(two, other)
    else:
        await ends.appender.append(two, other)
        record = await _next(records)
        assert record.envelope == two
        assert record.refused
    with pytest.raises(AtollError):
        ends.reader.body(two)
    assert bytes(ends.reader.body(one)) == b"".join(body), "the first one is as it was"
    assert first != one


async def _earlier_and_other_runs(ends: Ends, records: AsyncIterator[Record]) -> None:
    identity = Identity.new()
    stranger, content = body_of(identity, 1, b"of another run", run="another-run")
    with contextlib.suppress(RefusedError):  # a log that belongs to one run may say so at once
        await ends.appender.append(stranger, content)
    early, body = body_of(identity, 1, b"of an earlier round: whether it counts is not the log's to say", attempt=2)
    await ends.appender.append(early, body)
    assert (await _next(records)).envelope == early, "another run's body never comes out; an earlier round's does"


async def _too_long(ends: Ends, records: AsyncIterator[Record], *, refuses: bool) -> None:
    envelope, body = body_of(Identity.new(), 3, bytes(LIMIT + 1))
    if refuses:
        with pytest.raises(RefusedError, match="limit"):
            await ends.appender.append(envelope, body)
    else:
        await ends.appender.append(envelope, body)
        record = await _next(records)
        assert record.envelope == envelope
        assert "limit" in str(record.refused)


async def _large(ends: Ends, records: AsyncIterator[Record]) -> None:
    content = hashlib.shake_128(b"large").digest(LIMIT - 1)
    envelope, body = body_of(Identity.new(), 3, content)
    await ends.appender.append(envelope, body)
    assert (await _next(records)).envelope == envelope
    assert hashlib.sha256(ends.reader.body(envelope)).hexdigest() == envelope.digest


async def check_file(ends: Ends, path: Path) -> None:
    """Check that a body can be sent from a file: its size is not a multiple of anything."""
    path.write_bytes(hashlib.shake_128(b"file").digest(2_500_001))
    envelope = seal(identity := Identity.new(), Address(RUN, 9, 1, identity.node), _PLAN, [path.read_bytes()])
    await ends.appender.append(envelope, path)
    assert hashlib.sha256(ends.reader.body(envelope)).hexdigest() == envelope.digest
