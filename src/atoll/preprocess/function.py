"""Rows from a function of the data's owner: called on the owner's own machine, because the owner named it there."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from atoll.errors import AtollError, DataError
from atoll.plan import Plan
from atoll.preprocess.arrays import check
from atoll.preprocess.batch import Batch, Block, Column, Source
from atoll.preprocess.table import coded, place, used

PREFIX = "python:"
_END = object()
_GIVES = (
    "it returns arrays (x, y) or (x, y, x_test, y_test), Rows, Data or a path, "
    "or yields batches (x, y), (x, y, test) or {column: values}"
)


def called(function: str | Callable[[], Any]) -> tuple[Any, str]:
    """Return what a function gives, and its name.

    Args:
        function: the function, or "python:package.module:function".

    Raises:
        DataError: there is none of that name, or it raises.
    """
    if not isinstance(function, str):
        where = getattr(function, "__qualname__", repr(function))
        return _tried(function, where), where
    module, _, name = function.removeprefix(PREFIX).partition(":")
    try:
        found = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"{function}: can't be imported ({error}); write {PREFIX}package.module:function, and put its folder on PYTHONPATH"
        ) from error
    if not callable(found):
        raise DataError(f"{function}: is {type(found).__name__}, no function; {_GIVES}")
    return _tried(found, function), function


def source(given: Any, plan: Plan, where: str) -> Source:
    """Return what a function yields, batch by batch.

    Raises:
        DataError: it gives something else, or a batch that doesn't fit the plan; when it is read.
    """
    if hasattr(given, "keys"):
        given = [given]
    if not isinstance(given, Iterable) or isinstance(given, bytes):
        raise DataError(f"{where}: gave {type(given).__name__}; {_GIVES}")
    return Source(where, lambda: _blocks(iter(given), plan, where))


def _blocks(batches: Iterator[Any], plan: Plan, where: str) -> Generator[Block, None, None]:
    row, number = 1, 0
    while (batch := _tried(lambda: next(batches, _END), where)) is not _END:
        number += 1
        block = _block(batch, plan, f"{where}: batch {number}", range(row, 1 << 62))
        row += block.read
        yield block


def _block(batch: Any, plan: Plan, where: str, places: range) -> Block:
    if hasattr(batch, "keys"):
        columns = {name: _column(batch[name]) for name in used(plan.data, where) if place(where, list(batch.keys()), name) >= 0}
        sizes = {name: len(column) for name, column in columns.items()}
        rows = next(iter(sizes.values()))
        if other := [name for name, size in sizes.items() if size != rows]:
            raise DataError(f"{where}: column '{other[0]}' has {sizes[other[0]]} values, column '{next(iter(sizes))}' {rows}")
        return coded(Batch(columns, places[:rows], f"{where}, row"), plan.data)
    if not isinstance(batch, tuple) or len(batch) not in (2, 3):
        raise DataError(f"{where}: is {type(batch).__name__}; {_GIVES}")
    x, y = np.asarray(batch[0]), np.asarray(batch[1])
    check(x, y, plan, where)
    test = np.asarray(batch[2], np.bool_) if len(batch) == 3 else np.zeros(len(y), np.bool_)
    if test.shape != y.shape:
        raise DataError(f"{where}: test has shape {test.shape}; it says True or False for each of {len(y)} rows")
    return Block(x, y, test, len(y))


def _column(values: Any) -> Column:
    array = values if isinstance(values, np.ma.MaskedArray) else np.asarray(values)
    return array if array.dtype.kind in "fiub" else list(array.tolist())


def _tried(act: Callable[[], Any], where: str) -> Any:
    try:
        return act()
    except AtollError:
        raise
    except Exception as error:  # whatever the owner's own code raises
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())
        raise DataError(
            f"{where}: raised {type(error).__name__}: {said} ({Path(last.filename).name}, line {last.lineno})"
        ) from error
