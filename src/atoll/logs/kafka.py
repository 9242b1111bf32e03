"""The update log in Apache Kafka: a topic of pieces, keyed by node.

Each message is one piece of a body: `PIECE` bytes, the last one what is left. Its headers say where it belongs: run,
round, attempt, node, part, parts, digest, and the whole signed envelope. The reader takes what is of its own run
(everything else is skipped by header), puts the pieces into files, and yields a body when all of it is there and its
digest is right. No consumer group: positions are the server's own to keep.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

from atoll.errors import LogError, UnreachableError, WireError
from atoll.logs import LATE, Progress, Record, pieces
from atoll.logs.bodies import check_size
from atoll.logs.spool import Spool, parts_of, whole
from atoll.wire import Address, Buffer, Envelope

log = logging.getLogger("atoll.logs.kafka")
_SPOOLERS = 4
_WINDOW = 8
"""Pieces of a body that wait for their acknowledgement at a time."""
_PATIENCE = 10.0
"""Seconds in which nothing moves until a broker counts as down."""


class KafkaAppender:
    """The node's end: an idempotent producer; a piece counts as sent when all replicas have it.

    Args:
        servers: `host:port` of one or more brokers, by commas.
        topic: the topic of updates.
    """

    def __init__(self, servers: str, topic: str) -> None:
        self._servers, self._topic = servers, topic
        self._producer = self._new()

    def _new(self) -> Producer:
        return Producer(
            {
                "bootstrap.servers": self._servers,
                "enable.idempotence": True,
                "acks": "all",
                "linger.ms": 0,
                "message.timeout.ms": int(_WINDOW * _PATIENCE * 1000),  # of a whole window; `_wait` is for each piece
                "error_cb": _quiet,
                "log_level": 0,
            }
        )

    async def append(self, envelope: Envelope, body: Sequence[Buffer] | Path, progress: Progress | None = None) -> None:
        """See `Appender.append`; what another body under the address means, the reader decides."""
        check_size(envelope, body)
        loop = asyncio.get_running_loop()
        told = (lambda sent: loop.call_soon_threadsafe(progress, sent)) if progress else None
        sending = _Sending(self._producer, told)
        try:
            await asyncio.to_thread(self._append, sending, envelope, body)
        except asyncio.CancelledError:
            sending.stop = True
            raise
        except (KafkaException, OSError) as error:
            if self._producer is sending.producer:
                # What it still holds must not arrive behind our back, and after some errors it is of no use at all.
                sending.producer.purge()
                self._producer = self._new()
            said = error.args[0].str() if isinstance(error, KafkaException) else str(error)
            raise UnreachableError(f"Kafka at {self._servers}: the update can't be appended ({said})") from error

    def _append(self, sending: _Sending, envelope: Envelope, body: Sequence[Buffer] | Path) -> None:
        headers = _headers(envelope)
        for part, piece in enumerate(whole(pieces(body)) if envelope.size else [b""]):
            sending.wait(_WINDOW)
            sending.produce(self._topic, piece, envelope.address.node, [*headers, ("part", str(part).encode())])
        sending.wait(1)

    async def close(self) -> None:
        """See `Appender.close`."""
        await asyncio.to_thread(self._producer.flush, 1.0)


Headers = list[tuple[str, str | bytes | None]]


@dataclass
class _Sending:
    """One body on its way out, in a worker thread."""

    producer: Producer
    progress: Callable[[int], object] | None
    produced: int = 0
    delivered: int = 0
    sent: int = 0
    failed: KafkaError | None = None
    stop: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def produce(self, topic: str, piece: bytes, key: str, headers: Headers) -> None:
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                self.producer.produce(topic, piece, key, headers=headers, on_delivery=self._on_delivery)
            except BufferError as error:  # other bodies fill the queue: let some go first
                if time.monotonic() > until:
                    raise TimeoutError("its queue stays full") from error
                self.producer.poll(0.1)
            else:
                self.produced += 1
                return

    def _on_delivery(self, error: KafkaError | None, message: Message) -> None:
        if error:
            self.failed = error
            return
        with self.lock:  # another body's thread may be the one that hears of it
            self.delivered += 1
            self.sent += len(message)
            if self.progress:
                self.progress(self.sent)

    def wait(self, fewer: int) -> None:
        """Wait until fewer than so many pieces are without acknowledgement."""
        seen, until = self.delivered, time.monotonic() + _PATIENCE
        while self.produced - self.delivered >= fewer:
            self.producer.poll(0.1)
            if self.failed:
                raise KafkaException(self.failed)
            if self.stop:
                raise TimeoutError("cancelled")
            if self.delivered > seen:
                seen, until = self.delivered, time.monotonic() + _PATIENCE
            if time.monotonic() > until:
                raise TimeoutError(f"it doesn't answer for {_PATIENCE:.0f} s")


def _quiet(error: object) -> None:
    log.debug("kafka: %s", error)


def _headers(envelope: Envelope) -> Headers:
    parts = parts_of(envelope)
    facts = {**envelope.address._asdict(), "parts": parts, "digest": envelope.digest, "envelope": envelope.to_header()}
    return [(name, str(value).encode()) for name, value in facts.items()]


class KafkaReader:
    """The server's end: one consumer, from where the topic stood when the run was made.

    Args:
        servers: `host:port` of one or more brokers, by commas.
        topic: the topic of updates; made when missing, each message synced to disk by the broker.
        run: the run whose updates are read.
        directory: where runs keep their bodies.
        limit: the longest body, in bytes.
        positions: where the run begins in the topic, as an earlier reader's `positions` said; without it the run is
            new, and begins where the topic ends now.
        closed: the rounds up to this one are over, and left out.

    Attributes:
        positions: for the server to keep with the run, so that another reader can take up all of its updates.
        waiting: why nothing can be read at present, or None.
        skipped: how many messages were no piece of an update.

    Raises:
        LogError: the broker doesn't answer, it has lost a part of the run, or the directory can't be used.
    """

    def __init__(
        self, servers: str, topic: str, run: str, directory: Path, limit: int, positions: str | None = None, closed: int = 0
    ) -> None:
        self.waiting: str | None = None
        self.skipped = 0
        self._servers, self._topic, self._run, self._closed = servers, topic, run, closed
        self._bodies = Spool(directory / run, limit)
        _make_topic(servers, topic)
        self._consumer = Consumer(
            {
                "bootstrap.servers": servers,
                "group.id": f"atoll-{run}",  # the client asks for one; nothing is ever committed under it
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "fetch.wait.max.ms": 100,
                "max.partition.fetch.bytes": 8 << 20,
                "queued.max.messages.kbytes": 32 << 10,
                "error_cb": self._trouble,
                "log_level": 0,
            }
        )
        start = _start(self._consumer, servers, topic, positions)
        self.positions = " ".join(f"{one.partition}:{one.offset}" for one in start)
        self._consumer.assign(start)
        self._news: asyncio.Queue[Record | None] = asyncio.Queue()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        # The broker's syncs make writes beside it wait: several bodies wait at once, but only so many pieces in memory.
        self._spoolers = [ThreadPoolExecutor(1, "spool") for _ in range(_SPOOLERS)]
        self._room = threading.Semaphore(4 * _SPOOLERS)
        self._spooled: deque[Future[Record | None]] = deque()

    async def records(self) -> AsyncIterator[Record]:
        """See `Reader.records`."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._poll, args=(loop,), name="kafka", daemon=True)
        self._thread.start()
        while (record := await self._news.get()) is not None:
            yield record

    def arriving(self) -> Mapping[Address, tuple[int, int]]:
        """See `Reader.arriving`."""
        return self._bodies.arriving()

    def body(self, envelope: Envelope) -> memoryview:
        """See `Reader.body`."""
        return self._bodies.get(envelope)

    def forget(self, round_: int) -> None:
        """See `Reader.forget`: the topic keeps the bodies, their files here go."""
        self._bodies.forget(round_)
        self._closed = max(self._closed, round_ - LATE)

    async def close(self) -> None:
        """See `Reader.close`."""
        self._stopped.set()
        if self._thread:
            await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._consumer.close)
        await asyncio.to_thread(self._bodies.close)
        self._news.put_nowait(None)

    def _poll(self, loop: asyncio.AbstractEventLoop) -> None:
        while not self._stopped.is_set():
            message = self._consumer.poll(0.2)
            if message is None:
                self._look_again()
            elif error := message.error():
                self._trouble(error)
            else:
                self.waiting = None
                self._pass_on(message, loop)
        for spooler in self._spoolers:
            spooler.shutdown()

    def _look_again(self) -> None:
        """Find out whether a broker that was away is back: it may have nothing new to tell."""
        if self.waiting:
            with contextlib.suppress(KafkaException):
                self._consumer.list_topics(self._topic, timeout=1)
                self.waiting = None

    def _pass_on(self, message: Message, loop: asyncio.AbstractEventLoop) -> None:
        """Hand a piece of this run to a spooler; leave out everything else."""
        headers = {name: value for name, value in dict(message.headers() or ()).items() if isinstance(value, bytes)}
        position = f"{message.partition()}:{message.offset()}"
        try:
            if headers["run"] != self._run.encode() or int(headers["round"]) <= self._closed:
                return
            envelope, part = Envelope.from_header(headers["envelope"]), int(headers["part"])
            if envelope.address.run != self._run:
                raise WireError("its envelope is of another run")
        except (WireError, ValueError, KeyError) as error:
            self._skip(position, error)
            return
        while not self._room.acquire(timeout=0.2):
            if self._stopped.is_set():
                return
        # The pieces of a node stay in order on one spooler: a body is hashed as it comes, and the first one counts.
        spooler = self._spoolers[zlib.crc32(envelope.address.node.encode()) % _SPOOLERS]
        done = spooler.submit(self._spool, envelope, part, message.value() or b"", position)
        self._spooled.append(done)
        done.add_done_callback(lambda _: loop.call_soon_threadsafe(self._release))

    def _spool(self, envelope: Envelope, part: int, piece: bytes, position: str) -> Record | None:
        """Take in one piece; return the record that it completes. A disk that is full is waited for: the topic won't wait."""
        try:
            while not self._stopped.is_set():
                try:
                    return self._bodies.take(envelope, part, piece, position)
                except OSError as error:
                    self.waiting = f"updates can't be spooled ({error.strerror}): free some space on the server"
                    log.warning(self.waiting)
                    self._stopped.wait(1)
        except WireError as error:
            self._skip(position, error)
        finally:
            self._room.release()
        return None

    def _release(self) -> None:
        """Let records out in the order of the log, whichever spooler was quicker."""
        while self._spooled and self._spooled[0].done():
            done = self._spooled.popleft()
            if error := done.exception():
                log.error("a piece of an update is lost to a fault", exc_info=error)
            elif (record := done.result()) and not self._stopped.is_set():
                self._news.put_nowait(record)

    def _skip(self, position: str, error: Exception) -> None:
        self.skipped += 1
        log.warning("the message at %s is no piece of an update: %s", position, error)

    def _trouble(self, error: KafkaError) -> None:
        self.waiting = f"Kafka at {self._servers}: {error.str()}"
        log.info(self.waiting)


