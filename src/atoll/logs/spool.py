"""Bodies cut into pieces, and put together again in files: in any order, doubled, between those of others.

What a log of messages needs, whatever carries them. The messages are the durable copy: files here are never synced.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atoll.durable import write_all
from atoll.errors import LogError
from atoll.logs import LATE, PIECE, Record
from atoll.logs.bodies import mapped, path_of
from atoll.wire import Address, Buffer, Envelope


def parts_of(envelope: Envelope) -> int:
    """Return how many pieces a body has: at least one."""
    return max(1, -(-envelope.size // PIECE))


def whole(parts: Iterable[Buffer]) -> Iterator[bytes]:
    """Join buffers to whole pieces: only the last is shorter."""
    held = bytearray()
    for part in parts:
        if not held and len(part) == PIECE:
            yield bytes(part)
            continue
        held += part
        while len(held) >= PIECE:
            yield bytes(memoryview(held)[:PIECE])
            held = held[PIECE:]
    if held:
        yield bytes(held)


class Spool:
    """The bodies of a run that are complete, on their way, or refused.

    Args:
        directory: the run's own.
        limit: the longest body, in bytes.

    Raises:
        LogError: the directory can't be used.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory, self._limit = directory, limit
        self._halves: dict[tuple[Address, str], _Half] = {}
        self._complete: dict[Address, str] = {}
        self._files: dict[Path, Address] = {}
        self._refused: set[tuple[Address, str]] = set()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LogError(f"{directory}: updates can't be spooled there ({error.strerror})") from error

    def get(self, envelope: Envelope) -> memoryview:
        """Return the bytes of a complete body, mapped; see `Reader.body`."""
        if self._complete.get(envelope.address) != envelope.digest:
            raise LogError(f"the log holds no update {envelope.digest[:12]} of round {envelope.address.round}")
        return mapped(path_of(self._directory, envelope))

    def arriving(self) -> dict[Address, tuple[int, int]]:
        """Return the bodies that are on their way; see `Reader.arriving`. May be asked from any thread."""
        halves = list(self._halves.values())
        return {one.envelope.address: (min(len(one.there) * PIECE, one.envelope.size), one.envelope.size) for one in halves}

    def forget(self, round_: int, keep: Collection[Address] = ()) -> None:
        """Remove the files of complete bodies up to a round: soon enough, the disk never sees them."""
        for path, address in list(self._files.items()):
            if address.round <= round_ and address not in keep:
                with contextlib.suppress(OSError):  # where a mapped file can't be removed, the next time
                    path.unlink(missing_ok=True)
                    del self._files[path]
        old = round_ - LATE
        for address in [one for one in list(self._complete) if one.round <= old and one not in keep]:
            del self._complete[address]
        for key in [one for one in [*self._halves, *self._refused] if one[0].round <= old and one[0] not in keep]:
            self._refused.discard(key)
            if half := self._halves.pop(key, None):
                path_of(self._directory, half.envelope).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove what is here: the log itself has it all."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def take(self, envelope: Envelope, part: int, piece: bytes, position: str) -> Record | None:
        """Put a piece in its place; return the record that it makes: of a complete body, or of one that can't count.

        Raises:
            WireError: its envelope isn't signed by the node it names: anybody may have written it.
            OSError: it can't be written; the same call may go through later.
        """
        key = envelope.address, envelope.digest
        if key in self._refused or self._complete.get(envelope.address) == envelope.digest:
            return None
        half = self._halves.get(key)
        if half is None or half.envelope != envelope:
            envelope.verify()
            half = half or _Half(envelope)
        reason = self._unfit(envelope) or half.misfit(envelope, part, piece)
        path = path_of(self._directory, envelope)
        if reason is None:
            self._halves[key] = half
            half.put(path, part, piece)
            if len(half.there) < parts_of(envelope):
                return None
            if half.digest(path) == envelope.digest:
                self._complete[envelope.address] = envelope.digest
                self._files[path] = envelope.address
            else:
                reason = "the body isn't what its envelope says: size or digest differ"
        if reason:
            path.unlink(missing_ok=True)
            self._refused.add(key)
        self._halves.pop(key, None)
        return Record(envelope, position, reason)

    def _unfit(self, envelope: Envelope) -> str | None:
        """Say why a body can't be taken in, whatever its bytes are."""
        if envelope.address in self._complete:
            return "another update is already in the log under this address: the first complete one counts"
        if envelope.size > self._limit:
            return f"the update has {envelope.size} bytes, the limit is {self._limit}"
        return None


@dataclass
class _Half:
    """A body of which some pieces are there; hashed as they come for as long as they come in order."""

    envelope: Envelope
    there: set[int] = field(default_factory=set)
    sha: Any = field(default_factory=hashlib.sha256)
    hashed: int = 0

    def misfit(self, envelope: Envelope, part: int, piece: bytes) -> str | None:
        """Say why a piece can't be one of this body."""
        parts = parts_of(self.envelope)
        length = PIECE if part < parts - 1 else self.envelope.size - (parts - 1) * PIECE
        if 0 <= part < parts and len(piece) == length and envelope.size == self.envelope.size:
            return None
        return f"part {part} of {parts} has {len(piece)} bytes: the pieces don't fit the envelope"

    def put(self, path: Path, part: int, piece: bytes) -> None:
        """Write a piece; one that is there already stays as it is."""
        if part in self.there:
            return
        if not self.there:
            path.unlink(missing_ok=True)  # what an earlier reader put together may still be mapped
        with path.open("r+b" if self.there else "w+b", buffering=0) as file:
            if not self.there:
                file.truncate(self.envelope.size)  # once: a file that grows by every write waits for the broker's syncs
            file.seek(part * PIECE)
            write_all(file, piece)
        self.there.add(part)
        if part == self.hashed:
            self.sha.update(piece)
            self.hashed += 1

    def digest(self, path: Path) -> str:
        """Return the digest of all pieces together."""
        if self.hashed == parts_of(self.envelope):
            return str(self.sha.hexdigest())
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
