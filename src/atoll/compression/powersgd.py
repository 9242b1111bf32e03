"""PowerSGD: a matrix travels as two thin ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from atoll.compression.stage import Coded, Read, Seed, Shapes, Stage, plain
from atoll.vector import Flat, Group, Groups, Layout


class _Matrix(NamedTuple):
    """An array of the vector as a matrix, and where its parts lie in what travels; rank 0: it travels whole."""

    begin: int
    rows: int
    columns: int
    rank: int
    at: int

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def travels(self) -> int:
        return self.rank * (self.rows + self.columns) if self.rank else self.size


def powersgd(rank: int) -> Stage:
    """Send P Qᵀ ≈ M for each array M of two or more axes: one step of power iteration, begun where the last one ended.

    Where nothing is remembered of a last one, as at first, two steps are taken from a Q that is drawn.

    An array is cut into rows and columns where these are as equal as can be; one that two thin ones wouldn't make shorter
    travels whole. What is left out, and Q, are remembered.

    Source: Vogels et al. 2019, "PowerSGD", Algorithm 1 and 2, on each node by itself: P ← M Q, orthogonalised; Q ← Mᵀ P.
    """

    def shapes(layout: Layout) -> Shapes:
        return Shapes(plain(sum(one.travels for one in _matrices(layout, rank))), {})

    def encode(vector: Group, memory: Groups, seed: Seed, rng: np.random.Generator) -> Coded:
        del rng
        cut = _matrices(vector.layout, rank)
        sent = np.empty(sum(one.travels for one in cut), np.float32)
        warm = plain(sum(one.rank * one.columns for one in cut))
        before = memory["q"].values if "q" in memory else np.random.default_rng(seed).normal(size=warm.size)
        after, at = np.empty(warm.size, np.float32), 0
        for one in cut:
            part, into = vector.values[one.begin : one.begin + one.size], sent[one.at : one.at + one.travels]
            if not one.rank:
                into[...] = part
                continue
            width = one.rank * one.columns
            matrix = part.reshape(one.rows, one.columns).astype(np.float64)
            q = before[at : at + width].reshape(one.columns, one.rank)
            p, _ = np.linalg.qr(matrix @ (q if "q" in memory else matrix.T @ np.linalg.qr(matrix @ q)[0]))
            q = (matrix.T @ p).astype(np.float32)
            into[: one.rows * one.rank], into[one.rows * one.rank :] = _balanced(p, q)
            after[at : at + width] = q.reshape(-1)
            at += width
        return Coded(Group(plain(sent.size), sent), {}, {"q": Group(warm, after)} if warm.size else {})

    def opened(layout: Layout, beside: Mapping[str, Flat], read: Read, seed: Seed) -> Read:
        del beside, seed
        cut = _matrices(layout, rank)

        def part(lo: int, hi: int) -> Flat:
            found = np.empty(hi - lo, np.float32)
            for one in cut:
                a, b = max(lo, one.begin), min(hi, one.begin + one.size)
                if a < b:
                    found[a - lo : b - lo] = _stretch(one, read, a - one.begin, b - one.begin)
            return found

        return part

    return Stage("powersgd", shapes, encode, opened, biased=True)


def _balanced(p: NDArray[np.float64], q: NDArray[np.float32]) -> tuple[Flat, Flat]:
    """Return P and Q flat, of the same product, each column as large in one as in the other: stages that follow share scales.

    P's columns are of length 1, and Q's as long as what they stand for: side by side in one block of 4 bits, P would be noise.
    """
    by = np.sqrt(np.linalg.norm(q.astype(np.float64), axis=0) * math.sqrt(len(p) / len(q)))
    by[by == 0] = 1
    return (p * by).astype(np.float32).reshape(-1), (q / by).astype(np.float32).reshape(-1)


def _stretch(one: _Matrix, read: Read, lo: int, hi: int) -> Flat:
    """Return numbers lo to hi of a matrix. Added up rank by rank and without BLAS: the same bits on every machine."""
    if not one.rank:
        return read(one.at + lo, one.at + hi)
    first, last = lo // one.columns, -(-hi // one.columns)
    p = read(one.at + first * one.rank, one.at + last * one.rank).reshape(-1, one.rank)
    behind = one.at + one.rows * one.rank
    q = np.ascontiguousarray(read(behind, behind + one.columns * one.rank).reshape(-1, one.rank).T)
    table = p[:, :1] * q[0]
    for k in range(1, one.rank):
        table += p[:, k : k + 1] * q[k]
    whole: Flat = table.reshape(-1)
    return whole[lo - first * one.columns :][: hi - lo]


def _matrices(layout: Layout, rank: int) -> list[_Matrix]:
    cut: list[_Matrix] = []
    at = 0
    for tensor, begin in zip(layout.tensors, layout.offsets, strict=False):
        sides = [(math.prod(tensor.shape[:axis]), math.prod(tensor.shape[axis:])) for axis in range(1, len(tensor.shape))]
        rows, columns = min(sides, key=sum, default=(math.prod(tensor.shape), 1))
        thin = min(rank, rows, columns)
        one = _Matrix(begin, rows, columns, thin if sides and thin * (rows + columns) < rows * columns else 0, at)
        cut.append(one)
        at += one.travels
    return cut
