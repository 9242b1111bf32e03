"""Random-k: only numbers at random places travel, at the same ones for every node."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from atoll.compression.places import Places
from atoll.compression.stage import Coded, Read, Seed, Shapes, Stage, plain
from atoll.compression.topk import kept, scattered
from atoll.vector import Flat, Group, Groups, Layout


def randomk(fraction: float) -> Stage:
    """Keep numbers at places drawn by the round's common seed; what is left out is remembered, so nothing is scaled up.

    One place is drawn in each of k stretches of equal length, so each number has the same chance, k/n, where k divides n.
    The squared length left out is 1 − k/n of the whole on average. No places travel. Sums over nodes are those of whole vectors.

    Source: Stich et al. 2018, "Sparsified SGD with Memory", definition 2.1; one place a stretch is ours.
    """

    def shapes(layout: Layout) -> Shapes:
        return Shapes(plain(kept(layout.size, fraction)), {})

    def encode(vector: Group, memory: Groups, seed: Seed, rng: np.random.Generator) -> Coded:
        del rng
        chosen = _drawn(vector.values.size, kept(vector.values.size, fraction), tuple(seed))
        return Coded(Group(plain(len(chosen)), vector.values[chosen]), {}, memory)

    def opened(layout: Layout, beside: Mapping[str, Flat], read: Read, seed: Seed) -> Read:
        del beside
        drawn = tuple(seed)

        def within(lo: int, hi: int) -> tuple[Places, int]:
            chosen = _drawn(layout.size, kept(layout.size, fraction), drawn)
            a, b = np.searchsorted(chosen, (lo, hi))
            return chosen[a:b], int(a)

        return scattered(within, read)

    return Stage("randomk", shapes, encode, opened, biased=True, common=True)


@lru_cache(maxsize=4)
def _drawn(size: int, count: int, seed: tuple[int, ...]) -> Places:
    """Return rising places, drawn anew by each seed; those of a round are the same for all its updates."""
    bounds = np.arange(count + 1, dtype=np.int64) * size // count
    return bounds[:-1] + np.random.default_rng(seed).integers(0, np.diff(bounds))
