"""Tree aggregation (DP-FTRL): noise that prefix sums share, so that it grows with the logarithm of the rounds, without sampling.

Every round's sum is a leaf of a binary tree, every node of the tree has noise of its own, and what is released after t rounds
has the noise of the few nodes that cover 1 … t. Each unit is in one leaf at most, and so in as many noisy sums as the tree has
levels; after so many rounds another tree begins. Nothing is kept but the run's key: a node's noise is made of it anew.

Source: Kairouz, McMahan, Song, Thakkar, Thakurta, Xu 2021, "Practical and Private (Deep) Learning without Sampling or Shuffling",
algorithms 1 and 2, with restarts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.keys import Keystream, derive
from atoll.privacy.dp.noise import discrete_gaussian

Draw = Callable[[float, int], NDArray[Any]]
"""`draw(sigma, count)`: the next noise of that standard deviation, in whole steps."""


def levels(rounds: int) -> int:
    """Return how many nodes of a tree over so many rounds hold one leaf at most.

    >>> [levels(rounds) for rounds in (1, 2, 3, 4, 8)]
    [1, 2, 2, 3, 4]
    """
    return rounds.bit_length()


def cover(rounds: int) -> list[tuple[int, int]]:
    """Return the nodes that cover the rounds 1 … t, each as level and number.

    >>> cover(6), cover(7), cover(0)
    ([(2, 0), (1, 2)], [(2, 0), (1, 2), (0, 6)], [])
    """
    found, done = [], 0
    for level in reversed(range(rounds.bit_length())):
        if rounds >> level & 1:
            found.append((level, done >> level))
            done += 1 << level
    return found


def drawn(key: bytes, round_: int, turns: int) -> Draw:
    """Return what comes to the noise in a round: that of the tree's new cover, less that of the one before.

    Args:
        key: 32 bytes of the operating system's generator, for this run alone.
        round_: from 1.
        turns: after so many rounds another tree begins.
    """
    tree, leaf = divmod(round_ - 1, turns)
    before, after = cover(leaf), cover(leaf + 1)
    streams = [
        (sign, Keystream(derive(key, f"atoll tree {tree} level {level} node {number}".encode())))
        for sign, nodes, others in ((1, after, before), (-1, before, after))
        for level, number in nodes
        if (level, number) not in others
    ]

    def draw(sigma: float, count: int) -> NDArray[Any]:
        total: NDArray[Any] = np.zeros(count, np.int64)
        for sign, stream in streams:
            total += sign * discrete_gaussian(sigma, count, stream)
        return total

    return draw
