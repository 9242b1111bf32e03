"""Whatever comes from outside is read or refused: valid input, spoilt in every way, raises errors of Atoll's and no others.

`make fuzz` tries a million inputs; `make test` a few thousand, the same ones every time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from tests.federation import LOGISTIC, plan

from atoll import messages
from atoll.compression import Press, stages
from atoll.errors import AtollError
from atoll.keys import Identity
from atoll.learners.keras import allowed
from atoll.logs.embedded import EmbeddedLog
from atoll.logs.spool import Spool
from atoll.node.download import Downloads
from atoll.node.offer import offered
from atoll.plan import Plan
from atoll.server import http, uploads
from atoll.server.lines import Line, Lines
from atoll.store.models import Models
from atoll.vector import Group, Layout, Tensor, Update, check, layouts_of
from atoll.wire import Address, Envelope, decode, encode, pack, pack_whole, seal, unpack_any, unpack_whole

INPUTS = int(os.environ.get("ATOLL_FUZZ", "150"))
"""Inputs for each parser."""
budget = settings(
    max_examples=INPUTS, suppress_health_check=list(HealthCheck), derandomize="ATOLL_FUZZ" not in os.environ, database=None
)
MODEL = "0" * 64
GROUPS = {
    "parameters": Group(Layout((Tensor("kernel", (2, 2)), Tensor("bias", (2,)))), np.arange(6, dtype=np.float32)),
    "sums": Group(Layout((Tensor("count", (1,)),), "int64"), np.ones(1, np.int64)),
}
LAYOUTS = layouts_of(GROUPS)
WHO = Identity.new()
BODY = b"".join(encode(Update(GROUPS, 40.0, {"samples": 40.0, "loss": 0.5}), MODEL))
SEALED = seal(WHO, Address("run-1", 1, 1, WHO.node), MODEL, [BODY])
KERAS = json.loads((Path(__file__).parents[1] / "src/atoll/cli/template/model.json").read_text())
TOML = (Path(__file__).parents[1] / "src/atoll/cli/template/plan.toml").read_text()

SPITE = (
    *(b'-1 0 1e999 -1e999 NaN Infinity null true {} [] "" "\\ud800" "\\u0000" 0x7f 1_0 1.5 +1 \'\' 1979-05-27'.split()),
    *(
        b"9" * 400,
        b"9" * 5000,
        b"9" * 20,
        b"18446744073709551616",
        b"[" * 2000,
        b"[" * 100_000,
        b'{"a":' * 500,
        b"\xff\xfe",
        b"\n",
    ),
    *(b'"' + b"x" * 3000 + b'"', b"\xc2\xb2", b"\xd9\xa3", b"../..", b"\r\nX: y", b"%00", b" ", b",", b":", b'"', b"="),
)
"""What parsers have choked on: numbers beyond every type, lone surrogates, depth, other scripts' digits, line ends."""


@st.composite
def spoilt(draw: st.DrawFn, *valid: bytes) -> bytes:
    """One of some valid inputs after a few cuts, doublings, flips and insertions."""
    text = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(0, 4))):
        lo = draw(st.integers(0, len(text)))
        hi = min(len(text), lo + draw(st.integers(0, 40)))
        match draw(st.integers(0, 4)):
            case 0:
                del text[lo:hi]
            case 1:
                text[lo:lo] = text[lo:hi]
            case 2:
                text[lo:hi] = draw(st.binary(max_size=8))
            case 3:
                text[lo:hi] = draw(st.sampled_from(SPITE))
            case 4 if lo < len(text):
                text[lo] ^= 1 << draw(st.integers(0, 7))
    return bytes(text)


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([-1, 1 << 63, 1 << 64, 10**400, 2**53 + 1, 0.5, -0.0, 1e308]),
    st.floats(), st.text(max_size=5), st.text(st.characters(categories=["Cs"]), max_size=2), st.just("x" * 5000),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6
) | st.integers(1, 3000).map(lambda depth: json.loads("[" * min(depth, 900) + "]" * min(depth, 900)))


