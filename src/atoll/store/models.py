"""Model files: safetensors, known by the SHA-256 of their bytes, so that they never change."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

from atoll.durable import write_durably
from atoll.errors import StoreError, UnwritableError
from atoll.vector import Groups, Layouts
from atoll.wire import digest_of, pack, unpack


class Models:
    """A directory of models.

    Args:
        directory: made when missing.

    Raises:
        StoreError: it can't be made or written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{directory}: models can't be stored there ({error.strerror}); choose another --store") from error

    def put(self, groups: Groups, words: Mapping[str, str] | None = None) -> str:
        """Store a model, durably, and return its digest; one that is there already is not written again."""
        parts = pack(groups, words)
        path = self._at(digest := digest_of(parts))
        if not path.exists():
            try:
                write_durably(path, parts)
            except OSError as error:
                raise UnwritableError(f"{path}: the model can't be stored ({error.strerror}); free some space") from error
        return digest

    def path(self, digest: str) -> Path:
        """Return the file of a model.

        Raises:
            StoreError: there is none.
        """
        path = self._at(digest)
        if not (_named(digest) and path.is_file()):
            raise StoreError(f"{self.directory}: there is no model {digest[:64]}")
        return path

    def put_step(self, before: str, digest: str, step: Groups, words: Mapping[str, str]) -> None:
        """Store what leads from one model to another, durably; the step to the first of them has had its time."""
        path = self.directory / f"{before}-{digest}.step"
        try:
            write_durably(path, pack(step, words))
            for old in self.directory.glob(f"*-{before}.step"):
                old.unlink(missing_ok=True)
        except OSError as error:
            raise UnwritableError(f"{path}: the step to a model can't be stored ({error.strerror}); free some space") from error

    def step(self, before: str, digest: str) -> Path | None:
        """Return the file of the step from one model to another, if there is one."""
        path = self.directory / f"{before}-{digest}.step"
        return path if _named(before) and _named(digest) and path.is_file() else None

    def steps(self) -> list[tuple[str, Path]]:
        """Return the steps that are there: the digest of the model that each leads to, and its file."""
        return [(path.stem.rpartition("-")[2], path) for path in self.directory.glob("*.step")]

    def get(self, digest: str, layouts: Layouts) -> Groups:
        """Return a model as views into its file, which cost no memory until they are read.

        Raises:
            StoreError: there is none.
            WireError, LayoutError: the file is damaged, or holds other groups.
        """
        with self.path(digest).open("rb") as file:
            return unpack(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), layouts)[0]

    def has(self, *digests: str) -> bool:
        """Say whether all of these are there."""
        return all(self._at(digest).is_file() for digest in digests)

    def files(self) -> dict[str, Path]:
        """Return the file of every model that is there, by digest."""
        return {path.stem: path for path in self.directory.glob("*.safetensors")}

    def _at(self, digest: str) -> Path:
        return self.directory / f"{digest}.safetensors"


def _named(digest: str) -> bool:
    """Say whether this can be a model's name: anybody may ask for anything, and other letters make names too long for a file."""
    return digest.isascii() and digest.isalnum() and len(digest) <= 64
