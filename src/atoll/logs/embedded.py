"""The update log inside the server: bodies come by HTTP, lie in files, and count once an index line is on disk.

A directory a run::

    index.jsonl                                  one envelope a line: the complete bodies, in log order
    <round>-<attempt>-<node>-<digest>.safetensors   a body; without its line it is still on its way

A body is synced before its line is written, and nobody is told before the line is synced too, so a crash
leaves complete bodies and half ones, which are resumed or written anew. One sync of the index serves all
bodies that wait for one. A body that comes by two connections is taken from the newer: who sends it again
has given up on the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from atoll.durable import sync_directory
from atoll.errors import LogError, RefusedError, UnreachableError, WireError
from atoll.logs import LATE, Record
from atoll.logs.bodies import Incoming, Index, mapped, path_of
from atoll.logs.upload import STALL
from atoll.wire import Address, Envelope

Room = Callable[[int], str | None]
"""Asked before so many bytes are taken in: says why there is no room for them at present, or None."""
log = logging.getLogger("atoll.logs.embedded")
_TAKEN = "another update is already in the log under this address: the first complete one counts"
_NEWER = "the same body comes by a newer connection"
_ALTERED = "the body isn't what its envelope says: size or digest differ"


class EmbeddedLog:
    """The server's end: receives bodies, and is their `Reader`.

    Args:
        directory: where runs keep their bodies; made when missing.
        run: the run whose updates come.
        limit: the longest body, in bytes.
        room: asked before a body is taken in.

    Raises:
        LogError: the directory can't be used, or its index is damaged.
    """

    positions: str | None = None

    def __init__(self, directory: Path, run: str, limit: int, room: Room | None = None) -> None:
        self.run, self.limit = run, limit
        self.waiting: str | None = None
        self._room = room or (lambda _: None)
        self._directory = directory / run
        self._digests: dict[Address, str] = {}
        self._records: list[Record | None] = []
        self._forgotten = 0
        self._news = asyncio.Condition()
        self._closed = False
        self._turns: dict[Path, _Turn] = {}
        self._pending: list[tuple[Envelope, asyncio.Future[None]]] = []
        self._committing: asyncio.Task[None] | None = None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for parent in (directory, directory.parent):
                sync_directory(parent)
            self._index = Index(self._directory / "index.jsonl")
        except OSError as error:
            raise LogError(f"{self._directory}: the update log can't be kept there ({error.strerror})") from error
        self._recover()

    def _recover(self) -> None:
        """Take up the complete bodies of an earlier process."""
        lines, self._index.lines = self._index.lines, []
        for number, line in enumerate(lines):
            try:
                envelope = Envelope.from_header(line)
            except WireError as error:
                self._index.close()
                raise LogError(f"{self._index.path}: line {number + 1} is damaged; restore the file from a copy") from error
            path = path_of(self._directory, envelope)
            if path.exists() and path.stat().st_size == envelope.size:
                self._add(envelope, number)
            else:
                log.warning("%s: the body is gone; its node has to send it again", path)

    def _add(self, envelope: Envelope, number: int) -> None:
        self._digests[envelope.address] = envelope.digest
        self._records.append(Record(envelope, str(number)))

    def received(self, envelope: Envelope) -> int:
        """Return how many bytes of a body are there: all of them only where it counts already, else at least one is missing."""
        if self._digests.get(envelope.address) == envelope.digest:
            return envelope.size
        with contextlib.suppress(OSError):
            # A whole file without its line isn't in the log: the last byte, sent again, puts it there.
            return max(0, min(path_of(self._directory, envelope).stat().st_size, envelope.size - 1))
        return 0

    async def offset(self, envelope: Envelope) -> int:
        """Do as `received`, for a sender that means to go on there: whatever else still comes of the body stops first."""
        async with self._turn(path_of(self._directory, envelope)):
            return self.received(envelope)

    async def receive(self, envelope: Envelope, start: int, chunks: AsyncIterator[bytes]) -> bool:
        """Take in a body from byte `start` on; return whether it is new, once it is durable.

        Raises:
            RefusedError: over the limit, another digest is there already, or the bytes aren't what the envelope says.
            WireError: the bytes ended early (what came is kept).
            UnreachableError: `start` or what was there doesn't fit, nothing came for long, or a newer connection took over.
            LogError: they can't be written.
        """
        if envelope.size > self.limit:
            raise RefusedError(f"the update has {envelope.size} bytes, the limit is {self.limit}")
        path = path_of(self._directory, envelope)
        async with self._turn(path) as (turn, number):
            there = self._digests.get(envelope.address)
            if there == envelope.digest:
                return False
            try:
                if there is not None:
                    raise RefusedError(_TAKEN)
                if full := self._room(envelope.size - start):
                    raise LogError(full)
                turn.envelope = envelope
                with _writing(path):
                    await _take_in(path, envelope, start, turn.chunks(number, chunks))
                await self._commit(envelope)
            except RefusedError:
                path.unlink(missing_ok=True)
                raise
            except LogError as error:
                self.waiting = str(error)
                raise
            self.waiting = None
            return True

    @contextlib.asynccontextmanager
    async def _turn(self, path: Path) -> AsyncIterator[tuple[_Turn, int]]:
        """Give a file to one upload at a time."""
        turn = self._turns.setdefault(path, _Turn())
        turn.users += 1
        number = turn.supersede()
        try:
            async with turn.lock:
                if number != turn.newest:  # it waited, and must not touch what the newer one was told is there
                    raise UnreachableError(_NEWER)
                yield turn, number
        finally:
            turn.users -= 1
            if not turn.users:
                del self._turns[path]

    async def _commit(self, envelope: Envelope) -> None:
        """Write the line of a synced body, and sync it together with whatever else waits by then."""
        if self._closed:
            raise LogError(f"{self._directory}: the update log is closed; send the update again when the server is back")
        done = asyncio.get_running_loop().create_future()
        self._pending.append((envelope, done))
        if self._committing is None or self._committing.done():
            # A task of its own: whoever waits may be cancelled, but a batch is never left half done.
            self._committing = asyncio.create_task(self._commit_pending())
        try:
            await done
        except asyncio.CancelledError:
            await asyncio.wait([self._committing])  # until then nobody else may write that file
            raise

    async def _commit_pending(self) -> None:
        while self._pending:
            batch: dict[Address, tuple[Envelope, asyncio.Future[None]]] = {}
            waiting, self._pending = self._pending, []
            for envelope, done in waiting:
                if envelope.address in self._digests or envelope.address in batch:
                    _settle(done, RefusedError(_TAKEN))
                else:
                    batch[envelope.address] = envelope, done
            error: Exception | None = None
            number = self._index.count
            try:
                if batch:
                    await asyncio.to_thread(self._index.append, [one.to_header().encode() for one, _ in batch.values()])
            except OSError as failure:
                error = LogError(f"{self._index.path}: can't be written ({failure.strerror}); free some space on the server")
            for place, (envelope, done) in enumerate(batch.values()):
                if error is None:
                    self._add(envelope, number + place)
                _settle(done, error)
            async with self._news:
                self._news.notify_all()

    def follow(self, node: str) -> None:
        """See `Reader.follow`: there is one place for all."""

    async def records(self) -> AsyncIterator[Record]:
        """See `Reader.records`."""
        for seen in itertools.count():
            async with self._news:
                while not self._closed and len(self._records) == seen:
                    await self._news.wait()
            if seen == len(self._records):
                return
            if record := self._records[seen]:
                yield record

    def arriving(self) -> Mapping[Address, tuple[int, int]]:
        """See `Reader.arriving`."""
        coming = [turn.envelope for turn in self._turns.values() if turn.envelope]
        return {one.address: (self.received(one), one.size) for one in coming}

    def holds(self, address: Address, digest: str) -> bool:
        """Say whether this very body is in the log."""
        return self._digests.get(address) == digest

    def body(self, envelope: Envelope) -> memoryview:
        """See `Reader.body`."""
        if self._digests.get(envelope.address) != envelope.digest:
            raise LogError(f"the log holds no update {envelope.digest[:12]} of round {envelope.address.round}")
        return mapped(path_of(self._directory, envelope))

    def forget(self, round_: int, keep: Collection[Address] = ()) -> None:
        """See `Reader.forget`: here are no copies, the files are the log."""
        for record in self._records[self._forgotten :]:
            if record is None or record.envelope.address.round > round_ - LATE or record.envelope.address in keep:
                return
            self._digests.pop(record.envelope.address, None)
            self._records[self._forgotten] = None
            self._forgotten += 1

    async def close(self) -> None:
        """See `Reader.close`; uploads that aren't durable yet are told to come again."""
        self._closed = True
        if self._committing:
            await asyncio.wait([self._committing])
        async with self._news:
            self._news.notify_all()
        self._index.close()


