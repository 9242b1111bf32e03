"""Rows that are too many for memory: block by block into files, standardised there, and mapped.

What is mapped costs no anonymous memory: its pages come from the disk when they are looked at, and go when memory is
needed for something else.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from atoll.errors import DataError
from atoll.learner import Data, Rows
from atoll.preprocess.batch import Block, Source, rows_for

TINY = 1e-9
"""Added to every deviation: a constant column becomes 0, not a division by zero."""
_RESERVE = 64 << 20
"""Bytes that are left free on the disk."""


def spooled(blocks: Iterable[Block], source: Source, directory: Path, standardising: Callable[[int, int], None] | None) -> Data:
    """Return rows as read-only maps of files: floating-point numbers as float32, whole ones as they are.

    Args:
        blocks: of one shape and kind.
        source: where they come from, and how many there are, where that is known.
        directory: made anew; removed when this fails, otherwise the caller's to remove.
        standardising: None, or told how far it is to shift and scale all rows by the mean and sample deviation (ddof 1) of the
            training rows.

    Raises:
        DataError: the disk is too small or can't be written.
    """
    remove(directory)
    try:
        directory.mkdir(parents=True)
        with contextlib.ExitStack() as files:
            train, test = (files.enter_context(_Side(directory, name)) for name in ("train", "test"))
            moments = _Moments() if standardising else None
            for block in blocks:
                _room(directory, block, source.rows if train.empty and test.empty else None)
                x = moments.shifted(block) if moments else block.x
                train.add(x[~block.test], block.y[~block.test])
                test.add(x[block.test], block.y[block.test])
        if moments and standardising:
            moments.standardise([side.x.mapped("r+") for side in (train, test)], standardising)
        return Data(train.rows(), test.rows())
    except OSError as error:
        remove(directory)
        raise DataError(f"{directory}: rows can't be kept there ({error.strerror}); choose another --dir") from error
    except BaseException:
        remove(directory)
        raise


def remove(directory: Path) -> None:
    """Let go of what is spooled; what is mapped may stay where a system keeps such files, until the next time."""
    shutil.rmtree(directory, ignore_errors=True)


def _room(directory: Path, block: Block, rows: int | None) -> None:
    """Check that a block fits on the disk; before the first one that all of them do, where it is known how many there are."""
    size = (block.x.size + block.y.size) * 4 / max(1, len(block.y))
    needed, free = size * (rows or len(block.y)), shutil.disk_usage(directory).free
    if needed + _RESERVE > free:
        raise DataError(
            f"{directory}: these rows need {needed / 1e9:.1f} GB more and {free / 1e9:.1f} GB are free: "
            "free some space, or choose another --dir"
        )


class _Growing:
    """An array in a `.npy` file that grows by rows; how many there are is written into it at the end."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._file = path.open("wb")
        self.shape: tuple[int, ...] = ()
        self.dtype = np.dtype(np.float32)

    def add(self, rows: NDArray[Any], *, floating: bool) -> None:
        if not self.count:
            self.shape, self.dtype = rows.shape[1:], np.dtype(np.float32) if floating else rows.dtype
            self._write_header()
        if rows.shape[1:] != self.shape or not np.can_cast(rows.dtype, self.dtype, "same_kind"):
            raise DataError(
                f"data: rows of shape {rows.shape[1:]} ({rows.dtype}) after rows of shape {self.shape} ({self.dtype})"
            )
        self._file.write(np.ascontiguousarray(rows, self.dtype).data)
        self.count += len(rows)

    def close(self) -> None:
        if self.count:
            self._file.seek(0)
            self._write_header()  # as long as before: NumPy leaves room for the rows to grow
        self._file.close()

    def _write_header(self) -> None:
        shape = (self.count, *self.shape)
        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self._file, header)

    def mapped(self, mode: Literal["r", "r+"]) -> NDArray[Any]:
        return np.asarray(np.load(self.path, mmap_mode=mode)) if self.count else np.zeros((0, *self.shape), self.dtype)


class _Side:
    """The training or the test rows."""

    def __init__(self, directory: Path, name: str) -> None:
        self.x, self.y = _Growing(directory / f"{name}-x.npy"), _Growing(directory / f"{name}-y.npy")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.x.close()
        self.y.close()

    @property
    def empty(self) -> bool:
        return not self.x.count

    def add(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        if len(y):
            self.x.add(x, floating=x.dtype.kind == "f")
            self.y.add(y, floating=y.dtype.kind == "f")

    def rows(self) -> Rows:
        return Rows(self.x.mapped("r"), self.y.mapped("r"))


class _Moments:
    """Mean and deviation of training rows that come in blocks (Chan, Golub & LeVeque 1983, eq. 2.1).

    Rows are kept less the first block's mean, so that float32 holds what tells them apart, however far from 0 they lie.
    """

    def __init__(self) -> None:
        self._shift: NDArray[np.float64] | None = None
        self._count, self._mean, self._squares = 0, np.zeros(()), np.zeros(())

    def shifted(self, block: Block) -> NDArray[np.float64]:
        if self._shift is None:
            self._shift = block.x.mean(axis=0, dtype=np.float64)
        x: NDArray[np.float64] = block.x - self._shift
        if count := len(by := x[~block.test]):
            mean = by.mean(axis=0)
            apart, total = mean - self._mean, self._count + count
            self._squares = self._squares + ((by - mean) ** 2).sum(axis=0) + apart**2 * (self._count * count / total)
            self._mean = self._mean + apart * (count / total)
            self._count = total
        return x

    def standardise(self, arrays: Sequence[NDArray[Any]], progress: Callable[[int, int], None]) -> None:
        if self._count < 2:
            raise DataError("data.standardise: a node needs at least two training rows for a deviation")
        scale = np.sqrt(self._squares / (self._count - 1)) + TINY
        done, rows = 0, sum(map(len, arrays))
        for x in arrays:
            step = rows_for(math.prod(x.shape[1:]) or 1)
            for lo in range(0, len(x), step):
                x[lo : lo + step] = (x[lo : lo + step] - self._mean) / scale
                progress(done := done + len(x[lo : lo + step]), rows)
