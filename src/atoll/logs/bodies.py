"""Bodies as files: where each lies, how it gets there, and how it is looked at.

What the embedded log, Kafka's reader and a node's downloads share, and the index of the log that has no broker behind it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from atoll.durable import sync_directory, write_all
from atoll.errors import LogError, RefusedError, UnreachableError
from atoll.logs import Progress, contents
from atoll.wire import Buffer, Envelope

_READ = 1 << 20
_COALESCE = 1 << 20
"""What comes is handed to a worker in lumps of at least so many bytes."""


def path_of(directory: Path, envelope: Envelope) -> Path:
    """Return where a body lies in its run's directory: by its whole digest, so that no two bodies ever share a file."""
    _, round_, attempt, node = envelope.address
    return directory / f"{round_}-{attempt}-{node}-{envelope.digest}.safetensors"


def mapped(path: Path) -> memoryview:
    """Return a body's bytes, as `contents` does.

    Raises:
        LogError: the file is gone or can't be mapped.
    """
    try:
        return contents(path)
    except (OSError, ValueError) as error:
        raise LogError(f"{path}: a body is missing from the log ({error})") from error


def check_size(envelope: Envelope, body: Sequence[Buffer] | Path) -> None:
    """Check, before any of it is sent, that a body is as long as its envelope says.

    Raises:
        RefusedError: it isn't, or its file can't be read.
    """
    try:
        size = body.stat().st_size if isinstance(body, Path) else sum(memoryview(part).nbytes for part in body)
    except OSError as error:
        raise RefusedError(f"{body}: the update can't be read ({error.strerror})") from error
    if size != envelope.size:
        raise RefusedError(f"the body isn't what its envelope says: it has {size} bytes instead of {envelope.size}")


class Index:
    """A file of lines: each counts once it is on disk whole. A last line that a crash left half is cut off.

    Args:
        path: of the file; made when missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        self.lines = [line for line in self._file.read().splitlines(keepends=True) if line.endswith(b"\n")]
        self.count, self._length = len(self.lines), sum(map(len, self.lines))
        self._file.truncate(self._length)
        self._torn = False

    def append(self, lines: Sequence[bytes]) -> None:
        """Write lines and sync them, after the names of the files they speak of; all of them count, or none."""
        sync_directory(self.path.parent)
        if self._torn:  # by a write that failed half-way
            self._file.truncate(self._length)
        text = b"".join(line + b"\n" for line in lines)
        self._torn = True
        write_all(self._file, text)
        os.fsync(self._file.fileno())
        self._torn = False
        self.count, self._length = self.count + len(lines), self._length + len(text)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


class Incoming:
    """Bytes on their way into a file: hashed as they are written, in a worker thread.

    Args:
        path: of the file.
        start: how many bytes of it are there already and stay.

    Raises:
        UnreachableError: there are fewer: where it goes on, the sender has to ask again.
    """

    def __init__(self, path: Path, start: int) -> None:
        if start and not path.exists():
            raise UnreachableError(f"the upload goes on at byte {start}, but only 0 are here")
        if not start:
            path.unlink(missing_ok=True)  # what was there may be mapped: who reads a map of a file that is cut dies of it
        self._path, self._file = path, path.open("r+b" if start else "w+b", buffering=0)
        self._sha = hashlib.sha256()
        self._busy = threading.Lock()
        self.size = 0
        while self.size < start and (piece := self._file.read(min(_READ, start - self.size))):
            self._sha.update(piece)
            self.size += len(piece)
        if self.size < start:
            self._file.close()
            raise UnreachableError(f"the upload goes on at byte {start}, but only {self.size} are here")
        self._file.truncate()

    @property
    def digest(self) -> str:
        """The SHA-256 of all that is there, as hex."""
        return self._sha.hexdigest()

    def write(self, lump: Sequence[bytes]) -> None:
        """Write and hash what came."""
        with self._busy:
            for chunk in lump:
                self._sha.update(chunk)
                self.size += len(chunk)
                write_all(self._file, chunk)

    async def pour(self, chunks: AsyncIterator[bytes], most: int, progress: Progress | None = None) -> None:
        """Take in what comes, in lumps, up to a little over `most` bytes in all; what came before an error is kept."""
        lump: list[bytes] = []
        waiting = 0
        try:
            async for chunk in chunks:
                lump.append(chunk)
                waiting += len(chunk)
                if waiting >= _COALESCE:
                    full, lump, waiting = lump, [], 0
                    await asyncio.to_thread(self.write, full)
                    if progress:
                        progress(self.size)
                if self.size + waiting > most:
                    break
        except Exception:
            self.write(lump)  # a connection that broke
            raise
        await asyncio.to_thread(self.write, lump)

    def sync(self) -> None:
        """Make the file durable."""
        try:
            os.fsync(self._file.fileno())
        except OSError:
            self._path.unlink(missing_ok=True)  # its pages count as clean now: only writing anew can make them durable
            raise

    def close(self) -> None:
        """Let go of the file."""
        with self._busy:  # a cancelled upload may still be writing: its descriptor mustn't become another file's
            self._file.close()
