"""The update log in Apache Kafka: a topic of pieces, keyed by node.

Each message is one piece of a body: `PIECE` bytes, the last one what is left. Its headers say where it belongs: run,
round, attempt, node, part, parts, digest, and the whole signed envelope. The reader takes what is of its own run
(everything else is skipped by header), puts the pieces into files, and yields a body when all of it is there and its
digest is right. No consumer group: positions are the server's own to keep.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

from atoll.errors import LogError, UnreachableError, WireError
from atoll.logs import PIECE, Progress, Record, pieces
from atoll.logs.embedded import mapped
from atoll.wire import Address, Buffer, Envelope

log = logging.getLogger("atoll.logs.kafka")
MORE = "…"
"""Said of a piece that is in its place, and no more than that: others are still to come, or the body is known."""
_SPOOLERS = 4
_PATIENCE = 10.0
"""Seconds until a broker that doesn't answer counts as down."""


def _quiet(error: object) -> None:
    log.debug("kafka: %s", error)


class KafkaAppender:
    """The node's end: an idempotent producer; a piece counts as sent when all replicas have it.

    Args:
        servers: `host:port` of one or more brokers, by commas.
        topic: the topic of updates.
    """

    def __init__(self, servers: str, topic: str) -> None:
        self._servers, self._topic = servers, topic
        self._producer = Producer(
            {
                "bootstrap.servers": servers,
                "enable.idempotence": True,
                "acks": "all",
                "linger.ms": 0,
                "message.timeout.ms": int(_PATIENCE * 1000),
                "error_cb": _quiet,
                "log_level": 0,
            }
        )

    async def append(self, envelope: Envelope, body: Sequence[Buffer] | Path, progress: Progress | None = None) -> None:
        """See `Appender.append`; what another body under the address means, the reader decides."""
        await asyncio.to_thread(self._append, envelope, body, progress)

    def _append(self, envelope: Envelope, body: Sequence[Buffer] | Path, progress: Progress | None) -> None:
        failed: list[KafkaError] = []
        sent = 0

        def delivered(error: KafkaError | None, message: Message) -> None:
            nonlocal sent
            if error:
                failed.append(error)
                return
            sent += len(message)
            if progress:
                progress(sent)

        headers = _headers(envelope)
        parts = iter(pieces(body)) if envelope.size else iter([b""])
        for part, piece in enumerate(_full(parts)):
            self._produce(piece, [*headers, ("part", str(part).encode())], envelope.address.node, delivered)
            if failed:
                break
        self._producer.flush(_PATIENCE + 5)
        if failed or sent < envelope.size:
            said = failed[0].str() if failed else "it doesn't answer"
            raise UnreachableError(f"Kafka at {self._servers}: the update can't be appended ({said})")

    def _produce(
        self,
        piece: bytes,
        headers: list[tuple[str, str | bytes | None]],
        key: str,
        delivered: Callable[[KafkaError | None, Message], None],
    ) -> None:
        while True:
            try:
                self._producer.produce(self._topic, piece, key, headers=headers, on_delivery=delivered)
                self._producer.poll(0)
                return
            except BufferError:  # the queue is full: let some go first
                self._producer.poll(0.1)
            except KafkaException as error:
                raise UnreachableError(f"Kafka at {self._servers}: {error.args[0].str()}") from error

    async def close(self) -> None:
        """See `Appender.close`."""
        await asyncio.to_thread(self._producer.flush, 1.0)