@st.composite
def altered(draw: st.DrawFn, *valid: Any) -> Any:
    """One of some valid values in which a few parts are others, gone, or one too many."""
    root = {"": json.loads(json.dumps(draw(st.sampled_from(valid))))}
    for _ in range(draw(st.integers(0, 3))):
        holder: Any = root
        key: Any = ""
        while isinstance(holder[key], (dict, list)) and holder[key] and draw(st.integers(0, 5)):
            holder = holder[key]
            key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        match draw(st.integers(0, 3)):
            case 0 | 1:
                holder[key] = draw(VALUES)
            case 2 if holder is not root:
                del holder[key]
            case 3 if holder is not root and isinstance(holder, dict):
                holder[draw(st.text(max_size=5))] = draw(VALUES)
    return root[""]


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Read, or refused in one line that a person, a database and a terminal can take."""
    try:
        yield
    except AtollError as error:
        said = str(error)
        assert said
        assert len(said) < 2000
        assert said.isprintable()


@budget
@given(spoilt(BODY, b"".join(pack(GROUPS))))
def test_a_body(body):
    with refused():
        update = decode(body, LAYOUTS, MODEL)
        check(update.groups, LAYOUTS)
        json.dumps(update.metrics).encode()
    with refused():
        unpack_any(body, LAYOUTS)


CHAINS = (["topk:0.5", "8bit"], ["rotate", "4bit"], ["powersgd:1", "bfloat16"], ["randomk:0.5", "rotate"])
PRESSES = [Press(stages(said), 1) for said in CHAINS]
SMALL = [b"".join(encode(Update(one.encode(GROUPS, {}, 1, "a")[0], 40.0, {"samples": 40.0}), MODEL)) for one in PRESSES]


@budget
@given(st.data())
def test_a_compressed_body(data):
    """Also wrong only inside: places and counts of no encoder, scales and factors that are no numbers."""
    press, small = data.draw(st.sampled_from(list(zip(PRESSES, SMALL, strict=True))))
    body = data.draw(spoilt(small) | st.binary(max_size=40).map(lambda end: small[: -len(end) or None] + end))
    with refused():
        update = decode(body, press.layouts(LAYOUTS), MODEL)
        check(press.decode(update.groups, LAYOUTS, 1), LAYOUTS)


@budget
@given(altered(json.loads(BODY[8 : 8 + int.from_bytes(BODY[:8], "little")])))
def test_a_body_with_another_header(header):
    text = json.dumps(header).encode()
    start = 8 + int.from_bytes(BODY[:8], "little")
    for read in (lambda body: decode(body, LAYOUTS, MODEL), lambda body: unpack_any(body, LAYOUTS)):
        with refused():
            read(len(text).to_bytes(8, "little") + text + BODY[start:])


@budget
@given(spoilt(SEALED.to_header().encode()) | altered(json.loads(SEALED.to_header())).map(lambda one: json.dumps(one).encode()))
def test_an_envelope(text):
    for header in (text, text.decode("latin-1")):
        with refused():
            envelope = Envelope.from_header(header)
            envelope.to_header().encode()
            envelope.verify()


RUN, DIGEST = "run-1", MODEL
MESSAGES: list[messages.Message] = [
    messages.Connect(name="a", key=MODEL, plan=MODEL, challenge="0" * 112),
    messages.ConnectionReceived(run=RUN, plan=DIGEST, rounds=3, round=1),
    messages.StartTraining(run=RUN, round=1, attempt=1, model=DIGEST, deadline=20.0),
    messages.FlUpdate(run=RUN, round=1, attempt=1, digest=DIGEST),
    messages.Verdict(run=RUN, round=1, attempt=1, digest=DIGEST, accepted=True),
    messages.Decline(run=RUN, round=1, attempt=1, reason="no rows"),
    messages.EndSession(run=RUN, rounds=3, model=None, outcome="completed"),
    messages.SessionEnded(run=RUN, metrics={"samples": 3.0}),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda one: one.event)
@settings(budget, max_examples=max(1, INPUTS // 4))
@given(st.data())
def test_a_message(message, data):
    with refused():
        read = type(message).read(data.draw(altered(message.payload()) | VALUES | st.binary(max_size=9)))
        json.dumps(read.payload(), allow_nan=False).encode()
        assert all(value < 1 << 63 for value in vars(read).values() if isinstance(value, int))


PACKETS = [
    b"3", b"41/fl,", b"40/fl," + json.dumps(MESSAGES[0].payload()).encode(),
    *(f"42/fl,{number}{json.dumps([one.event, one.payload()])}".encode() for one in MESSAGES for number in ("", 7)),
]  # fmt: skip


@budget
@given(st.lists(spoilt(*PACKETS), max_size=4))
def test_packets_on_a_line(packets):
    """Whatever comes, a line answers in whole frames or hangs up: nothing is raised into the web server."""
    come = [{"type": "websocket.receive", "text": one.decode("utf-8", "replace")} for one in packets]
    come = [{"type": "websocket.connect"}, *come, {"type": "websocket.disconnect"}]
    sent: list[bytes] = []

    class Talk:
        async def welcome(self, line: Line, auth: object) -> None:
            with refused():
                line.node = messages.Connect.read(auth).name

        async def hear(self, line: Line, event: str, payload: object) -> str | None:
            assert line.node is not None
            with refused():
                next((type(one) for one in MESSAGES if one.event == event), messages.Decline).read(payload)
            return None

        async def gone(self, line: Line) -> None:
            sent.append(b"gone")

    class Wire:
        heard = 0.0
        write = staticmethod(sent.append)
        close = abort = staticmethod(lambda: None)

    scope = {"type": "websocket", "path": "/socket.io/", "query_string": b"EIO=4", "headers": [], "extensions": {"wire": Wire()}}

    async def receive() -> Any:
        return come.pop(0)

    async def send(message: Any) -> None:
        assert message["type"] == "websocket.accept"

    asyncio.run(Lines(Talk(), messages.NAMESPACE, 1 << 19, 5, 15).over(send)(scope, receive, send))
    assert sent[-1] == b"gone"
    assert all(one[0] == 0x81 for one in sent[:-1])


@budget
@given(spoilt(b"".join(pack_whole(GROUPS))))
def test_a_file_of_groups(text):
    with refused():
        unpack_whole(text)


@budget
@given(spoilt(plan().to_json().encode(), json.dumps(LOGISTIC).encode()) | altered(LOGISTIC).map(json.dumps))
def test_a_plan(text):
    with refused():
        read = Plan.from_json(text)
        assert Plan.from_json(read.to_json()).digest == read.digest


@settings(budget, max_examples=max(1, INPUTS // 2))
@given(spoilt(TOML.encode()))
def test_a_plan_in_a_file(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "plan.toml"
    path.write_bytes(text)
    with refused():
        Plan.load(path)


@budget
@given(altered(KERAS))
def test_a_keras_model(model):
    with refused():
        json.dumps(allowed.check(Plan.of({**LOGISTIC, "model": {"keras": model, "loss": "mse"}}).model.keras or {}))


@budget
@given(st.data())
def test_a_piece_of_a_log_of_messages(tmp_path_factory, data):
    spool = Spool(tmp_path_factory.getbasetemp() / "spool", 1 << 20)
    sizes = st.sampled_from([0, 1, len(BODY), 1 << 20, 1 << 62])
    envelope = SEALED._replace(size=data.draw(sizes)) if data.draw(st.booleans()) else SEALED
    with refused():
        spool.take(envelope, data.draw(st.integers(-3, 3) | st.integers()), data.draw(spoilt(BODY)), "0:0")


async def asked(app: Any, method: str, path: bytes, headers: dict[bytes, bytes], body: bytes = b"") -> int:
    """Ask an ASGI application as uvicorn does; return the status."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path.decode("latin-1"), "raw_path": path, "query_string": b"", "root_path": "", "headers": list(headers.items()),
    }  # fmt: skip
    parts, said = [{"type": "http.request", "body": body, "more_body": False}], []

    async def receive() -> Any:
        return parts.pop() if parts else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        said.append(message)

    await app(scope, receive, send)
    return int(said[0]["status"])


