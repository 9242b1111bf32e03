"""The update log: the durable, ordered channel that carries updates from nodes to the server.

Enters: sealed bodies at an `Appender` (the node's end). Leaves: `Record`s at a `Reader` (the server's
end), each once, in log order, complete and durable. May import ranks 0 and 1; imported by machines' runtimes.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from atoll.wire import Address, Buffer, Envelope

Progress = Callable[[int], None]
"""Called with how many bytes have gone so far."""


@dataclass(frozen=True)
class Record:
    """One complete, durable body, whose bytes have the digest and size that its envelope says.

    Args:
        envelope: which update it is; not yet verified against a node's key.
        position: where in the log it stands, as text that only the log understands.
        refused: why this body can't count (another digest is already under its address), or None.
    """

    envelope: Envelope
    position: str
    refused: str | None = None


class Appender(Protocol):
    """The node's end."""

    async def append(self, envelope: Envelope, body: Sequence[Buffer] | Path, progress: Progress | None = None) -> None:
        """Append a body; return only when it is durable. The same body again is no error and no second record.

        Args:
            envelope: the sealed envelope of the body.
            body: its buffers, or the file that holds it.
            progress: told how many bytes are through.

        Raises:
            RefusedError: another digest is under this address, the body is over the limit, or it isn't what the envelope says.
            UnreachableError: the log doesn't answer; the same call may go through later, from where it stopped.
        """
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


class Reader(Protocol):
    """The server's end."""

    @property
    def positions(self) -> str | None:
        """Where this run begins in a log that runs share, for another reader to take up all of it; None in a log of its own."""
        ...

    @property
    def waiting(self) -> str | None:
        """Why nothing can be read at present, in a few words for a person; None where all is well."""
        ...

    def follow(self, node: str) -> None:
        """Take up what this node appends, where a log keeps nodes apart; may take a moment, and be asked again.

        Raises:
            RefusedError: it has no place in the log.
            UnreachableError, LogError: its place can't be read.
        """
        ...

    def records(self) -> AsyncIterator[Record]:
        """Yield every record of this run, first those already there, then each as it becomes complete and durable."""
        ...

    def arriving(self) -> Mapping[Address, tuple[int, int]]:
        """Return the bodies that are on their way: bytes that are here, and bytes in all."""
        ...

    def body(self, envelope: Envelope) -> memoryview:
        """Return the bytes of a complete body: mapped from disk where it lies there, so that it costs no memory.

        Raises:
            LogError: the log holds no complete body for this envelope.
        """
        ...

    def forget(self, round_: int, keep: Collection[Address] = ()) -> None:
        """Let go of copies of bodies that are here up to a round, which is closed, and of all that is known of those before it.

        What the log itself holds stays. So does everything of the addresses to keep: these updates may come yet, or are here
        and count in a later round.
        """
        ...

    async def close(self) -> None:
        """Stop reading and let go of files and connections; `records` ends."""
        ...


LATE = 2
"""What is known of a round is forgotten when this many more are closed: until then its nodes may ask again."""
PIECE = 900 << 10
"""Bodies travel in pieces of this many bytes: under every default limit, and long enough to pay for their handling."""


def contents(path: Path) -> memoryview:
    """Return a file's bytes without reading them: pages come as they are looked at, and cost no anonymous memory."""
    with path.open("rb") as file:
        return memoryview(_map(file.fileno()) if path.stat().st_size else b"")


def _map(handle: int) -> mmap.mmap:
    # A round maps all of its bodies at once. Where Python allows it, none of them keeps a file descriptor.
    if sys.version_info >= (3, 13):
        return mmap.mmap(handle, 0, access=mmap.ACCESS_READ, trackfd=False)
    return mmap.mmap(handle, 0, access=mmap.ACCESS_READ)


def pieces(body: Sequence[Buffer] | Path, start: int = 0, length: int = PIECE) -> Iterator[Buffer]:
    """Cut a body, from byte `start` on, into pieces of at most `length` bytes; a file is mapped, not read and copied."""
    for part in [contents(body)] if isinstance(body, Path) else body:
        view = memoryview(part).cast("B")
        skipped = min(start, view.nbytes)
        start -= skipped
        for lo in range(skipped, view.nbytes, length):
            yield view[lo : lo + length]
