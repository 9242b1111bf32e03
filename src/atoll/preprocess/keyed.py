"""A table taken apart by a natural key, such as speaker or hospital: a table of its own for each of the key's values."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from atoll.errors import DataError
from atoll.plan import Plan
from atoll.preprocess.table import place

_AT_ONCE = 100_000
"""Rows that are held until they are written."""


def keyed(path: Path, plan: Plan, column: str, into: Path) -> dict[str, Path]:
    """Write the rows of a CSV file into a file for each value of a column; return value → file, by value.

    Raises:
        DataError: it is no such file, it has no such column, or a row has no value there.
    """
    if path.suffix.lower() != ".csv":
        raise DataError(f"{path}: key:{column} takes a CSV file apart, and this is none; give a folder with a table a client")
    into.mkdir()
    found: dict[str, Path] = {}
    waiting: dict[str, list[list[str]]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, skipinitialspace=True)
            header = list(plan.data.columns or next(lines, []))
            at = place(str(path), header, column)
            for number, words in enumerate(filter(None, lines), 1):
                if len(words) != len(header) or not words[at].strip():
                    raise DataError(f"{path}: line {lines.line_num} has no value in column '{column}'")
                waiting.setdefault(words[at].strip(), []).append(words)
                if number % _AT_ONCE == 0:
                    _write(waiting, found, into, [] if plan.data.columns else header)
            _write(waiting, found, into, [] if plan.data.columns else header)
    except OSError as error:
        raise DataError(f"{path}: can't be taken apart ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: no CSV file of UTF-8 text ({error})") from error
    return dict(sorted(found.items()))


def _write(waiting: dict[str, list[list[str]]], found: dict[str, Path], into: Path, header: Iterable[str]) -> None:
    for value, rows in waiting.items():
        new = value not in found
        file = found.setdefault(value, into / f"{len(found)}.csv")
        with file.open("a", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([*([header] if new and header else []), *rows])
    waiting.clear()
