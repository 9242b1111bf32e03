"""The update log inside the server: bodies come by HTTP, lie in files, and count once an index line is on disk.

A directory a run::

    index.jsonl                                  one envelope a line: the complete bodies, in log order
    <round>-<attempt>-<node>-<digest>.safetensors   a body; without its line it is still on its way

A body is synced before its line is written, and nobody is told before the line is synced too, so a crash
leaves complete bodies and half ones, which are resumed or written anew. One sync of the index serves all
bodies that wait for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import mmap
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from urllib.parse import quote

import aiohttp

from atoll.errors import LogError, RefusedError, UnreachableError, WireError
from atoll.logs import Progress, Record, pieces
from atoll.wire import Address, Buffer, Envelope

_COALESCE = 1 << 20
"""What comes is handed to a worker in lumps of at least so many bytes."""
HEADER = "Atoll-Envelope"


class EmbeddedLog:
    """The server's end: receives bodies, and is their `Reader`.

    Args:
        directory: where runs keep their bodies; made when missing.
        run: the run whose updates come.
        limit: the longest body, in bytes.

    Raises:
        LogError: the directory can't be used.
    """

    def __init__(self, directory: Path, run: str, limit: int) -> None:
        self.run, self.limit = run, limit
        self._directory = directory / run
        self._digests: dict[Address, str] = {}
        self._records: list[Record] = []
        self._news = asyncio.Condition()
        self._closed = False
        self._uploads: defaultdict[Path, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._pending: list[tuple[Envelope, asyncio.Future[None]]] = []
        self._committing = asyncio.Lock()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._index = (self._directory / "index.jsonl").open("a+b", buffering=0)
            self._recover()
        except OSError as error:
            raise LogError(f"{self._directory}: the update log can't be kept there ({error.strerror})") from error

    def _recover(self) -> None:
        """Take up the complete bodies of an earlier process; cut off a line that a crash left half."""
        self._index.seek(0)
        lines = self._index.read().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        self._index.truncate(sum(map(len, whole)))
        for line in whole:
            self._add(Envelope.from_header(line.strip()))

    def _add(self, envelope: Envelope) -> None:
        self._digests[envelope.address] = envelope.digest
        self._records.append(Record(envelope, str(len(self._records))))

    def received(self, envelope: Envelope) -> int:
        """Return how many bytes of a body are there: all of them where it is complete."""
        if self._digests.get(envelope.address) == envelope.digest:
            return envelope.size
        with contextlib.suppress(FileNotFoundError):
            return min(self._file(envelope).stat().st_size, envelope.size)
        return 0

    async def receive(self, envelope: Envelope, start: int, chunks: AsyncIterator[bytes]) -> bool:
        """Take in a body from byte `start` on; return whether it is new, once it is durable.

        Raises:
            RefusedError: over the limit, another digest is there already, or the bytes aren't what the envelope says.
            WireError: the bytes ended early (what came is kept), or `start` is past what is there.
            LogError: they can't be written.
        """
        if envelope.size > self.limit:
            raise RefusedError(f"the update has {envelope.size} bytes, the limit is {self.limit}")
        path = self._file(envelope)
        async with self._uploads[path]:
            there = self._digests.get(envelope.address)
            if there == envelope.digest:
                return False
            if there is None:
                await self._take_in(path, envelope, start, chunks)
                there = self._digests.get(envelope.address)
            if there is not None and there != envelope.digest:
                path.unlink(missing_ok=True)
                raise RefusedError("another update is already in the log under this address: the first complete one counts")
            await self._commit(envelope)
        self._uploads.pop(path, None)
        return True

    async def _take_in(self, path: Path, envelope: Envelope, start: int, chunks: AsyncIterator[bytes]) -> None:
        try:
            upload = await asyncio.to_thread(_Upload, path, start)
        except OSError as error:
            raise LogError(f"{path}: can't be written ({error.strerror}); free some space on the server") from error
        try:
            lump: list[bytes] = []
            waiting = 0
            async for chunk in chunks:
                lump.append(chunk)
                waiting += len(chunk)
                if waiting >= _COALESCE:
                    await asyncio.to_thread(upload.write, lump)
                    lump, waiting = [], 0
                if upload.size + waiting > envelope.size:
                    break
            digest = await asyncio.to_thread(upload.finish, lump)
        except OSError as error:
            raise LogError(f"{path}: can't be written ({error.strerror}); free some space on the server") from error
        finally:
            upload.close()
        if upload.size < envelope.size:
            raise WireError(f"the body ended after {upload.size} of {envelope.size} bytes: send the rest")
        if upload.size > envelope.size or digest != envelope.digest:
            path.unlink(missing_ok=True)
            raise RefusedError("the body isn't what its envelope says: size or digest differ")

    async def _commit(self, envelope: Envelope) -> None:
        """Write the line of a synced body, and sync it together with whatever else waits by then."""
        done = asyncio.get_running_loop().create_future()
        self._pending.append((envelope, done))
        async with self._committing:
            batch, self._pending = self._pending, []
            if batch:
                try:
                    await asyncio.to_thread(self._write_lines, [one for one, _ in batch])
                except OSError as error:
                    for _, waiter in batch:
                        waiter.set_exception(LogError(f"{self._directory}: the index can't be written ({error.strerror})"))
                else:
                    for one, waiter in batch:
                        self._add(one)
                        waiter.set_result(None)
                    async with self._news:
                        self._news.notify_all()
        await done

    def _write_lines(self, envelopes: Sequence[Envelope]) -> None:
        if os.name == "posix":
            handle = os.open(self._directory, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        self._index.write(b"".join(envelope.to_header().encode() + b"\n" for envelope in envelopes))
        os.fsync(self._index.fileno())

    async def records(self) -> AsyncIterator[Record]:
        """See `Reader.records`."""
        for seen in itertools.count():
            async with self._news:
                while not self._closed and len(self._records) == seen:
                    await self._news.wait()
            if seen == len(self._records):
                return
            yield self._records[seen]

    def body(self, envelope: Envelope) -> memoryview:
        """See `Reader.body`."""
        if self._digests.get(envelope.address) != envelope.digest:
            raise LogError(f"the log holds no update {envelope.digest[:12]} of round {envelope.address.round}")
        return mapped(self._file(envelope))

    async def close(self) -> None:
        """See `Reader.close`."""
        async with self._committing, self._news:
            self._closed = True
            self._news.notify_all()
        self._index.close()

    def _file(self, envelope: Envelope) -> Path:
        _, round_, attempt, node = envelope.address
        return self._directory / f"{round_}-{attempt}-{node}-{envelope.digest[:16]}.safetensors"


class _Upload:
    """A body on its way into a file: hashed as it is written, in a worker thread."""

    def __init__(self, path: Path, start: int) -> None:
        if start and not path.exists():
            raise WireError(f"the upload goes on at byte {start}, but only 0 are here")
        self._file = path.open("r+b" if start else "w+b", buffering=0)
        self._sha = hashlib.sha256()
        self.size = 0
        while self.size < start and (piece := self._file.read(min(_COALESCE, start - self.size))):
            self._sha.update(piece)
            self.size += len(piece)
        if self.size < start:
            self._file.close()
            raise WireError(f"the upload goes on at byte {start}, but only {self.size} are here")
        self._file.truncate()

    def write(self, lump: Sequence[bytes]) -> None:
        for chunk in lump:
            view = memoryview(chunk)
            self._sha.update(view)
            self.size += len(view)
            while view:
                view = view[self._file.write(view) :]

    def finish(self, lump: Sequence[bytes]) -> str:
        self.write(lump)
        os.fsync(self._file.fileno())
        return self._sha.hexdigest()

    def close(self) -> None:
        self._file.close()


def mapped(path: Path) -> memoryview:
    """Return a file's bytes without reading them: pages come as they are looked at, and cost no anonymous memory.

    Raises:
        LogError: the file is gone or empty.
    """
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise LogError(f"{path}: a body is missing from the log ({error})") from error


class HttpAppender:
    """The node's end: `PUT`, resumed after an interruption where the server says it stands.

    Args:
        url: of the server, without a path.
        session: an open HTTP session; whoever opened it closes it.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url, self._session = url.rstrip("/"), session
        self._tried: set[str] = set()

    async def append(self, envelope: Envelope, body: Sequence[Buffer] | Path, progress: Progress | None = None) -> None:
        """See `Appender.append`."""
        run, round_, attempt, node = envelope.address
        url = f"{self._url}/v1/runs/{quote(run)}/rounds/{round_}/{attempt}/updates/{quote(node)}"
        headers = {HEADER: envelope.to_header()}
        try:
            start = await self._offset(url, headers) if envelope.digest in self._tried else 0
            self._tried.add(envelope.digest)
            if start < envelope.size or not envelope.size:
                await self._put(url, headers, envelope, body, start, progress)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise UnreachableError(
                f"{self._url}: the update log doesn't answer ({str(error) or type(error).__name__})"
            ) from error
        self._tried.discard(envelope.digest)
        if progress:
            progress(envelope.size)

    async def _offset(self, url: str, headers: dict[str, str]) -> int:
        async with self._session.head(url, headers=headers) as response:
            if response.status >= 500:
                raise UnreachableError(f"{self._url}: the update log failed (HTTP {response.status})")
            return int(response.headers.get("Upload-Offset", 0))

    async def _put(
        self,
        url: str,
        headers: dict[str, str],
        envelope: Envelope,
        body: Sequence[Buffer] | Path,
        start: int,
        progress: Progress | None,
    ) -> None:
        async def stream() -> AsyncIterator[Buffer]:
            sent = start
            for piece in pieces(body, start):
                yield piece
                sent += len(piece)
                if progress:
                    progress(sent)

        headers = {**headers, "Content-Length": str(envelope.size - start), "Content-Type": "application/octet-stream"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{envelope.size - 1}/{envelope.size}"
        async with self._session.put(url, headers=headers, data=stream()) as response:
            if response.status in (200, 201):
                return
            text = (await response.text())[:2000]
            if response.status >= 500:
                raise UnreachableError(f"{self._url}: the update log failed (HTTP {response.status}: {text})")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                text = (await response.json())["error"]
            raise RefusedError(text)

    async def close(self) -> None:
        """See `Appender.close`."""
