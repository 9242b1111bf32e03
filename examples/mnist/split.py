"""MNIST's four IDX files → `train.npz` and `test.npz`, as a plan without `features` takes them.

    python split.py MNIST-FOLDER WHERE

Pictures become `[28, 28, 1]` of numbers between 0 and 1.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def read(path: Path) -> NDArray[np.uint8]:
    """Return an IDX file's array: two zeros, the dtype, the number of axes, the length of each; then the bytes."""
    content = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(content, ">u4", content[3], 4).astype(int)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def pictures(folder: Path, kind: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the pictures `[rows, 28, 28, 1]` and digits `[rows]` of `train` or `t10k`."""
    x, y = read(folder / f"{kind}-images-idx3-ubyte.gz"), read(folder / f"{kind}-labels-idx1-ubyte.gz")
    return x[..., None].astype(np.float32) / 255, y.astype(np.int64)


def main() -> None:
    """Write both."""
    folder, into = map(Path, sys.argv[1:])
    into.mkdir(parents=True, exist_ok=True)
    for kind, name in (("train", "train.npz"), ("t10k", "test.npz")):
        x, y = pictures(folder, kind)
        np.savez(into / name, x=x, y=y)


if __name__ == "__main__":
    main()
