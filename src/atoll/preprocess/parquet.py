"""Parquet files as batches of columns: only the columns that the plan uses are read, some rows at a time."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from atoll.errors import DataError
from atoll.plan import Plan
from atoll.preprocess.batch import Batch, Column, Source, rows_for
from atoll.preprocess.table import blocks_of, place, used


def source(files: Sequence[Path], plan: Plan) -> Source:
    """Return the rows of Parquet files, one after the other; all must have the same types in the used columns.

    Raises:
        DataError: a file that is none, columns that aren't there or hold no numbers and no words, two schemas.
    """
    names = used(plan.data, str(files[0]))
    rows, first = 0, None
    for path in files:
        kinds, count = _look(path, names)
        rows += count
        first = first or kinds
        for name, kind in kinds.items():
            if kind != first[name]:
                raise DataError(
                    f"{path}: column '{name}' is {kind}, but in {files[0]} it is {first[name]}: "
                    "all files of a folder need one schema"
                )
    where = str(files[0] if len(files) == 1 else files[0].parent)
    return Source(where, lambda: blocks_of(_all(files, names), plan.data), rows)


def _look(path: Path, names: Sequence[str]) -> tuple[dict[str, str], int]:
    """Return the types of the used columns and the number of rows, from a file's end alone."""
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    kinds = {}
    for name in names:
        place(str(path), schema.names, name)
        kind = schema.field(name).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(fits(value) for fits in _FITTING):
            raise DataError(f"{path}: column '{name}' is {kind}: a feature or target is a number, true or false, or a word")
        kinds[name] = str(value)
    return kinds, rows


_FITTING = (
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_boolean,
    pa.types.is_decimal,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_null,
)


def _all(files: Sequence[Path], names: Sequence[str]) -> Generator[Batch, None, None]:
    for path in files:
        yield from _batches(path, names)


def _batches(path: Path, names: Sequence[str]) -> Generator[Batch, None, None]:
    at = 1
    try:
        # Neither threads nor whole row groups read ahead: memory stays at a batch.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16) as file:
            for part in file.iter_batches(rows_for(len(names)), columns=list(names), use_threads=False):
                columns = {name: _column(part.column(name)) for name in names}
                yield Batch(columns, range(at, at + part.num_rows), f"{path}: row")
                at += part.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _column(column: Any) -> Column:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_null(column.type):
        return [value.strip() if value is not None else None for value in column.to_pylist()]
    if not column.null_count:
        return np.asarray(column.to_numpy(zero_copy_only=False))
    empty = column.is_null().to_numpy(zero_copy_only=False)
    return np.ma.masked_array(column.fill_null(0).to_numpy(zero_copy_only=False), empty)


def _unreadable(path: Path, error: Exception) -> DataError:
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DataError(f"{path}: no whole Parquet file ({said[:200].rstrip('. ')}); copy or write it again")
