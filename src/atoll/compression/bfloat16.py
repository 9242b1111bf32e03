"""bfloat16: the upper half of a float32."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from atoll.compression.stage import Coded, Read, Seed, Shapes, Stage, plain
from atoll.vector import Flat, Group, Groups, Layout

_WORK = 1 << 15


def bfloat16() -> Stage:
    """Round each number to the nearest one of 8 bits, the even one of two; an error of at most 2⁻⁸ of the number. 2 bytes each.

    Numbers within 0.4 % of the largest float32 have none near them, and count as infinite.

    Source: IEEE 754 rounding of a float32's upper half; the bits are those of ml_dtypes' bfloat16.
    """

    def shapes(layout: Layout) -> Shapes:
        return Shapes(plain(layout.size, "uint16"), {})

    def encode(vector: Group, memory: Groups, seed: Seed, rng: np.random.Generator) -> Coded:
        del seed, rng
        halves = np.empty(vector.values.size, np.uint16)
        for lo in range(0, halves.size, _WORK):
            bits = np.ascontiguousarray(vector.values[lo : lo + _WORK]).view(np.uint32)
            odd = bits >> 16
            odd &= 1
            odd += np.uint32(0x7FFF)
            odd += bits
            odd >>= 16
            halves[lo : lo + _WORK] = odd
        return Coded(Group(plain(halves.size, "uint16"), halves), {}, memory)

    def opened(layout: Layout, beside: Mapping[str, Flat], read: Read, seed: Seed) -> Read:
        del layout, beside, seed

        def part(lo: int, hi: int) -> Flat:
            bits = read(lo, hi).astype(np.uint32)
            bits <<= 16
            numbers: Flat = bits.view(np.float32)
            return numbers

        return part

    return Stage("bfloat16", shapes, encode, opened)
