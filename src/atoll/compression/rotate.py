"""Rotation: each number is spread evenly over 4,096 others, so that none sticks out and few bits say them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from atoll.compression.stage import Coded, Read, Seed, Shapes, Stage, plain
from atoll.vector import Flat, Group, Groups, Layout

PIECE = 4096
"""Numbers that are rotated together; what is left at the end goes in pieces of the powers of two that add up to it."""
_WORK = 8
"""Pieces rotated at a time: they stay in a core's cache."""


def rotate() -> Stage:
    """Multiply each piece by H D: signs drawn by the round's common seed, then Hadamard's matrix. Lengths stay the same.

    Both are orthogonal, and their own inverses. The same for every node of a round, so sums of rotated vectors are the
    rotated sum.

    Source: Suresh et al. 2017, "Distributed Mean Estimation with Limited Communication", §3; as in DRIVE (Vargaftik et al. 2021)
    and EDEN (2022).
    """

    def shapes(layout: Layout) -> Shapes:
        return Shapes(plain(layout.size), {})

    def encode(vector: Group, memory: Groups, seed: Seed, rng: np.random.Generator) -> Coded:
        del rng
        turned, signs = np.empty_like(vector.values), _signs(tuple(seed))
        for lo, hi, size in _pieces(0, turned.size, turned.size):
            rows = vector.values[lo:hi].reshape(-1, size) * signs[:size]
            turned[lo:hi] = hadamard(rows).reshape(-1)
        return Coded(Group(plain(turned.size), turned), {}, memory)

    def opened(layout: Layout, beside: Mapping[str, Flat], read: Read, seed: Seed) -> Read:
        del beside
        signs = _signs(tuple(seed))

        def part(lo: int, hi: int) -> Flat:
            found = np.empty(hi - lo, np.float32)
            for a, b, size in _pieces(lo, hi, layout.size):
                rows = hadamard(read(a, b).astype(np.float32).reshape(-1, size), back=True)
                rows *= signs[:size]
                inside = rows.reshape(-1)[max(lo - a, 0) : hi - a]
                found[max(a - lo, 0) : max(a - lo, 0) + inside.size] = inside
            return found

        return part

    return Stage("rotate", shapes, encode, opened, common=True)


@lru_cache(maxsize=16)
def _signs(seed: tuple[int, ...]) -> Flat:
    signs: Flat = 1 - 2 * np.random.default_rng(seed).integers(0, 2, PIECE).astype(np.float32)
    return signs


def _pieces(lo: int, hi: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield begin, end and piece's size of the stretches that hold numbers lo to hi of a vector."""
    whole = size // PIECE * PIECE
    for at in range(lo // PIECE * PIECE, min(hi, whole), _WORK * PIECE):
        yield at, min(at + _WORK * PIECE, -(-hi // PIECE) * PIECE, whole), PIECE
    at, piece = whole, PIECE // 2
    while piece:
        if size & piece:
            if at < hi and at + piece > lo:
                yield at, at + piece, piece
            at += piece
        piece //= 2


def hadamard(rows: NDArray[np.float32], *, back: bool = False) -> NDArray[np.float32]:
    """Return H x for each row `[rows, n]`, n a power of two; `back` undoes it. The rows given are used up.

    H is split in two, A ⊗ B, and tables are turned in between, so that every step goes along long stretches of memory; each row's
    result is left turned. Only sums of two: the same bits on every machine.
    """
    count, size = rows.shape
    a = 1 << (size.bit_length() - 1) // 2
    b = size // a
    if back:
        a, b = b, a
    first = _butterflies(np.ascontiguousarray(rows.reshape(count, a, b).transpose(1, 0, 2)))
    second = _butterflies(np.ascontiguousarray(first.transpose(2, 1, 0)))
    second *= np.float32(size**-0.5)
    return np.ascontiguousarray(second.transpose(1, 0, 2)).reshape(count, size)


def _butterflies(table: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return H along the first axis of `[n, rows, columns]`, without its factor."""
    size, spare, half = len(table), np.empty_like(table), 1
    while half < size:
        form = (size // (2 * half), 2, -1)
        x, y = table.reshape(form), spare.reshape(form)
        np.add(x[:, 0], x[:, 1], out=y[:, 0])
        np.subtract(x[:, 0], x[:, 1], out=y[:, 1])
        table, spare, half = spare, table, 2 * half
    return table