RANGES = st.one_of(
    spoilt(b"bytes 5-%d/%d" % (len(BODY) - 1, len(BODY))), spoilt(b"bytes=5-"), st.sampled_from(SPITE), st.binary(max_size=30)
)


@budget
@given(st.data())
def test_what_is_put(tmp_path_factory, data):
    place = tmp_path_factory.getbasetemp()
    path = b"/v1/runs/run-1/rounds/1/1/updates/" + WHO.node.encode()
    headers = {b"atoll-envelope": SEALED.to_header().encode()}
    match data.draw(st.integers(0, 3)):
        case 0:
            path = data.draw(spoilt(path))
        case 1:
            headers[b"atoll-envelope"] = data.draw(spoilt(SEALED.to_header().encode()))
        case 2:
            headers[b"content-range"] = data.draw(RANGES)
    body = data.draw(st.sampled_from([BODY, BODY[5:], b"", BODY + b"x", BODY[:9]]))

    async def put() -> list[int]:
        log = EmbeddedLog(place / "log", "run-1", 1 << 20)
        app = Starlette(routes=uploads.routes(log, lambda envelope: None))
        try:
            return [await asked(app, method, path, headers, body) for method in ("HEAD", "PUT")]
        finally:
            await log.close()

    known = {200, 201, 307, 400, 403, 404, 405, 408, 409, 413, 416}
    assert set(asyncio.run(put())) <= known


