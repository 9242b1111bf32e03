"""8 and 4 bits a number, stochastically rounded: on average nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from atoll.compression.stage import Coded, Read, Seed, Shapes, Stage, plain
from atoll.vector import Flat, Group, Groups, Layout

BLOCK = 256
"""Numbers that share a scale, their largest: a huge one spoils only these."""
_WORK = 1 << 15
"""Numbers coded at a time: what is made on the way stays in a core's cache."""
_LEAST = 1e-35
"""Blocks whose largest number is smaller are zero: its inverse would be no number."""


def quantise(bits: Literal[8, 4]) -> Stage:
    """Round each number to one of 2ˢ − 1 levels between minus and plus the largest of its block, up or down by chance.

    The chance is such that the mean is the number itself, to 2⁻¹⁷ of a step; the error is below one step, which is the
    largest number over 127 (8 bits) or 7 (4 bits), and its mean square at most a quarter of a step's.

    Bytes a number: 1.016 or 0.516.

    Source: Alistarh et al. 2017, "QSGD", §3, with the largest number of a bucket as its norm (§4).
    """
    top = (1 << bits - 1) - 1

    def shapes(layout: Layout) -> Shapes:
        return Shapes(plain(-(-layout.size * bits // 8), "uint8"), {"scales": plain(-(-layout.size // BLOCK))})

    def encode(vector: Group, memory: Groups, seed: Seed, rng: np.random.Generator) -> Coded:
        del seed
        made = shapes(vector.layout)
        codes, scales = np.empty(made.main.size, np.uint8), np.empty(made.beside["scales"].size, np.float32)
        for lo in range(0, vector.values.size, _WORK):
            part = vector.values[lo : lo + _WORK]
            found, scales[lo // BLOCK : -(-(lo + len(part)) // BLOCK)] = _rounded(part, top, rng)
            codes[lo * bits // 8 : -(-(lo + len(part)) * bits // 8)] = found if bits == 8 else _packed(found)
        return Coded(Group(made.main, codes), {"scales": Group(made.beside["scales"], scales)}, memory)

    def opened(layout: Layout, beside: Mapping[str, Flat], read: Read, seed: Seed) -> Read:
        del layout, seed
        scales = beside["scales"]

        def part(lo: int, hi: int) -> Flat:
            codes = read(lo, hi) if bits == 8 else _unpacked(read(lo // 2, -(-hi // 2)))[lo % 2 : lo % 2 + hi - lo]
            first, levels = lo // BLOCK * BLOCK, codes.astype(np.float32)
            levels -= np.float32(top + 1)
            whole = (hi - lo) // BLOCK * BLOCK if lo == first else 0
            steps = scales[first // BLOCK : -(-hi // BLOCK)] / np.float32(top)
            np.multiply(_rows(levels[:whole]), steps[: whole // BLOCK, None], out=_rows(levels[:whole]))
            levels[whole:] *= steps[np.arange(lo + whole - first, hi - first) // BLOCK]
            return levels

        return part

    return Stage(f"{bits}bit", shapes, encode, opened)


def _rows(values: Flat) -> NDArray[np.float32]:
    rows: NDArray[np.float32] = values.reshape(-1, BLOCK)
    return rows


def _rounded(part: Flat, top: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], Flat]:
    """Return codes, 1 to 2·top + 1 and top + 1 for zero, and the scale of each block."""
    lack = -part.size % BLOCK
    rows = np.concatenate([part, np.zeros(lack, np.float32)]).reshape(-1, BLOCK) if lack else part.reshape(-1, BLOCK)
    scales = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    inverse = np.where(scales > _LEAST, np.float32(top) / np.maximum(scales, np.float32(_LEAST)), np.float32(0))
    levels = (rows * inverse[:, None]).reshape(-1)[: part.size]
    chance = rng.bit_generator.random_raw(-(-part.size // 4)).view(np.uint16)[: part.size]
    dither = chance.astype(np.float32)
    dither *= np.float32(2**-16)
    levels += dither
    levels += np.float32(top + 1 + 2**-17)  # above zero, so that cutting off rounds down
    np.minimum(levels, np.float32(2 * top + 1), out=levels)
    return levels.astype(np.uint8), scales


def _packed(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    low, high = codes[::2], codes[1::2]
    packed = low.copy()
    packed[: high.size] |= high << 4
    return packed


def _unpacked(packed: Flat) -> NDArray[np.uint8]:
    codes = np.empty(2 * packed.size, np.uint8)
    np.bitwise_and(packed, 15, out=codes[::2])
    np.right_shift(packed, 4, out=codes[1::2])
    return codes
