"""The three update logs pass the one suite; and what is the embedded one's own."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import uvicorn
from starlette.applications import Starlette

from atoll.errors import LogError, RefusedError, UnreachableError
from atoll.keys import Identity
from atoll.logs import LATE, PIECE
from atoll.logs.embedded import EmbeddedLog
from atoll.logs.inproc import InprocLog
from atoll.logs.kafka import KafkaAppender, KafkaReader
from atoll.logs.spool import Spool
from atoll.logs.upload import HttpAppender
from atoll.server.uploads import routes
from atoll.testing.logs import LIMIT, RUN, Ends, body_of, check_log
from atoll.wire import Envelope


@contextlib.asynccontextmanager
async def embedded(place: Path, admit: str | None = None) -> AsyncIterator[tuple[Ends, str]]:
    """An embedded log behind a real web server."""
    log = EmbeddedLog(place, RUN, LIMIT)
    listener = socket.create_server(("127.0.0.1", 0))
    web = uvicorn.Server(uvicorn.Config(Starlette(routes=routes(log, lambda _: admit)), lifespan="off", log_config=None))
    serving = asyncio.create_task(web.serve(sockets=[listener]))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with aiohttp.ClientSession() as session:
        try:
            yield Ends(HttpAppender(url, session), log), url
        finally:
            await log.close()
            web.should_exit = True
            await serving


def test_the_embedded_log(tmp_path):
    @contextlib.asynccontextmanager
    async def open_() -> AsyncIterator[Ends]:
        async with embedded(tmp_path) as (ends, _):
            yield ends

    check_log(open_)


def test_the_log_in_memory():
    @contextlib.asynccontextmanager
    async def open_() -> AsyncIterator[Ends]:
        log = InprocLog(RUN, LIMIT)
        yield Ends(log, log)
        await log.close()

    check_log(open_, keeps=False)


def test_the_kafka_log(tmp_path, kafka):
    began: list[str] = []

    @contextlib.asynccontextmanager
    async def open_() -> AsyncIterator[Ends]:
        positions = began[0] if began else None
        reader = await asyncio.to_thread(KafkaReader, kafka, "check-log", RUN, tmp_path, LIMIT, positions)
        began.append(reader.positions)
        appender = KafkaAppender(kafka, "check-log")
        yield Ends(appender, reader)
        await appender.close()
        await reader.close()

    check_log(open_, refuses=False)


def test_a_broker_that_is_down_is_one_line(tmp_path):
    with pytest.raises(LogError, match=r"Kafka at 127\.0\.0\.1:1 doesn't answer"):
        KafkaReader("127.0.0.1:1", "t", RUN, tmp_path, LIMIT)


def test_an_interrupted_upload_goes_on_where_it_stopped(tmp_path):
    envelope, body = body_of(Identity.new(), 1, b"0123456789" * 300_000)
    content = b"".join(body)

    async def scenario() -> None:
        async with embedded(tmp_path) as (ends, url):
            path = f"/v1/runs/{RUN}/rounds/1/1/updates/{envelope.address.node}"
            headers = {"Atoll-Envelope": envelope.to_header()}
            # A connection that dies after a part of the body.
            host, port = url.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port))
            lines = [f"PUT {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(content)}"]
            writer.write(
                "\r\n".join([*lines, f"Atoll-Envelope: {headers['Atoll-Envelope']}", "", ""]).encode() + content[:2_000_000]
            )
            await writer.drain()
            log = ends.reader
            assert isinstance(log, EmbeddedLog)
            while log.received(envelope) < 1_000_000:
                await asyncio.sleep(0)
            ((address, (here, whole)),) = log.arriving().items()
            assert address == envelope.address
            assert 1_000_000 <= here < whole == len(content)
            writer.transport.abort()
            async with aiohttp.ClientSession(url) as session:
                while (there := await _offset(session, path, headers)) < 1_000_000 or there != await _offset(
                    session, path, headers
                ):
                    pass
                assert there < len(content)
                span = {**headers, "Content-Range": f"bytes {there}-{len(content) - 1}/{len(content)}"}
                async with session.put(path, headers=span, data=io.BytesIO(content[there:])) as response:
                    assert response.status == 201
                async with session.put(path, headers=headers, data=io.BytesIO(content)) as response:
                    assert response.status == 200, "the same body again is no error"
            assert bytes(log.body(envelope)) == content

    asyncio.run(asyncio.wait_for(scenario(), 30))


async def _offset(session: aiohttp.ClientSession, path: str, headers: dict[str, str]) -> int:
    async with session.head(path, headers=headers) as response:
        return int(response.headers["Upload-Offset"])


def other(envelope: Envelope) -> Envelope:
    return envelope._replace(signature=bytes(64))


@pytest.mark.parametrize(
    ("change", "span", "status", "said"),
    [
        ({"Atoll-Envelope": "{}"}, None, 400, "no envelope"),
        ({"Atoll-Envelope": "x" * 5000}, None, 400, "the limit is 4096"),
        ({"forged": True}, None, 403, "the signature of node"),
        ({"path": "/v1/runs/run-under-test/rounds/2/1/updates/abc"}, None, 400, "another address than the path"),
        ({}, "bytes 5-1/9", 400, "doesn't fit a body"),
        ({}, "lines 1-2/3", 400, "no range"),
        ({}, "nonsense", 400, "no range"),
        ({}, "bytes 20-43/44", 416, "the upload goes on at byte 20, but only 0 are here"),
        ({"admit": "round 1 is over"}, None, 409, "round 1 is over"),
        ({"data": b"something else of the same length, as it is."}, None, 409, "isn't what its envelope says"),
        ({"data": b"doubled" * 20}, None, 409, "isn't what its envelope says"),
        ({"data": b"cut short"}, None, 400, "send the rest"),
    ],
)
def test_what_the_embedded_log_refuses_and_why(tmp_path, change, span, status, said):
    envelope, body = body_of(Identity.new(), 1, b"a body of just forty-four bytes, and no more")

    async def scenario() -> None:
        async with embedded(tmp_path, change.get("admit")) as (ends, url), aiohttp.ClientSession(url) as session:
            sent = other(envelope) if change.get("forged") else envelope
            headers = {"Atoll-Envelope": change.get("Atoll-Envelope", sent.to_header())} | (
                {"Content-Range": span} if span else {}
            )
            path = change.get("path", f"/v1/runs/{RUN}/rounds/1/1/updates/{envelope.address.node}")
            data = change.get("data", b"".join(body))
            async with session.put(path, headers=headers, data=data) as response:
                assert response.status == status
                error = (await response.json())["error"]
                assert said in error
                assert "\n" not in error
            with pytest.raises(LogError):
                ends.reader.body(envelope)

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_only_bodies_with_a_whole_line_in_the_index_count(tmp_path):
    """A crash leaves a body without its line, or half a line: neither is a record, and the next upload mends it."""

    async def append(*sealed: tuple[Envelope, list[memoryview]]) -> None:
        async with embedded(tmp_path) as (ends, _):
            for envelope, body in sealed:
                await ends.appender.append(envelope, body)

    one, two = body_of(Identity.new(), 1, b"first" * 10), body_of(Identity.new(), 1, b"second" * 10)
    asyncio.run(append(one, two))
    index = tmp_path / RUN / "index.jsonl"
    first, second = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(first + second[:-9])

    async def reopen() -> None:
        log = EmbeddedLog(tmp_path, RUN, LIMIT)
        assert bytes(log.body(one[0])) == b"first" * 10
        with pytest.raises(LogError):
            log.body(two[0])
        await log.close()

    asyncio.run(reopen())
    assert index.read_bytes() == first
    asyncio.run(append(two))
    assert len(index.read_bytes().splitlines()) == 2


def test_a_server_that_is_away_is_unreachable_not_refusing():
    async def scenario() -> None:
        async with aiohttp.ClientSession() as session:
            envelope, body = body_of(Identity.new(), 1, b"nobody hears this")
            with pytest.raises(UnreachableError, match="the update log doesn't answer"):
                await HttpAppender("http://127.0.0.1:1", session).append(envelope, body)

    asyncio.run(scenario())


def test_a_log_that_cannot_be_kept_says_where(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LogError, match="the update log can't be kept there"):
        EmbeddedLog(tmp_path / "file", RUN, LIMIT)
    assert issubclass(RefusedError, Exception)


def test_what_is_spooled_in_part_is_arriving(tmp_path):
    envelope, body = body_of(Identity.new(), 1, b"x" * (2 * PIECE - 5))
    spool, content = Spool(tmp_path, LIMIT), b"".join(body)
    assert spool.take(envelope, 1, content[PIECE:], "0:1") is None
    assert spool.arriving() == {envelope.address: (PIECE, envelope.size)}
    assert spool.take(envelope, 0, content[:PIECE], "0:0")
    assert spool.arriving() == {}


def test_a_log_inside_the_server_forgets_what_nobody_asks_for_any_more(tmp_path):
    """What it knows of old rounds goes, the files stay; a reader that comes later still finds all of it."""
    who = Identity.new()
    sealed = [body_of(who, round_, b"round %d" % round_) for round_ in range(1, 8)]

    async def go_on() -> tuple[int, list[int]]:
        log = EmbeddedLog(tmp_path, RUN, LIMIT)

        async def chunks(body: list[memoryview]) -> AsyncIterator[bytes]:
            for part in body:
                yield bytes(part)

        for envelope, body in sealed:
            assert await log.receive(envelope, 0, chunks(body))
            log.forget(envelope.address.round)
            assert not await log.receive(envelope, 0, chunks(body)), "its node may not have heard, and sends it again"
        read = log.records()
        rest = [(await anext(read)).envelope.address.round for _ in range(LATE)]
        known = len(log._digests)
        await log.close()
        return known, rest

    assert asyncio.run(go_on()) == (LATE, [6, 7])

    async def again() -> list[Envelope]:
        log = EmbeddedLog(tmp_path, RUN, LIMIT)
        read = log.records()
        found = [(await anext(read)).envelope for _ in sealed]
        await log.close()
        return found

    assert asyncio.run(again()) == [envelope for envelope, _ in sealed]


def test_a_log_keeps_what_is_still_to_count(tmp_path):
    """An update that came late lies there until its round is closed, however old the round is that it was made for."""
    late, body = body_of(Identity.new(), 1, b"late")

    async def go_on() -> bytes:
        log = EmbeddedLog(tmp_path / "embedded", RUN, LIMIT)

        async def chunks() -> AsyncIterator[bytes]:
            yield b"".join(body)

        assert await log.receive(late, 0, chunks())
        log.forget(7, {late.address})
        there = bytes(log.body(late))
        log.forget(8)
        with pytest.raises(LogError):
            log.body(late)
        await log.close()
        return there

    assert asyncio.run(go_on()) == b"late"
    spool = Spool(tmp_path / "spool", LIMIT)
    half, pieces = body_of(Identity.new(), 2, bytes(PIECE + 1))
    assert spool.take(half, 0, b"".join(pieces)[:PIECE], "0:0") is None
    assert spool.take(late, 0, b"".join(body), "0:1")
    spool.forget(7, {late.address, half.address})
    assert bytes(spool.get(late)) == b"late"
    assert spool.take(half, 1, b"".join(pieces)[PIECE:], "0:2"), "and what has come of one that is on its way stays"
    spool.forget(8)
    assert not list((tmp_path / "spool").iterdir())


def test_a_spool_forgets_what_nobody_asks_for_any_more(tmp_path):
    who, spool = Identity.new(), Spool(tmp_path / "spool", LIMIT)
    for round_ in range(1, 8):
        envelope, body = body_of(who, round_, b"round %d" % round_)
        half, pieces = body_of(Identity.new(), round_, bytes(PIECE + 1))
        assert spool.take(envelope, 0, b"".join(body), "0:0")
        assert spool.take(half, 0, b"".join(pieces)[:PIECE], "0:1") is None
        spool.forget(round_)
    assert len(spool._complete) == len(spool._halves) == LATE
    assert len(list((tmp_path / "spool").iterdir())) == LATE, "halves of the last rounds, which may still be completed"
