"""CSV files and arrays as rows: columns picked, categories coded, missing rows dropped, features standardised."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.errors import DataError
from atoll.learner import Data, Rows
from atoll.plan import Columns, Plan

_TINY = 1e-9
"""Added to every deviation: a constant column becomes 0, not a division by zero."""
_SIDES = ("train", "test")


def read(path: Path, plan: Plan) -> Data:
    """Return the rows of a CSV file.

    Raises:
        DataError: one line with file, line, column, and what would be right.
    """
    columns = plan.data
    if columns.features is None:
        raise DataError(f"{path}: the plan names no data.features: give arrays from Python, or name features and target")
    table: list[list[float]] = []
    sides: list[str] = []
    for line, words in _used(path, columns):
        picked, side = words
        if any(word in columns.missing for word in picked):
            continue
        table.append(_numbers(picked, columns, f"{path}: line {line}"))
        sides.append(side)
    if not table:
        raise DataError(
            f"{path}: no rows are left: every one has a missing value ({', '.join(columns.missing)}) in a used column"
        )
    values = np.array(table, np.float64)
    test = np.array(sides) == "test"
    return _data(values[:, :-1], values[:, -1], test, plan, str(path))


def from_arrays(source: Sequence[Any], plan: Plan) -> Data:
    """Return arrays `(x, y)` or `(x, y, x_test, y_test)` as rows; `x` has the rows' shape `[rows, …]`.

    Raises:
        DataError: they don't fit each other or the plan.
    """
    if len(source) not in (2, 4):
        raise DataError(f"data: {len(source)} arrays; give (x, y), or (x, y, x_test, y_test)")
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(source[::2], source[1::2], strict=True)]
    for x, y in pairs:
        if len(x) != len(y) or x.dtype.kind not in "fiub":
            raise DataError(
                f"data: x of shape {x.shape} ({x.dtype}) and y of shape {y.shape}: give as many rows of numbers as targets"
            )
    if plan.inputs is not None and pairs[0][0].shape[1:] != (plan.inputs,):
        raise DataError(f"data: rows of shape {pairs[0][0].shape[1:]}, the plan's model takes {plan.inputs} numbers")
    test = np.repeat([False, True][: len(pairs)], [len(x) for x, _ in pairs])
    x, y = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    return _data(x, y, test, plan, "data")


def _data(x: NDArray[Any], y: NDArray[Any], test: NDArray[np.bool_], plan: Plan, where: str) -> Data:
    if test.all():
        raise DataError(f"{where}: no training rows: every row is for testing")
    if not np.isfinite(x).all() or not np.isfinite(y).all():
        raise DataError(f"{where}: holds NaN or infinity; drop or fill these rows")
    if plan.data.standardise == "node":
        x = standardised(x, x[~test])
    if x.dtype == np.float64 and plan.model.kind == "keras":
        x = x.astype(np.float32)
    return Data(Rows(x[~test], y[~test]), Rows(x[test], y[test]))


def standardised(x: NDArray[Any], by: NDArray[Any]) -> NDArray[np.float64]:
    """Shift and scale columns by the mean and sample deviation (ddof 1) of the rows `by`."""
    if len(by) < 2:
        raise DataError("data.standardise: a node needs at least two training rows for a deviation")
    scaled: NDArray[np.float64] = (x - by.mean(axis=0)) / (by.std(axis=0, ddof=1) + _TINY)
    return scaled


def _used(path: Path, columns: Columns) -> Iterator[tuple[int, tuple[list[str], str]]]:
    """Yield the line number, the words of the features and the target, and train or test, of each row."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, skipinitialspace=True)
            header = list(columns.columns or next(lines, []))
            places = [_place(path, header, name) for name in (*(columns.features or ()), columns.target or "")]
            split = _place(path, header, columns.split) if columns.split else None
            for words in lines:
                if not words:
                    continue
                if len(words) != len(header):
                    raise DataError(f"{path}: line {lines.line_num} has {len(words)} columns instead of {len(header)}")
                side = "train" if split is None else words[split]
                if side not in _SIDES:
                    raise DataError(
                        f"{path}: line {lines.line_num}, column '{columns.split}': '{side}' is neither train nor test"
                    )
                yield lines.line_num, ([words[place].strip() for place in places], side)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); name the node's own CSV file with --data") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: no CSV file of UTF-8 text ({error})") from error


def _place(path: Path, header: Sequence[str], name: str) -> int:
    if name in header:
        return list(header).index(name)
    close = difflib.get_close_matches(name, header, 1, 0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(header[:20])}"
    raise DataError(f"{path}: has no column '{name}'; {hint} (a file without a header needs data.columns)")


def _numbers(words: Sequence[str], columns: Columns, where: str) -> list[float]:
    """Turn the used words of a row into numbers: features in the plan's order, then the target."""
    numbers: list[float] = []
    for name, word in zip(columns.features or (), words, strict=False):
        if name in columns.categories:
            kinds = columns.categories[name]
            found = [_same(word, kind) for kind in kinds]
            if not any(found):
                raise DataError(f"{where}, column '{name}': '{word}' is not in categories.{name} = {list(kinds)}")
            numbers += found[1:]
        else:
            numbers.append(_number(word, f"{where}, column '{name}'"))
    target = words[-1]
    if columns.positive is not None:
        numbers.append(float(any(_same(target, kind) for kind in columns.positive)))
    else:
        numbers.append(_number(target, f"{where}, column '{columns.target}'"))
    return numbers


def _number(word: str, where: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        raise DataError(f"{where}: '{word}' is no number; a word for a missing value belongs in data.missing") from error


def _same(word: str, kind: str | float) -> bool:
    """Compare as numbers where both are, so that 1.0 is 1."""
    if isinstance(kind, str):
        return word == kind
    try:
        return float(word) == kind
    except ValueError:
        return False
