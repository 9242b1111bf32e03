"""CSV files as batches of words."""

from __future__ import annotations

import csv
from collections.abc import Generator, Sequence
from pathlib import Path

from atoll.columns import Columns
from atoll.errors import DataError
from atoll.plan import Plan
from atoll.preprocess.batch import Batch, Source, rows_for
from atoll.preprocess.table import blocks_of, place, used

_NO_HEADER = " (a file without a header needs data.columns)"


def source(files: Sequence[Path], plan: Plan) -> Source:
    """Return the rows of CSV files, one after the other.

    Raises:
        DataError: when it is read: one line with file, line, column, and what would be right.
    """
    names = used(plan.data, str(files[0]))
    where = str(files[0] if len(files) == 1 else files[0].parent)
    return Source(where, lambda: blocks_of(_all(files, plan.data, names), plan.data))


def _all(files: Sequence[Path], columns: Columns, names: Sequence[str]) -> Generator[Batch, None, None]:
    for path in files:
        yield from _batches(path, columns, names)


def _batches(path: Path, columns: Columns, names: Sequence[str]) -> Generator[Batch, None, None]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, skipinitialspace=True)
            header = list(columns.columns or next(lines, []))
            try:
                places = [place(str(path), header, name) for name in names]
            except DataError as error:
                raise DataError(f"{error}{_NO_HEADER}") from None
            picked: list[list[str]] = []
            numbers: list[int] = []
            for words in lines:
                if not words:
                    continue
                if len(words) != len(header):
                    raise DataError(f"{path}: line {lines.line_num} has {len(words)} columns instead of {len(header)}")
                picked.append([words[at].strip() for at in places])
                numbers.append(lines.line_num)
                if len(picked) == rows_for(len(names)):
                    yield _batch(path, names, picked, numbers)
                    picked, numbers = [], []
            if picked:
                yield _batch(path, names, picked, numbers)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); name a file of rows that is there") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: no CSV file of UTF-8 text ({error})") from error


def _batch(path: Path, names: Sequence[str], picked: list[list[str]], numbers: list[int]) -> Batch:
    return Batch(dict(zip(names, map(list, zip(*picked, strict=True)), strict=True)), numbers, f"{path}: line")
