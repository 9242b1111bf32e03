"""What a store keeps, and for how long: nothing goes that the replay of a kept run needs.

A run can go whole (its updates and models; the history stays), or be thinned: of its models only the initial, the best
and the last stay, with the last state, since the updates in the log give every other one again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from atoll.errors import StoreError
from atoll.server.quarantine import PLACE
from atoll.store import RunRow
from atoll.store.models import Models
from atoll.store.sql import SqlStore

_PLACES = ("log", "sums", PLACE)
"""Where runs keep updates: those in the log, and those that were refused, each run in a directory of its name."""
_SETTLED = 3600.0
"""Seconds after which a file that no run names is nobody's: before, it may be one that is just being made."""


class Use(NamedTuple):
    """A run, and the bytes that it takes; a model that several runs share counts for each."""

    row: RunRow
    models: int
    updates: int


def uses(directory: Path, store: SqlStore) -> list[Use]:
    """Return what each run takes, the newest first."""
    files = {digest: _size(path) for digest, path in Models(directory / "models").files().items()}
    return [
        Use(
            row,
            sum(files.get(digest, 0) for digest in _named(store, row)),
            sum(_size(directory / place / row.run) for place in _PLACES),
        )
        for row in store.runs()
    ]


def held(directory: Path) -> int:
    """Return how many bytes the models and updates of a store take, refused ones too."""
    return sum(_size(directory / place) for place in ("models", *_PLACES))


def prune(
    directory: Path,
    store: SqlStore,
    gone: Collection[str] = (),
    thinned: Collection[str] = (),
    *,
    dry: bool = False,
) -> int:
    """Remove the files of runs, and those that no run names; return how many bytes that gives back.

    Args:
        directory: of the store.
        store: its history, which stays.
        gone: the runs whose updates and models all go.
        thinned: the runs whose models go that can be had again from their updates.
        dry: only count.

    Raises:
        StoreError: the history or the files can't be written.
    """
    if dry:
        return sum(_size(path) for path in _spare(directory, store, gone, thinned))
    with store.pruning(gone, time.time()):
        return sum(_remove(path) for path in _spare(directory, store, gone, thinned))


def _spare(directory: Path, store: SqlStore, gone: Collection[str], thinned: Collection[str]) -> Iterator[Path]:
    """Yield the files and directories that nothing needs."""
    runs = store.runs()
    kept = [row for row in runs if row.run not in gone and row.pruned is None]
    named = {row.run: _named(store, row) for row in runs}
    needed = {digest for row in kept for digest in (_ends(store, row) if row.run in thinned else named[row.run])}
    dropped = {digest for digests in named.values() for digest in digests}
    models = Models(directory / "models")
    for digest, path in [*models.files().items(), *models.steps()]:
        if digest not in needed and (digest in dropped or _settled(path)):
            yield path
    # A run's directory is older than its row; a draft is on its way to become a model.
    known, mine = {row.run for row in runs}, {row.run for row in kept}
    for path in [*(path for place in _PLACES for path in _inside(directory / place)), *(directory / "models").glob(".*")]:
        if path.name not in mine and (path.name in known or _settled(path)):
            yield path


def _named(store: SqlStore, row: RunRow) -> set[str]:
    """All models and states of a run, and what the server itself trained."""
    made = (digest for one in store.rounds(row.run) for digest in (one.model, one.state, one.reference) if digest)
    return {row.initial, *made}


def _ends(store: SqlStore, row: RunRow) -> set[str]:
    """The models that people ask for, or nodes at work; the state that it goes on from; what a replay can't make again."""
    found, rounds = store.history(row.run), store.rounds(row.run)
    opened = (row.outcome != "completed" and row.opened) or {}
    asked = {opened.get("round"), *(round_ for round_, _ in opened.get("late", {}).values())}
    started = (one.model for one in rounds if one.round + 1 in asked)
    trained = (one.reference for one in rounds)
    last = (one.state for one in rounds[-1:])
    return {row.initial, *started, *last, *filter(None, (found["best"], found["last"], *trained))}


class Quota:
    """Keeps a store's models and updates under a limit: first by thinning, the oldest run first, then by taking in nothing more.

    Args:
        directory: of the store.
        store: its history.
        limit: in bytes; None: no limit.
    """

    def __init__(self, directory: Path, store: SqlStore, limit: int | None) -> None:
        self._directory, self._store, self._limit = directory, store, limit
        self._used = 0

    def recount(self, coming: int = 0) -> None:
        """Count what is there, and make room for so many bytes as far as models allow that can be had again.

        Raises:
            StoreError: see `prune`.
        """
        if self._limit is None:
            return
        self._used = held(self._directory)
        for row in reversed(self._store.runs()):
            if self._used + coming <= self._limit:
                return
            if row.pruned is None:
                self._used -= prune(self._directory, self._store, thinned=[row.run])

    def room(self, size: int) -> str | None:
        """Take so many bytes, or say why they can't be."""
        if self._limit is not None and self._used + size > self._limit:
            return (
                f"the store's quota of {self._limit / 1e9:.3g} GB is used up: "
                f"`atoll prune RUN --store {self._directory}` lets runs go"
            )
        self._used += size
        return None


def _inside(directory: Path) -> Iterable[Path]:
    return directory.iterdir() if directory.is_dir() else ()


def _settled(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > _SETTLED


def _size(path: Path) -> int:
    try:
        return sum(_size(one) for one in path.iterdir()) if path.is_dir() else path.stat().st_size
    except FileNotFoundError:  # a draft that became a model meanwhile
        return 0


def _remove(path: Path) -> int:
    size = _size(path)
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{path}: can't be removed ({error.strerror})") from error
    return size
