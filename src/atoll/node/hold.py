"""One process at a time in a node's directory: two would drop each other's updates, and answer as one node with two secrets."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from atoll.errors import StoreError

_HELD = PermissionError if sys.platform == "win32" else BlockingIOError
"""What is raised where another process has the lock."""
_AT = 1 << 20
"""The byte that is locked: beyond all that is written, so that others can read who holds it where a lock forbids reading."""


class Hold:
    """A lock on a directory that ends with its process, however that ends.

    Args:
        directory: a node's own.
    """

    def __init__(self, directory: Path) -> None:
        self._path, self._handle = directory / "node.pid", -1

    def take(self) -> None:
        """Take hold of the directory.

        Raises:
            StoreError: another process has it, or nothing can be written there.
        """
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                _lock(handle)
                os.ftruncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
            except OSError:
                os.close(handle)
                raise
        except OSError as error:
            if isinstance(error, _HELD) and (pid := self._pid()):
                raise StoreError(
                    f"{self._path.parent}: the node of process {pid} is at work there; stop it, or choose another --dir"
                ) from error
            raise StoreError(f"{self._path}: can't be locked ({error.strerror}); choose another --dir") from error
        self._handle = handle

    def leave(self) -> None:
        """Let go of it."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _pid(self) -> str:
        try:
            return self._path.read_text().strip()
        except (OSError, ValueError):
            return ""


def _lock(handle: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, _AT, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
