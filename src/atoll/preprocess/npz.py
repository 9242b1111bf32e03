"""NumPy archives as blocks: `x` and `y`, and `x_test` and `y_test` or a `split`; read piece by piece, never unpickled."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from atoll.errors import DataError
from atoll.plan import Plan
from atoll.preprocess.arrays import check
from atoll.preprocess.batch import Block, Source, rows_for

_HOLDS = "it holds arrays x and y, and for judging x_test and y_test, or a split of 'train' and 'test'"


class _Array:
    """An array in an archive, read in pieces from its beginning.

    Raises:
        DataError: it holds Python objects, or is laid out column by column.
    """

    def __init__(self, path: Path, name: str, file: IO[bytes]) -> None:
        self.name, self._path, self._file = name, path, file
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        self.shape, columnwise, self.dtype = read(file)
        if self.dtype.hasobject:
            raise DataError(f"{path}: '{name}' holds Python objects, which are never loaded: save numbers, x.astype('float32')")
        if not self.shape or (columnwise and len(self.shape) > 1):
            raise DataError(f"{path}: '{name}' is not laid out row by row: save numpy.ascontiguousarray({name})")

    def take(self, rows: int) -> NDArray[Any]:
        """Return the next rows."""
        shape = (rows, *self.shape[1:])
        size = int(np.prod(shape)) * self.dtype.itemsize
        content = self._file.read(size)
        if len(content) != size:
            raise DataError(f"{self._path}: '{self.name}' is shorter than it says; copy or write it again")
        return np.frombuffer(content, self.dtype).reshape(shape)


def source(path: Path, plan: Plan) -> Source:
    """Return the rows of a NumPy archive.

    Raises:
        DataError: no such archive, other arrays in it than these, or they don't fit each other or the plan.
    """
    with ExitStack() as stack:
        arrays = _open(path, stack)
        rows = 0
        for x, y in _pairs(path, arrays):
            check(x, y, plan, str(path))
            rows += x.shape[0]
        if "split" in arrays and arrays["split"].shape != (rows,):
            raise DataError(f"{path}: split has shape {arrays['split'].shape}: it says 'train' or 'test' for each of {rows} rows")
    return Source(str(path), lambda: _blocks(path), rows)


def _open(path: Path, stack: ExitStack) -> dict[str, _Array]:
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        return {name: _Array(path, name, stack.enter_context(archive.open(f"{name}.npy"))) for name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: no NumPy archive ({error}); write one with numpy.savez") from error


def _pairs(path: Path, arrays: dict[str, _Array]) -> list[tuple[_Array, _Array]]:
    names = sorted(arrays)
    if names == ["x", "x_test", "y", "y_test"]:
        return [(arrays["x"], arrays["y"]), (arrays["x_test"], arrays["y_test"])]
    if names in (["x", "y"], ["split", "x", "y"]):
        return [(arrays["x"], arrays["y"])]
    raise DataError(f"{path}: has arrays {', '.join(names) or 'of no name'}; {_HOLDS}")


def _blocks(path: Path) -> Generator[Block, None, None]:
    with ExitStack() as stack:
        arrays = _open(path, stack)
        try:
            for number, (x, y) in enumerate(_pairs(path, arrays)):
                step = rows_for(int(np.prod(x.shape[1:])) or 1)
                for lo in range(0, x.shape[0], step):
                    rows = min(step, x.shape[0] - lo)
                    test = _sides(path, arrays["split"].take(rows)) if "split" in arrays else np.full(rows, number == 1)
                    yield Block(x.take(rows), y.take(rows), test, rows)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: can't be read to its end ({error}); copy or write it again") from error


def _sides(path: Path, split: Sequence[Any] | NDArray[Any]) -> NDArray[np.bool_]:
    words = np.asarray(split)
    if not np.isin(words, ("train", "test")).all():
        raise DataError(f"{path}: split holds something else than 'train' and 'test'")
    return np.asarray(words == "test", np.bool_)
