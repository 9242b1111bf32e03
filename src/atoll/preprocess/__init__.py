"""From what a node holds to rows a model takes, as the plan's `[data]` says.

Enters: files, a folder, a database's address, a function, or arrays. Leaves: `Data`. Rank 2: knows plans and
learners' rows; imported by the runtimes and the command line.

    source ─▶ batches of columns ─ coded ─▶ blocks of numbers ─ gathered ─▶ Data
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from atoll.errors import DataError
from atoll.learner import Data
from atoll.plan import Plan
from atoll.preprocess import arrays, function
from atoll.preprocess.batch import DroppedError, Source
from atoll.preprocess.gather import Progress, described, gathered

__all__ = ["Given", "Pause", "Progress", "Query", "described", "prepare"]

Given = str | Path | Sequence[Any] | Callable[[], Any]
"""What `prepare` takes, and so a node."""
Pause = Callable[[float, str], None]
"""Called with seconds to wait, and why."""
_PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds between tries to read a source that broke off."""


class Query(NamedTuple):
    """What to ask a database for.

    Args:
        address: of the database, a SQLAlchemy URL.
        select: one SELECT, whose columns have the names that the plan uses.
    """

    address: str
    select: str


def _silent(what: str, through: int, rows: int | None) -> None:
    del what, through, rows


def _sleep(seconds: float, why: str) -> None:
    del why
    time.sleep(seconds)


def prepare(
    source: Given,
    plan: Plan,
    *,
    spool: Path | None = None,
    progress: Progress = _silent,
    pause: Pause = _sleep,
) -> Data:
    """Return the rows behind a node's source of data.

    Args:
        source: a CSV, Parquet or `.npz` file; a folder of CSV or Parquet files, or of pictures where the plan has
            `data.image`; a `Query` of a database; arrays `(x, y)` or `(x, y, x_test, y_test)`; `Data`, which is taken as it
            is; or a function, or "python:package.module:function", that gives one of these or yields batches.
        plan: whose `[data]` says what to make of it.
        spool: a directory of its own, made anew, for rows of more than 128 MB: they are float32 there, and mapped. The
            caller removes it.
        progress: told how far reading is.
        pause: waits before a source that broke off is read again.

    Raises:
        DataError: one line with the place and the mend.
    """
    given, where = function.called(source) if _is_function(source) else (source, "")
    if isinstance(given, Data):
        return given
    opened = function.source(given, plan, where) if where and not _is_plain(given) else _open(given, plan)
    for seconds in _PAUSES:
        try:
            return gathered(opened, plan, progress, spool)
        except DroppedError as error:
            pause(seconds, f"{error}; trying again")
    try:
        return gathered(opened, plan, progress, spool)
    except DroppedError as error:
        raise DataError(f"{error}; it was tried {len(_PAUSES) + 1} times") from None


def _is_function(source: Given) -> TypeGuard[str | Callable[[], Any]]:
    return callable(source) or (isinstance(source, str) and source.startswith(function.PREFIX))


def _is_plain(given: Any) -> bool:
    """Say whether a function gave a source of its own, and not batches."""
    return isinstance(given, (str, Path)) or (isinstance(given, tuple) and len(tuple(given)) in (2, 4))


def _open(source: Any, plan: Plan) -> Source:
    if isinstance(source, str) and "://" in source:
        source = Query(source, "")
    if isinstance(source, Query) and "://" in source.address:
        from atoll.preprocess import database

        return database.source(source.address, source.select, plan)
    if isinstance(source, Query):
        raise DataError("--query: is for a database: give its address with --data, for instance sqlite:///file.db")
    if not isinstance(source, (str, Path)):
        return arrays.source(source, plan)
    path = Path(source)
    if plan.data.image and path.is_dir():
        pictures: Source = _extra("images", "PIL", path).source(path, plan)
        return pictures
    kind, files = _files(path)
    if kind == "npz":
        from atoll.preprocess import npz

        return npz.source(path, plan)
    if kind == "parquet":
        reader: Source = _extra("parquet", "pyarrow", path).source(files, plan)
        return reader
    from atoll.preprocess import csvs

    return csvs.source(files, plan)


def _files(path: Path) -> tuple[str, list[Path]]:
    """Return what kind of files these are, and which: the file itself, or those in a folder, in the order of their names."""
    if not path.is_dir():
        return {".parquet": "parquet", ".pq": "parquet", ".npz": "npz"}.get(path.suffix.lower(), "csv"), [path]
    found = {kind: sorted(path.rglob(f"*.{kind}")) for kind in ("parquet", "csv")}
    kinds = [kind for kind, files in found.items() if files]
    if len(kinds) != 1:
        what = (
            "both .parquet and .csv files: keep one kind"
            if kinds
            else "neither .parquet nor .csv files (pictures need data.image in the plan)"
        )
        raise DataError(f"{path}: this folder holds {what}")
    return kinds[0], found[kinds[0]]


def _extra(kind: str, library: str, path: Path) -> Any:
    """Return the module that reads a kind of files by a library that the core has not."""
    try:
        return import_module(f"atoll.preprocess.{kind}")
    except ModuleNotFoundError as error:
        if error.name != library and not str(error.name).startswith(f"{library}."):
            raise
        raise DataError(f'{path}: {library} is not installed; pip install "atoll-fl[{kind}]"') from None