def _settle(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.done():  # whoever waited is gone
        return
    if error:
        done.set_exception(error)
    else:
        done.set_result(None)


@dataclass(eq=False)
class _Turn:
    """Whose turn it is to write one file: the newest upload's. Older ones stop where they are."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0
    newest: int = 0
    envelope: Envelope | None = None
    waiting: asyncio.Timeout | None = None

    def supersede(self) -> int:
        """Make an upload the newest; return its number."""
        self.newest += 1
        if self.waiting:
            self.waiting.reschedule(asyncio.get_running_loop().time())
            self.waiting = None
        return self.newest

    async def chunks(self, number: int, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield what comes, for as long as it comes and no newer upload takes over."""
        try:
            while number == self.newest:
                async with asyncio.timeout(STALL) as self.waiting:
                    chunk = await anext(chunks, None)
                self.waiting = None
                if chunk is None:
                    return
                yield chunk
        except TimeoutError as error:
            if number == self.newest:
                raise UnreachableError(f"nothing came for {STALL:.0f} s: send the rest") from error
        raise UnreachableError(_NEWER)


async def _take_in(path: Path, envelope: Envelope, start: int, chunks: AsyncIterator[bytes]) -> None:
    """Write and hash a body as it comes, and sync it."""
    upload = await asyncio.to_thread(Incoming, path, start)
    try:
        await upload.pour(chunks, envelope.size)
        right = (upload.size, upload.digest) == (envelope.size, envelope.digest)
        if right:
            await asyncio.to_thread(upload.sync)
    finally:
        upload.close()
    if upload.size < envelope.size:
        raise WireError(f"the body ended after {upload.size} of {envelope.size} bytes: send the rest")
    if not right:
        path.unlink(missing_ok=True)
        if start:  # a crash may have spoilt what was there: that is no fault of the body's
            raise UnreachableError("what was here of the body isn't what its envelope says: send all of it")
        raise RefusedError(_ALTERED)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LogError(f"{path}: can't be written ({error.strerror}); free some space on the server") from error


class Stored:
    """A run's bodies as they lie there, for another look at them: a `Reader` that writes nothing, and ends.

    Args:
        directory: where runs keep their bodies.
        run: the run whose updates are read.

    Raises:
        LogError: nothing of the run is there.
    """

    waiting: str | None = None
    positions: str | None = None

    def __init__(self, directory: Path, run: str) -> None:
        self._directory = directory / run
        try:
            self._lines = (self._directory / "index.jsonl").read_bytes().splitlines()
        except OSError as error:
            raise LogError(f"{self._directory}: the run's updates aren't there ({error.strerror})") from error

    def follow(self, node: str) -> None:
        """See `Reader.follow`: there is one place for all."""

    async def records(self) -> AsyncIterator[Record]:
        """See `Reader.records`; a half line at the end is one that a server is writing, or never wrote to its end."""
        for number, line in enumerate(self._lines):
            with contextlib.suppress(WireError):
                yield Record(Envelope.from_header(line), str(number))

    def arriving(self) -> Mapping[Address, tuple[int, int]]:
        """See `Reader.arriving`: nothing comes any more."""
        return {}

    def body(self, envelope: Envelope) -> memoryview:
        """See `Reader.body`."""
        return mapped(path_of(self._directory, envelope))

    def forget(self, round_: int, keep: Collection[Address] = ()) -> None:
        """See `Reader.forget`: here are no copies."""

    async def close(self) -> None:
        """See `Reader.close`: nothing is open."""