@budget
@given(RANGES, st.sampled_from([b"range", b"if-none-match"]), spoilt(MODEL.encode()))
def test_what_is_asked_of_a_model(tmp_path_factory, said, header, other):
    models = Models(tmp_path_factory.getbasetemp() / "models")

    class Site:
        plan, run, store = plan(), "run-1", None

    site: Any = Site()
    site.models, site.book = models, SimpleNamespace(fetched=lambda size: None)
    app = Starlette(routes=http.routes(site))
    digest = models.put(GROUPS)
    models.put_step("0" * 64, digest, GROUPS, {"round": "1"})
    step = digest.encode() + b"/from/"
    for path in (digest.encode(), other, step + b"0" * 64, step + other):
        assert asyncio.run(asked(app, "GET", b"/v1/models/" + path, {header: said})) in {200, 206, 304, 307, 404, 416}


@contextlib.asynccontextmanager
async def answering() -> AsyncIterator[tuple[str, Callable[[bytes], None]]]:
    """A server that answers everything with the same bytes."""
    answer, ends = [b""], []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends.append(writer.transport)
        await reader.read(1 << 16)  # a request, or a client that tries TLS
        writer.write(answer[0])
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", lambda said: answer.__setitem__(0, said)
    for end in ends:
        end.abort()
    await asyncio.sleep(0)  # the loop's turn in which they are closed


OFFER = {"protocol": 1, "run": "run-1", "digest": plan().digest, "plan": json.loads(plan().to_json())}


@settings(budget, max_examples=max(1, INPUTS // 4))
@given(altered(OFFER).map(lambda one: json.dumps(one).encode()) | spoilt(json.dumps(OFFER).encode()), st.booleans(), st.data())
def test_an_offer(body, whole, data):
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body

    async def read() -> None:
        async with answering() as (url, say), aiohttp.ClientSession() as session:
            say(answer if whole else data.draw(spoilt(answer)))
            with refused():
                offer = await offered(session, url)
                Plan.of(offer["plan"])

    asyncio.run(asyncio.wait_for(read(), 20))


def header(**changed: Any) -> bytes:
    return json.dumps({**json.loads(SEALED.to_header()), **changed}).encode()


def body(**changed: str) -> bytes:
    words = {"atoll": "1", "model": MODEL, "weight": "0x1p+5", "metrics": "{}", **changed}
    return b"".join(pack(GROUPS, words))


PLACED = b"".join(pack(GROUPS))
MANY = json.dumps(dict.fromkeys(map(str, range(20_000)), "0x0p+0"))


@pytest.mark.parametrize(
    ("read", "text", "said"),
    [
        (Envelope.from_header, header(plan="\ud800"), "characters that don't belong there"),
        (Envelope.from_header, header(v=True), "wrong type"),
        (lambda text: decode(text, LAYOUTS, MODEL), body(model="\ud800"), r"started from model \\ud800"),
        (lambda text: decode(text, LAYOUTS, MODEL), body(weight="0x1p+60"), "no number of rows"),
        (lambda text: decode(text, LAYOUTS, MODEL), body(metrics='{"\\ud800": "0x1p+1"}'), "not printable"),
        (lambda text: decode(text, LAYOUTS, MODEL), body(metrics=MANY), "10000"),
        (lambda text: unpack_any(text, LAYOUTS), PLACED.replace(b"[0,8]", b"[0.0,8]").replace(b"}  ", b"}"), "no dtype, shape"),
        (messages.Decline.read, {"run": "r", "round": 1 << 70, "attempt": 1, "reason": ""}, "round"),
        (messages.StartTraining.read, {"run": "r", "round": -1, "attempt": 1, "model": MODEL, "deadline": 1}, "round"),
    ],
)
def test_what_was_found_stays_mended(read, text, said):
    with pytest.raises(AtollError, match=said):
        read(text)


@pytest.mark.parametrize("text", ["x = " + "9" * 5000, "x = " + "[" * 100_000], ids=["long number", "deep"])
def test_a_file_that_chokes_the_reader_of_toml_is_no_plan(tmp_path, text):
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(AtollError, match="no TOML"):
        Plan.load(tmp_path / "plan.toml")


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        (b"/v1/runs/run-1/rounds/1/1/updates/" + WHO.node.encode(), {b"content-range": b"bytes 0-471/many"}),
        (b"/v1/runs/run-1/rounds/1/1/updates/" + WHO.node.encode(), {b"content-range": b"bytes 0-471/" + b"9" * 5000}),
        (b"/v1/runs/run-1/rounds/" + b"9" * 5000 + b"/1/updates/" + WHO.node.encode(), {}),
    ],
)
def test_a_range_or_path_that_is_none_is_refused(tmp_path, path, headers):
    async def put() -> int:
        log = EmbeddedLog(tmp_path, "run-1", 1 << 20)
        app = Starlette(routes=uploads.routes(log, lambda envelope: None))
        try:
            return await asked(app, "PUT", path, {b"atoll-envelope": SEALED.to_header().encode(), **headers}, BODY)
        finally:
            await log.close()

    assert asyncio.run(put()) == 400


