"""Blocks as a node's rows: joined, checked, standardised by its own training rows."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.errors import DataError
from atoll.learner import Data, Rows
from atoll.plan import Plan
from atoll.preprocess.batch import Block, Source
from atoll.preprocess.spool import TINY, spooled

MEMORY = 128 << 20
"""Rows of more bytes than this are kept on disk, where there is a place for them."""

_ROWS = 1 << 20
_CLASSES = 100
"""More different targets than this are no classes."""

Progress = Callable[[str, int, int | None], None]
"""Called with `reading` or `standardising`, through how many rows that is, and how many there are, where that is known."""


def gathered(source: Source, plan: Plan, progress: Progress, spool: Path | None = None) -> Data:
    """Return the rows of a source: in memory, or where they are many as maps of files.

    Args:
        source: where they come from.
        plan: which says whether they are standardised.
        progress: told how far reading is.
        spool: a directory for rows of more than `MEMORY` bytes; without it all are kept in memory.

    Raises:
        DataError: nothing is left, nothing is left to train on, a value isn't finite, or the disk is too small.
    """
    blocks: list[Block] = []
    with contextlib.closing(told(source, progress, gaps=plan.data.incomplete == "keep")) as coming:
        size = 0
        for block in coming:
            blocks.append(block)
            size += block.x.nbytes
            expected = size if len(blocks) > 1 or not source.rows else size // max(1, len(block.y)) * source.rows
            if spool and expected > MEMORY:
                standardising = partial(progress, "standardising") if plan.data.standardise == "node" else None
                data = spooled(_popped(blocks, coming), source, spool, standardising)
                if not len(data.train):
                    raise no_training(source.where)
                return data
    return _joined(blocks, source, plan)


def _popped(blocks: list[Block], coming: Iterable[Block]) -> Iterator[Block]:
    """Yield the blocks that are here, letting go of each, and then those that come."""
    while blocks:
        yield blocks.pop(0)
    yield from coming


def _joined(blocks: list[Block], source: Source, plan: Plan) -> Data:
    if not sum(len(block.y) for block in blocks):
        raise nothing_left(source.where, sum(block.read for block in blocks), plan)
    train, test = _side(blocks, test=False), _side(blocks, test=True)
    if not len(train):
        raise no_training(source.where)
    if plan.data.standardise == "node":
        train, test = (Rows(standardised(rows.x, train.x, source.where), rows.y) for rows in (train, test))
    if plan.model.kind == "keras":
        train, test = (Rows(rows.x.astype(np.float32), rows.y) if rows.x.dtype == np.float64 else rows for rows in (train, test))
    return Data(train, test)


def _side(blocks: list[Block], *, test: bool) -> Rows:
    """Return the rows to train on, or those for testing: arrays that were given whole, and may be mapped, as they are."""
    parts = []
    for block in blocks:
        mine = block.test == test
        parts.append((block.x, block.y) if mine.all() else (block.x[mine], block.y[mine]))
    filled = [part for part in parts if len(part[1])] or parts[:1]
    return Rows(_whole([x for x, _ in filled]), _whole([y for _, y in filled]))


def described(data: Data) -> dict[str, Any]:
    """Say how many rows there are, of which shape, and how many of each class, where the target has few whole values.

    >>> rows = Rows(np.zeros((3, 2)), np.array([0.0, 1.0, 1.0]))
    >>> described(Data(rows, Rows(rows.x[:0], rows.y[:0])))
    {'train': 3, 'test': 0, 'shape': [2], 'classes': {'0': 1, '1': 2}}
    """
    classes: Counter[float] = Counter()
    if data.train.y.ndim > 1:
        return _shape(data, {})
    for y in (data.train.y, data.test.y):
        for lo in range(0, len(y), _ROWS):
            values, counts = np.unique(y[lo : lo + _ROWS], return_counts=True)
            classes.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            if len(classes) > _CLASSES or (values != np.floor(values)).any():
                return _shape(data, {})
    return _shape(data, {f"{value:.0f}": classes[value] for value in sorted(classes)})


def _shape(data: Data, classes: dict[str, int]) -> dict[str, Any]:
    return {"train": len(data.train), "test": len(data.test), "shape": list(data.train.x.shape[1:]), "classes": classes}


def told(source: Source, progress: Progress, *, gaps: bool) -> Generator[Block, None, None]:
    """Yield a source's blocks, and say after each how far it is read; with `gaps` a feature may be NaN."""
    read = 0
    progress("reading", 0, source.rows)
    with contextlib.closing(source.blocks()) as blocks:
        for block in blocks:
            read += block.read
            progress("reading", read, source.rows)
            if not (_finite(block.x, gaps=gaps) and _finite(block.y)):
                raise DataError(f"{source.where}: holds {'' if gaps else 'NaN or '}infinity; drop or fill these rows")
            yield block


def _finite(values: NDArray[Any], *, gaps: bool = False) -> bool:
    """Say whether all numbers are finite, or with `gaps` NaN; some rows at a time, since they may be mapped."""
    step = max(1, _ROWS // max(1, values[:1].size))
    parts = (values[lo : lo + step] for lo in range(0, len(values), step))
    return not any((np.isinf(part) if gaps else ~np.isfinite(part)).any() for part in parts)


def _whole(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def standardised(x: NDArray[Any], by: NDArray[Any], where: str) -> NDArray[np.float64]:
    """Shift and scale columns by the mean and sample deviation (ddof 1) of the rows `by`."""
    if len(by) < 2:
        raise DataError(f"{where}: data.standardise: a node needs at least two training rows for a deviation")
    scaled: NDArray[np.float64] = (x - by.mean(axis=0)) / (by.std(axis=0, ddof=1) + TINY)
    return scaled


def nothing_left(where: str, read: int, plan: Plan) -> DataError:
    """Say why there are no rows."""
    if not read:
        return DataError(f"{where}: no rows are left: there are none in it")
    words = ", ".join(repr(word) for word in plan.data.missing)
    return DataError(f"{where}: no rows are left: all {read} have a missing value ({words}) in a used column")


def no_training(where: str) -> DataError:
    """Say that there is nothing to train on."""
    return DataError(f"{where}: no training rows: every row is for testing")
