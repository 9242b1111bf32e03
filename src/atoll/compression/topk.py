"""Top-k: only the largest numbers travel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from atoll.compression import places
from atoll.compression.stage import Coded, Read, Seed, Shapes, Stage, plain
from atoll.vector import Flat, Group, Groups, Layout


def topk(fraction: float) -> Stage:
    """Keep the fraction of numbers that is largest, and say where they are; what is left out is remembered.

    The squared length left out is at most 1 − k/n of the whole. Bytes a kept number: 4 (or what a next stage makes of it),
    and 1.1 (at 10 %) to 2.4 (at .1 %) for its place.

    Source: Stich et al. 2018, "Sparsified SGD with Memory", definition 2.1; Alistarh et al. 2018.
    """

    def shapes(layout: Layout) -> Shapes:
        count = kept(layout.size, fraction)
        return Shapes(plain(count), places.layouts(layout.size, count))

    def encode(vector: Group, memory: Groups, seed: Seed, rng: np.random.Generator) -> Coded:
        del seed, rng
        size, count = vector.values.size, kept(vector.values.size, fraction)
        chosen = _largest(np.abs(vector.values), count)
        return Coded(Group(plain(count), vector.values[chosen]), places.encode(chosen, size), memory)

    def opened(layout: Layout, beside: Mapping[str, Flat], read: Read, seed: Seed) -> Read:
        del seed
        return scattered(places.within(layout.size, beside), read)

    return Stage("topk", shapes, encode, opened, biased=True)


def kept(size: int, fraction: float) -> int:
    """Return how many numbers of a vector are kept: one at least.

    >>> kept(1000, 0.01), kept(5, 0.01)
    (10, 1)
    """
    return min(size, max(1, math.ceil(fraction * size - 1e-9)))


def _largest(sizes: Flat, count: int) -> places.Places:
    """Return the places of the largest numbers, rising; of equal ones the first."""
    least = np.partition(sizes, sizes.size - count)[sizes.size - count]
    chosen = np.flatnonzero(sizes > least)
    equal = np.flatnonzero(sizes == least)[: count - chosen.size]
    return np.sort(np.concatenate([chosen, equal]))


def scattered(within: Callable[[int, int], tuple[places.Places, int]], read: Read) -> Read:
    """Return how to read a vector of which only some numbers are there, from how to read these; the others are 0.

    Args:
        within: (lo, hi) → the places from lo to hi, and the number of the first of them.
        read: the numbers that are there.
    """

    def part(lo: int, hi: int) -> Flat:
        found = np.zeros(hi - lo, np.float32)
        chosen, first = within(lo, hi)
        found[chosen - lo] = read(first, first + len(chosen))
        return found

    return part