def test_an_endless_plan_is_not_read_to_its_end(monkeypatch):
    """A server that never stops sending: the node gives up after the longest plan there can be."""
    monkeypatch.setattr("atoll.node.offer.LIMIT", 1 << 20)
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"10000\r\n" + b" " * (1 << 16) + b"\r\n")
                await writer.drain()
                sent += 1 << 16

    async def read() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server, aiohttp.ClientSession() as session:
            with pytest.raises(AtollError, match="no plan is as long"):
                await offered(session, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")

    asyncio.run(asyncio.wait_for(read(), 20))
    assert sent < 32 << 20


def test_an_endless_model_does_not_fill_the_disk_of_a_node(tmp_path):
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\nConnection: close\r\n\r\n" + bytes(9_000_000)

    async def read() -> None:
        async with answering() as (url, say), aiohttp.ClientSession() as session:
            say(answer)
            with pytest.raises(AtollError, match="more than the plan's can have"):
                await Downloads(url, tmp_path).get(session, MODEL, 1 << 20)

    asyncio.run(asyncio.wait_for(read(), 20))
    assert not list(tmp_path.iterdir())


def test_pieces_on_a_topic(tmp_path, kafka):
    """Thousands of spoilt messages before an honest one: it comes through, and the reader lives."""
    from confluent_kafka import Producer

    from atoll.logs.kafka import KafkaAppender, KafkaReader

    chance = random.Random(0)
    honest = {**SEALED.address._asdict(), "parts": 1, "digest": SEALED.digest, "envelope": SEALED.to_header(), "part": 0}

    def message() -> tuple[bytes, list[tuple[str, bytes | None]]]:
        headers: dict[str, bytes | None] = {name: str(value).encode() for name, value in honest.items()}
        for name in chance.sample(sorted(headers), chance.randint(1, 2)):
            text = headers[name] or b""
            lo, hi = sorted(chance.choices(range(len(text) + 1), k=2))
            headers[name] = chance.choice([None, text[:lo] + chance.choice(SPITE)[:50_000] + text[hi:], text[:lo] + text[hi:]])
        return chance.choice([BODY, BODY[1:], b"", BODY * 2]), list(headers.items())

    async def read() -> None:
        reader = KafkaReader(kafka, "fuzz.updates", "run-1", tmp_path, 1 << 20)
        producer = Producer({"bootstrap.servers": kafka})
        for _ in range(min(10 * INPUTS, 3000)):  # each is synced to disk
            value, headers = message()
            producer.produce("fuzz.updates", value, headers=headers)
            producer.poll(0)
        assert producer.flush(60) == 0
        other = Identity.new()
        envelope = seal(other, Address("run-1", 1, 1, other.node), MODEL, [BODY])
        appender = KafkaAppender(kafka, "fuzz.updates")
        await appender.append(envelope, [BODY])
        try:
            async for record in reader.records():
                if record.envelope.digest == SEALED.digest and record.envelope.address == SEALED.address:
                    record.envelope.verify()
                if record.envelope == envelope:
                    assert record.refused is None
                    return
        finally:
            await appender.close()
            await reader.close()

    asyncio.run(asyncio.wait_for(read(), 100))
