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
import queue
import threading
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from atoll.errors import LogError, RefusedError, UnreachableError, WireError
from atoll.logs import LATE, Progress, Record, pieces, topics
from atoll.logs.access import PLAIN, Access
from atoll.logs.bodies import check_size
from atoll.logs.spool import Spool, parts_of, whole
from atoll.wire import Address, Buffer, Envelope

log = logging.getLogger("atoll.logs.kafka")
_SPOOLERS = 4
_WINDOW = 8
"""Pieces of a body that wait for their acknowledgement at a time."""
_ASKING = 3.0
"""Seconds in which a broker has to say whether it lets a node in, before that takes part."""


class KafkaAppender:
    """The node's end: an idempotent producer; a piece counts as sent when all replicas have it.

    Args:
        servers: `host:port` of one or more brokers, by commas.
        topic: the topic of updates.
        access: by what the broker knows this node.
    """

    def __init__(self, servers: str, topic: str, access: Access = PLAIN) -> None:
        self._servers, self._topic, self._access = servers, topic, access
        self._producer = self._new()

    def _new(self) -> Producer:
        self._ear = topics.Ear(self._servers)
        return Producer(
            {
                **topics.settings(self._servers, self._access, self._ear),
                "enable.idempotence": True,
                "acks": "all",
                "linger.ms": 0,
                "message.timeout.ms": int(_WINDOW * topics.PATIENCE * 1000),  # of a whole window; `_wait` is for each piece
            }
        )

    def check(self) -> None:
        """Find out whether the broker lets this node write there; one that doesn't answer may do so later.

        Raises:
            RefusedError: it doesn't.
        """
        with contextlib.suppress(LogError):
            topics.reach(self._servers, self._access, _ASKING, self._topic)

    async def append(self, envelope: Envelope, body: Sequence[Buffer] | Path, progress: Progress | None = None) -> None:
        """See `Appender.append`; what another body under the address means, the reader decides."""
        check_size(envelope, body)
        loop = asyncio.get_running_loop()
        told = (lambda sent: loop.call_soon_threadsafe(progress, sent)) if progress else None
        sending = _Sending(self._producer, self._ear, told)
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
            if refused := sending.refusal(self._servers):
                raise RefusedError(refused) from error
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
    ear: topics.Ear
    progress: Callable[[int], object] | None
    produced: int = 0
    delivered: int = 0
    sent: int = 0
    failed: KafkaError | None = None
    stop: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def produce(self, topic: str, piece: bytes, key: str, headers: Headers) -> None:
        until = time.monotonic() + topics.PATIENCE
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
        seen, until = self.delivered, time.monotonic() + topics.PATIENCE
        while self.produced - self.delivered >= fewer:
            self.producer.poll(0.1)
            if self.failed:
                raise KafkaException(self.failed)
            if self.ear.refusal:
                raise TimeoutError(self.ear.refusal)
            if self.stop:
                raise TimeoutError("cancelled")
            if self.delivered > seen:
                seen, until = self.delivered, time.monotonic() + topics.PATIENCE
            if time.monotonic() > until:
                raise TimeoutError(f"it doesn't answer for {topics.PATIENCE:.0f} s")

    def refusal(self, servers: str) -> str | None:
        """Say why sending again is of no use, or None."""
        return self.ear.refusal or (topics.refusal(servers, self.failed) if self.failed else None)


def _headers(envelope: Envelope) -> Headers:
    parts = parts_of(envelope)
    facts = {**envelope.address._asdict(), "parts": parts, "digest": envelope.digest, "envelope": envelope.to_header()}
    return [(name, str(value).encode()) for name, value in facts.items()]


Over = tuple[int, Collection[Address]]
"""Rounds up to this one are over, but for these updates."""