def brokers(servers: str, patience: float) -> int:
    """Return how many brokers there are, as one of these tells.

    Raises:
        LogError: none answers within so many seconds.
    """
    try:
        return len(AdminClient({"bootstrap.servers": servers, "log_level": 0}).list_topics(timeout=patience).brokers)
    except KafkaException as error:
        said = error.args[0].str()
        raise LogError(f"Kafka at {servers} doesn't answer ({said}); is it running? `atoll kafka start`") from error


def let_go(servers: str, topic: str, positions: str) -> None:
    """Have Kafka drop every message of a topic that lies before these positions (-1: the end), of whichever run or server.

    Raises:
        LogError: it can't be done.
    """
    before = [TopicPartition(topic, int(k), int(v)) for k, v in (one.split(":") for one in positions.split())]
    try:
        admin = AdminClient({"bootstrap.servers": servers, "log_level": 0})
        for done in admin.delete_records(before, request_timeout=_PATIENCE).values():
            done.result(_PATIENCE)
    except (KafkaException, TimeoutError) as error:
        raise LogError(f"Kafka at {servers}: messages of topic {topic} can't be dropped ({error})") from error


def _make_topic(servers: str, topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": servers, "log_level": 0})
    # Synced before acknowledged; and the log is the truth, so it goes when an operator says so, not after Kafka's seven days.
    config = {"flush.messages": "1", "retention.ms": "-1"}
    made = admin.create_topics([NewTopic(topic, 1, config=config)], request_timeout=_PATIENCE)
    try:
        made[topic].result(_PATIENCE)
    except TimeoutError as error:
        raise LogError(f"Kafka at {servers} doesn't answer; is it running? `atoll kafka start`") from error
    except KafkaException as error:
        if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise LogError(
                f"Kafka at {servers} doesn't answer ({error.args[0].str()}); is it running? `atoll kafka start`"
            ) from error


def _start(consumer: Consumer, servers: str, topic: str, positions: str | None) -> list[TopicPartition]:
    """Where to read every partition from: a run that begins has nothing before the end."""
    known = None if positions is None else {int(k): int(v) for k, v in (one.split(":") for one in positions.split())}
    try:
        found = [TopicPartition(topic, number) for number in _partitions(consumer, topic)]
        for one in found:
            first, end = consumer.get_watermark_offsets(one, timeout=_PATIENCE)
            one.offset = end if known is None else known.get(one.partition, first)
            if not first <= one.offset <= end:
                raise LogError(
                    f"Kafka at {servers}: topic {topic} goes from {first} to {end}, but the run began at {one.offset}: "
                    "its updates are gone; begin a new run, and keep them longer (retention.ms)"
                )
    except KafkaException as error:
        raise LogError(f"Kafka at {servers}: topic {topic} can't be read; is the broker running?") from error
    return found


def _partitions(consumer: Consumer, topic: str) -> list[int]:
    """Which partitions a topic has, once the broker knows of it."""
    until = time.monotonic() + _PATIENCE
    while True:
        known = consumer.list_topics(topic, timeout=_PATIENCE).topics.get(topic)
        if known and known.partitions:
            return sorted(known.partitions)
        if time.monotonic() > until:
            raise KafkaException(KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART))
        time.sleep(0.05)
