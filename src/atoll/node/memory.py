"""What an algorithm remembers on a node: one durable file for each update that may yet count, and for the last one that did."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from atoll.algorithms import Memory
from atoll.durable import write_durably
from atoll.errors import AtollError, StoreError, UnwritableError
from atoll.wire import pack_whole, unpack_whole


class Memories:
    """A directory of what came of each update, known by the update's digest.

    A new memory is written before its update leaves, and the server names, with every task, the node's last update that
    counted. So no verdict needs to arrive, and it doesn't matter at which instant the node was killed: what goes with that
    update is on the disk, whether it is the newest or the one before.

    Args:
        directory: made when there is something to remember.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def recall(self, run: str, counted: str | None) -> Memory:
        """Return what goes with an update; nothing where nothing was remembered.

        Raises:
            StoreError: the file is damaged, or can't be read.
        """
        path = self._path(run, counted or "none")
        try:
            return unpack_whole(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (AtollError, OSError) as error:
            mend = "move the file away to begin anew"
            raise StoreError(f"{path}: what this node remembered can't be read ({error}); {mend}") from error

    def keep(self, run: str, digest: str, memory: Memory, counted: str | None) -> None:
        """Write down what goes with a new update; all but that and the last that counted is let go.

        Raises:
            UnwritableError: it can't be written at present.
        """
        if not memory:
            return
        path = self._path(run, digest)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, pack_whole(memory))
            for old in path.parent.iterdir():
                if old not in (path, self._path(run, counted or "none")):
                    old.unlink()
        except OSError as error:
            raise UnwritableError(f"{path}: what the node remembers can't be kept ({error.strerror}); free some space") from error

    def forget(self, run: str) -> None:
        """Let go of a run that is over."""
        with contextlib.suppress(OSError):
            shutil.rmtree(self._directory / run)

    def _path(self, run: str, digest: str) -> Path:
        return self._directory / run / f"{digest}.safetensors"