class KafkaReader:
    """The server's end: one consumer, from where each topic stood when the run was made.

    Args:
        servers: `host:port` of one or more brokers, by commas.
        topic: the topic of updates; made when missing, each message synced to disk by the broker.
        run: the run whose updates are read.
        directory: where runs keep their bodies.
        limit: the longest body, in bytes.
        positions: where the run begins, as an earlier reader's `positions` said; without it the run is new, and begins where
            topics end now.
        over: the rounds up to this one are left out, but for these addresses: see `forget`.
        access: by what the broker knows this server.
        apart: each node has a topic of its own, `topic.<node>`, which is read once somebody asks to `follow` it; what lies in
            another node's topic is nobody's.

    Attributes:
        positions: for the server to keep with the run, so that another reader can take up all of its updates.
        waiting: why nothing can be read at present, or None.
        skipped: how many messages were no piece of an update.

    Raises:
        RefusedError: the broker won't have this server.
        LogError: the broker doesn't answer, it has lost a part of the run, or the directory can't be used.
    """

    def __init__(  # noqa: PLR0913  all but what it always needs by their names
        self,
        servers: str,
        topic: str,
        run: str,
        directory: Path,
        limit: int,
        positions: str | None = None,
        over: Over = (0, ()),
        *,
        access: Access = PLAIN,
        apart: bool = False,
    ) -> None:
        self.waiting: str | None = None
        self.skipped = 0
        self._servers, self._topic, self._run, self._over = servers, topic, run, over
        self._access, self._apart, self._followed = access, apart, set[str]()
        self._following, self._more = threading.Lock(), queue.SimpleQueue[list[TopicPartition]]()
        self._bodies = Spool(directory / run, limit)
        self._consumer = self._new()
        known = None if positions is None else dict(map(topics.place, positions.split()))
        if apart:
            self._known = topics.ends(servers, topic, access) if known is None else known
        else:
            topics.make(servers, topic, access)
            start = topics.begin(servers, topic, known, access)
            self._known = {str(one.partition): one.offset for one in start}
            self._consumer.assign(start)
        self.positions = topics.places(self._known)
        self._news: asyncio.Queue[Record | None] = asyncio.Queue()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        # The broker's syncs make writes beside it wait: several bodies wait at once, but only so many pieces in memory.
        self._spoolers = [ThreadPoolExecutor(1, "spool") for _ in range(_SPOOLERS)]
        self._room = threading.Semaphore(4 * _SPOOLERS)
        self._spooled: deque[Future[Record | None]] = deque()

    def _new(self) -> Consumer:
        return Consumer(
            {
                **topics.settings(self._servers, self._access, self._trouble),
                "group.id": f"atoll-{self._run}",  # the client asks for one; nothing is ever committed under it
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "fetch.wait.max.ms": 100,
                "max.partition.fetch.bytes": 8 << 20,
                "queued.max.messages.kbytes": 32 << 10,
            }
        )

    def follow(self, node: str) -> None:
        """See `Reader.follow`: its topic is read from where it ended when the run began, or from its beginning."""
        if not self._apart or node in self._followed:
            return
        with self._following:  # where the broker is away this takes its time, and nobody who is read already waits for it
            if node in self._followed:
                return
            topics.make(self._servers, f"{self._topic}.{node}", self._access)
            self._more.put(topics.begin(self._servers, self._topic, self._known, self._access, node))
            self._followed.add(node)

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

    def forget(self, round_: int, keep: Collection[Address] = ()) -> None:
        """See `Reader.forget`: the topic keeps the bodies, their files here go."""
        self._over = max(self._over[0], round_ - LATE), keep
        self._bodies.forget(round_, keep)

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
            with contextlib.suppress(queue.Empty):  # here, since a consumer that is polled by one thread holds up others
                self._consumer.incremental_assign(self._more.get_nowait())
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
                self._consumer.list_topics(timeout=1)
                self.waiting = None

    def _pass_on(self, message: Message, loop: asyncio.AbstractEventLoop) -> None:
        """Hand a piece of this run to a spooler; leave out everything else."""
        headers = {name: value for name, value in dict(message.headers() or ()).items() if isinstance(value, bytes)}
        own = (message.topic() or "").removeprefix(self._topic).removeprefix(".")
        position = f"{own}{'/' if own else ''}{message.partition()}:{message.offset()}"
        try:
            (closed, keep), round_ = self._over, int(headers["round"])
            if headers["run"] != self._run.encode() or (round_ <= closed and not keep):
                return
            envelope, part = Envelope.from_header(headers["envelope"]), int(headers["part"])
            if round_ <= closed and envelope.address not in keep:
                return
            if envelope.address.run != self._run:
                raise WireError("its envelope is of another run")
            if self._apart and own != envelope.address.node:
                raise WireError("its envelope is of another node than its topic")
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
        self.waiting = topics.refusal(self._servers, error) or f"Kafka at {self._servers}: {error.str()}; is the broker running?"
        log.info(self.waiting)