def _headers(envelope: Envelope) -> list[tuple[str, str | bytes | None]]:
    parts = max(1, -(-envelope.size // PIECE))
    facts = {**envelope.address._asdict(), "parts": parts, "digest": envelope.digest, "envelope": envelope.to_header()}
    return [(name, str(value).encode()) for name, value in facts.items()]


def _full(parts: Any) -> Any:
    """Join buffers to whole pieces: only the last is shorter."""
    held = bytearray()
    for part in parts:
        if not held and len(part) == PIECE:
            yield bytes(part)
            continue
        held += part
        while len(held) >= PIECE:
            yield bytes(held[:PIECE])
            del held[:PIECE]
    if held:
        yield bytes(held)


class KafkaReader:
    """The server's end: one consumer, from where the topic stood when the run was made.

    Args:
        servers: `host:port` of one or more brokers, by commas.
        topic: the topic of updates; made when missing, each message synced to disk by the broker.
        run: the run whose updates are read.
        directory: where runs keep their bodies.
        limit: the longest body, in bytes.

    Raises:
        LogError: the broker doesn't answer, or the directory can't be used.
    """

    def __init__(self, servers: str, topic: str, run: str, directory: Path, limit: int) -> None:
        self.waiting: str | None = None
        self._servers, self._run, self._limit = servers, run, limit
        self._bodies = _Bodies(directory / run)
        _make_topic(servers, topic)
        self._consumer = Consumer(
            {
                "bootstrap.servers": servers,
                "group.id": f"atoll-{run}",  # the client asks for one; nothing is ever committed under it
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 100,
                "max.partition.fetch.bytes": 8 << 20,
                "queued.max.messages.kbytes": 32 << 10,
                "error_cb": self._trouble,
                "log_level": 0,
            }
        )
        self._consumer.assign(_ends(self._consumer, servers, topic))
        self._news: asyncio.Queue[Record | None] = asyncio.Queue()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        # The broker's syncs make writes beside it wait: several bodies wait at once, but only so many pieces in memory.
        self._spoolers = [ThreadPoolExecutor(1, "spool") for _ in range(_SPOOLERS)]
        self._room = threading.Semaphore(4 * _SPOOLERS)

    async def records(self) -> AsyncIterator[Record]:
        """See `Reader.records`."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._poll, args=(loop,), name="kafka", daemon=True)
        self._thread.start()
        while (record := await self._news.get()) is not None:
            yield record

    def body(self, envelope: Envelope) -> memoryview:
        """See `Reader.body`."""
        return self._bodies.get(envelope)

    async def close(self) -> None:
        """See `Reader.close`."""
        self._stopped.set()
        if self._thread:
            await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._consumer.close)
        self._news.put_nowait(None)

    def _poll(self, loop: asyncio.AbstractEventLoop) -> None:
        while not self._stopped.is_set():
            message = self._consumer.poll(0.2)
            if message is None:
                continue
            if error := message.error():
                self._trouble(error)
                continue
            self.waiting = None
            headers = {name: value for name, value in dict(message.headers() or ()).items() if isinstance(value, bytes)}
            if headers.get("run") != self._run.encode():
                continue  # of another run, or no piece at all
            self._room.acquire()
            # The pieces of a body stay in order on one spooler, so that it is hashed as it comes.
            spooler = self._spoolers[zlib.crc32(headers.get("node", b"")) % _SPOOLERS]
            spooler.submit(self._spool, message, headers, loop)
        for spooler in self._spoolers:
            spooler.shutdown()

    def _spool(self, message: Message, headers: Mapping[str, bytes], loop: asyncio.AbstractEventLoop) -> None:
        try:
            record = self._take(message, headers)
        finally:
            self._room.release()
        if record and not self._stopped.is_set():
            loop.call_soon_threadsafe(self._news.put_nowait, record)

    def _take(self, message: Message, headers: Mapping[str, bytes]) -> Record | None:
        """Take in one piece; return the record that it completes."""
        position = f"{message.partition()}:{message.offset()}"
        try:
            envelope = Envelope.from_header(headers.get("envelope", b""))
            part = int(headers.get("part", b"-1"))
        except (WireError, ValueError) as error:
            log.warning("a message at %s is no piece of an update: %s", position, error)
            return None
        if envelope.address.run != self._run:
            return None
        try:
            reason = self._bodies.take(envelope, part, message.value() or b"", self._limit)
        except OSError as error:
            log.error("an update can't be spooled (%s): free some space", error)  # noqa: TRY400
            return None
        return None if reason == MORE else Record(envelope, position, reason)

    def _trouble(self, error: KafkaError) -> None:
        self.waiting = f"Kafka at {self._servers}: {error.str()}"
        log.info(self.waiting)


class _Bodies:
    """Bodies put together from pieces in files; the topic is their durable copy."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._halves: dict[tuple[Address, str], _Half] = {}
        self._complete: dict[Address, str] = {}
        self._refused: set[tuple[Address, str]] = set()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LogError(f"{directory}: updates can't be spooled there ({error.strerror})") from error

    def get(self, envelope: Envelope) -> memoryview:
        if self._complete.get(envelope.address) != envelope.digest:
            raise LogError(f"the log holds no update {envelope.digest[:12]} of round {envelope.address.round}")
        return mapped(self._file(envelope))

    def take(self, envelope: Envelope, part: int, piece: bytes, limit: int) -> str | None:
        """Put a piece in its place; return None when that completes the body, else `MORE`, or why it can't count."""
        key = envelope.address, envelope.digest
        if key in self._refused or self._complete.get(envelope.address) == envelope.digest:
            return MORE
        half = self._halves.get(key) or _Half(parts=max(1, -(-envelope.size // PIECE)))
        if part in half.there:
            return MORE  # a piece sent twice
        reason = (None if half.there else self._unfit(envelope, limit)) or _misfit(envelope, part, half.parts, piece)
        if reason is None:
            self._halves[key] = half
            half.put(self._file(envelope), part, piece)
            if len(half.there) < half.parts:
                return MORE
            if half.digest(self._file(envelope)) == envelope.digest:
                del self._halves[key]
                self._complete[envelope.address] = envelope.digest
                return None
            reason = "the body isn't what its envelope says: size or digest differ"
        self._halves.pop(key, None)
        self._file(envelope).unlink(missing_ok=True)
        self._refused.add(key)
        return reason

    def _unfit(self, envelope: Envelope, limit: int) -> str | None:
        """Say why a body can't be taken in: before a byte of it is on disk."""
        try:
            envelope.verify()
        except WireError as error:
            return str(error)
        if envelope.address in self._complete:
            return "another update is already in the log under this address: the first complete one counts"
        if envelope.size > limit:
            return f"the update has {envelope.size} bytes, the limit is {limit}"
        return None

    def _file(self, envelope: Envelope) -> Path:
        _, round_, attempt, node = envelope.address
        return self._directory / f"{round_}-{attempt}-{node}-{envelope.digest[:16]}.safetensors"


def _misfit(envelope: Envelope, part: int, parts: int, piece: bytes) -> str | None:
    length = PIECE if part < parts - 1 else envelope.size - (parts - 1) * PIECE
    if 0 <= part < parts and len(piece) == length:
        return None
    return f"part {part} of {parts} has {len(piece)} bytes: the pieces don't fit the envelope"


@dataclass
class _Half:
    """A body of which some pieces are there; hashed as they come for as long as they come in order."""

    parts: int
    there: set[int] = field(default_factory=set)
    sha: Any = field(default_factory=hashlib.sha256)
    hashed: int = 0

    def put(self, path: Path, part: int, piece: bytes) -> None:
        with path.open("r+b" if self.there else "w+b") as file:
            file.seek(part * PIECE)
            file.write(piece)
        self.there.add(part)
        if part == self.hashed:
            self.sha.update(piece)
            self.hashed += 1

    def digest(self, path: Path) -> str:
        if self.hashed == self.parts:
            return str(self.sha.hexdigest())
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _make_topic(servers: str, topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": servers, "log_level": 0})
    made = admin.create_topics([NewTopic(topic, 1, config={"flush.messages": "1"})], request_timeout=_PATIENCE)
    try:
        made[topic].result(_PATIENCE)
    except TimeoutError as error:
        raise LogError(f"Kafka at {servers} doesn't answer; is it running? `atoll kafka start`") from error
    except KafkaException as error:
        if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise LogError(
                f"Kafka at {servers} doesn't answer ({error.args[0].str()}); is it running? `atoll kafka start`"
            ) from error


def _ends(consumer: Consumer, servers: str, topic: str) -> list[TopicPartition]:
    """Where every partition of the topic ends now: a run that begins has nothing before that."""
    with contextlib.suppress(KafkaException):
        partitions = consumer.list_topics(topic, timeout=_PATIENCE).topics[topic].partitions
        found = [TopicPartition(topic, number) for number in partitions]
        for one in found:
            one.offset = consumer.get_watermark_offsets(one, timeout=_PATIENCE)[1]
        return found
    raise LogError(f"Kafka at {servers}: topic {topic} can't be read; is the broker running?")
