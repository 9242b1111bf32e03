"""Columns as numbers: picked in the plan's order, categories coded, rows with missing values left out, or kept with NaN."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.columns import Columns
from atoll.errors import DataError
from atoll.preprocess.batch import Batch, Block, Column, rows_for
from atoll.preprocess.text import foretold, hashed, spelled
from atoll.sections import Value

_SIDES = ("train", "test")


def used(columns: Columns, where: str) -> tuple[str, ...]:
    """Return the names of the columns that a table must have: the features in the plan's order, the target, the split.

    Raises:
        DataError: the plan names none.
    """
    if columns.features is None or columns.target is None:
        raise DataError(f"{where}: the plan names no data.features: give arrays, or name features and target")
    return (*columns.features, columns.target, *([columns.split] if columns.split else []))


def place(where: str, header: Sequence[str], name: str) -> int:
    """Return where a column stands among others.

    Raises:
        DataError: it isn't there; with the nearest name.
    """
    if name in header:
        return list(header).index(name)
    close = difflib.get_close_matches(name, header, 1, 0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(header[:20])}"
    raise DataError(f"{where}: has no column '{name}'; {hint}")


def blocks_of(batches: Generator[Batch, None, None], columns: Columns) -> Generator[Block]:
    """Yield the rows of each batch as numbers, fewer at a time where a row becomes many (text); see `coded`."""
    step = rows_for(columns.width or 1)
    with contextlib.closing(batches):  # whoever stops early lets go of files and connections at once
        for batch in batches:
            for lo in range(0, len(batch.places), step):
                part = {name: column[lo : lo + step] for name, column in batch.columns.items()}
                yield coded(Batch(part, batch.places[lo : lo + step], batch.where), columns)


def coded(batch: Batch, columns: Columns) -> Block:
    """Return the rows of a batch as numbers: features in the plan's order, and the target.

    Raises:
        DataError: a value that is no number, no category, neither train nor test; with its row and column.
    """
    test = _sides(batch, columns)
    features, target = columns.features or (), columns.target or ""
    gaps = {name: _missing(batch.columns[name], columns.missing) for name in features}
    left_out = _missing(batch.columns[target], columns.missing)
    if columns.incomplete == "drop":
        left_out = np.logical_or.reduce([left_out, *gaps.values()])
    kept = _without(batch, left_out)
    parts = [_feature(kept, name, gap[~left_out], columns) for name, gap in gaps.items()]
    return Block(np.column_stack(parts), _target(kept, target, columns), test[~left_out], len(test))


def _feature(batch: Batch, name: str, gap: NDArray[np.bool_], columns: Columns) -> NDArray[Any]:
    """Return a feature as columns of numbers, NaN in all of them where it has a gap."""
    if gap.any():
        filled = np.full((len(gap), columns.widths[name]), np.nan)
        if not gap.all():
            filled[~gap] = _feature(_without(batch, gap), name, gap[~gap], columns).reshape(-1, filled.shape[1])
        return filled
    if name in columns.categories:
        return np.column_stack(_one_hot(batch, name, columns.categories[name]))
    if name in columns.words:
        return hashed(batch.columns[name], columns.words[name])
    if name in columns.characters:
        return spelled(batch.columns[name], columns.characters[name], columns.alphabet)
    return _numbers(batch, name)


def _target(kept: Batch, target: str, columns: Columns) -> NDArray[Any]:
    if columns.foretold:
        return foretold(kept.columns[target], columns.characters[target], columns.alphabet)
    return _numbers(kept, target) if columns.positive is None else _any_of(kept.columns[target], columns.positive)


def _sides(batch: Batch, columns: Columns) -> NDArray[np.bool_]:
    rows = len(batch.places)
    if columns.split is None:
        return np.zeros(rows, np.bool_)
    sides = list(batch.columns[columns.split])
    for row, side in enumerate(sides):
        if side not in _SIDES:
            raise DataError(f"{batch.at(row)}, column '{columns.split}': '{side}' is neither train nor test")
    return np.array([side == "test" for side in sides], np.bool_)


def _missing(column: Column, words: Sequence[str]) -> NDArray[np.bool_]:
    """Say where a column has no value; what is empty in its source is the empty word."""
    numbers = [number for word in words if (number := _as_number(word)) is not None]
    if not isinstance(column, np.ndarray):
        return np.array([_is_missing(value, words, numbers) for value in column], np.bool_)
    found = np.isin(np.ma.getdata(column), numbers, kind=None)
    if any(map(math.isnan, numbers)):
        found |= np.isnan(np.ma.getdata(column))
    empty = np.ma.getmaskarray(column)
    return (found & ~empty) | (empty if "" in words else False)


def _is_missing(value: Any, words: Sequence[str], numbers: Sequence[float]) -> bool:
    if value is None or isinstance(value, str):
        return (value or "") in words
    return any(value == number or (value != value and number != number) for number in numbers)  # noqa: PLR0124  NaN differs from itself


def _without(batch: Batch, left_out: NDArray[np.bool_]) -> Batch:
    if not left_out.any():
        return batch
    kept = np.flatnonzero(~left_out).tolist()

    def only(column: Column) -> Column:
        return column[kept] if isinstance(column, np.ndarray) else [column[row] for row in kept]

    columns = {name: only(column) for name, column in batch.columns.items()}
    return Batch(columns, [batch.places[row] for row in kept], batch.where)


def _numbers(batch: Batch, name: str) -> NDArray[np.float64]:
    column = batch.columns[name]
    if isinstance(column, np.ndarray):
        if np.ma.is_masked(column):
            raise _no_number(batch, int(np.argmax(np.ma.getmaskarray(column))), name, "")
        return _finite(np.ma.getdata(column).astype(np.float64), batch, name)
    try:
        return _finite(np.array([float(value) for value in column], np.float64), batch, name)
    except (TypeError, ValueError):
        row = next(row for row, value in enumerate(column) if _as_number(value) is None)
        raise _no_number(batch, row, name, column[row]) from None


def _finite(numbers: NDArray[np.float64], batch: Batch, name: str) -> NDArray[np.float64]:
    finite = np.isfinite(numbers)
    if not finite.all():
        row = int(np.argmin(finite))
        raise DataError(
            f"{batch.at(row)}, column '{name}': {numbers[row]} is no finite number; fill it, or put that word into data.missing"
        )
    return numbers


def _no_number(batch: Batch, row: int, name: str, value: object) -> DataError:
    said = "" if value is None else value
    return DataError(
        f"{batch.at(row)}, column '{name}': '{said}' is no number; a word for a missing value belongs in data.missing"
    )


def _one_hot(batch: Batch, name: str, kinds: Sequence[Value]) -> list[NDArray[np.float64]]:
    """Return a column of 0 and 1 for each kind but the first."""
    column = batch.columns[name]
    found = [_any_of(column, (kind,)) for kind in kinds]
    none = np.sum(found, axis=0) == 0
    if none.any():
        row = int(np.argmax(none))
        value = "" if column[row] is None or column[row] is np.ma.masked else column[row]
        raise DataError(f"{batch.at(row)}, column '{name}': '{value}' is not in categories.{name} = {list(kinds)}")
    return found[1:]


def _any_of(column: Column, kinds: Sequence[Value]) -> NDArray[np.float64]:
    """Say by 1 or 0 whether each value is one of these."""
    if isinstance(column, np.ndarray):
        numbers = [number for number in map(_as_number, kinds) if number is not None]
        return (np.isin(np.ma.getdata(column), numbers) & ~np.ma.getmaskarray(column)).astype(np.float64)
    known: dict[Any, float] = {}  # a column of categories has few different words
    for value in column:
        if value not in known:
            known[value] = float(any(_same(value, kind) for kind in kinds))
    return np.array([known[value] for value in column], np.float64)


def _same(value: Any, kind: Value) -> bool:
    """Compare as numbers where both are, so that 1.0 is 1."""
    if isinstance(kind, str) and isinstance(value, str):
        return value == kind
    number = _as_number(value)
    return number is not None and number == _as_number(kind)


def _as_number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
