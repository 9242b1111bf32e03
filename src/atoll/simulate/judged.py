"""Many clients' rows judged by one model in compiled calls, each of many rows, whoever they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.learner import Rows, Together
from atoll.vector import Flat, Groups, Metrics

_TOGETHER = 2048
"""Rows in a call, at most: a power of two, and so are smaller calls, since each size is compiled anew."""


class Judge:
    """What judges flat vectors of a model, as `narrow` makes them.

    Args:
        learner: how it judges the rows of many.
    """

    def __init__(self, learner: Together) -> None:
        self._learner = learner
        self._room: dict[Any, NDArray[Any]] = {}
        self._lock = Lock()

    def __call__(self, flats: dict[str, Flat], parts: Sequence[Rows]) -> list[Metrics]:
        """Return the sums of each client's rows."""
        told: list[list[tuple[NDArray[Any], NDArray[Any]]]] = [[] for _ in parts]
        for block in _blocks([len(rows) for rows in parts]):
            with self._lock:
                outputs, losses = map(np.asarray, self._learner.judge(flats, *self._filled(parts, block)))
            at = 0
            for who, lo, hi in block:
                told[who].append((outputs[at : at + hi - lo], losses[at : at + hi - lo]))
                at += hi - lo
        return [
            self._learner.sums(np.concatenate([one[0] for one in mine]), np.concatenate([one[1] for one in mine]), rows.y)
            for mine, rows in zip(told, parts, strict=True)
        ]

    def _filled(self, parts: Sequence[Rows], block: Sequence[tuple[int, int, int]]) -> list[NDArray[Any]]:
        """Return a block's rows, filled up with the first of them, in arrays that the next block of this size takes over."""
        taken = [self._learner.arrays(parts[who], slice(lo, hi)) for who, lo, hi in block]
        rows = sum(hi - lo for _, lo, hi in block)
        arrays: list[NDArray[Any]] = []
        for same in zip(*taken, strict=True):
            form = (1 << (rows - 1).bit_length(), *same[0].shape[1:]), same[0].dtype, len(arrays)
            if form not in self._room:
                self._room[form] = np.empty(*form[:2])
            array = self._room[form]
            np.concatenate(same, out=array[:rows])
            array[rows:] = array[0]
            arrays.append(array)
        return arrays


def narrow(groups: Groups) -> dict[str, Flat]:
    """Return flat vectors as calls take them: float32 and int32."""
    return {
        name: group.values if group.values.dtype == np.float32 else group.values.astype(np.int32)
        for name, group in groups.items()
    }


def _blocks(sizes: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Cut clients' rows, one client's after another's, into blocks of (client, from, to)."""
    block: list[tuple[int, int, int]] = []
    left = _TOGETHER
    for who, size in enumerate(sizes):
        lo = 0
        while lo < size:
            hi = min(size, lo + left)
            block.append((who, lo, hi))
            left -= hi - lo
            lo = hi
            if not left:
                yield block
                block, left = [], _TOGETHER
    if block:
        yield block
