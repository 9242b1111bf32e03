"""What passes between a source of data and the rows made of it: batches of columns, blocks of numbers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ROWS = 65_536
"""Rows read at a time at most."""
_VALUES = 1 << 18
"""Values read at a time, where rows are wide: 2 MB as float64."""

Column = NDArray[Any] | Sequence[Any]
"""Numbers as an array, masked (`numpy.ma`) where there is none; anything else as a list, with None where there is none."""


class Batch(NamedTuple):
    """Some rows of a table, by column.

    Args:
        columns: those that the plan uses, by name, all of one length.
        places: the number of each row in its source.
        where: what such a number counts, for instance `rows.csv: line`.
    """

    columns: Mapping[str, Column]
    places: Sequence[int]
    where: str

    def at(self, row: int) -> str:
        """Say where a row stands."""
        return f"{self.where} {self.places[row]}"


class Block(NamedTuple):
    """Some rows as numbers.

    Args:
        x, y: of shape `[rows, …]` and `[rows]`.
        test: which rows only judge, `[rows]`.
        read: how many rows of the source these were, with those that were left out.
    """

    x: NDArray[Any]
    y: NDArray[Any]
    test: NDArray[np.bool_]
    read: int


@dataclass(frozen=True)
class Source:
    """Somewhere that rows come from.

    Args:
        where: its name in errors; never holds a password.
        blocks: reads it from the beginning, a block at a time.
        rows: how many there are, where that is known before they are read.
    """

    where: str
    blocks: Callable[[], Generator[Block, None, None]]
    rows: int | None = None


class DroppedError(Exception):
    """A source broke off that may well answer when it is asked again, from the beginning."""


def rows_for(width: int) -> int:
    """How many rows of so many values are read at a time.

    >>> rows_for(13), rows_for(128), rows_for(28 * 28)
    (20164, 2048, 334)
    """
    return max(1, min(ROWS, _VALUES // width))
