"""Folds: how the accepted updates of a round become one total."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from atoll.algorithms.algorithm import Bodies
from atoll.vector import Group, Total

BLOCK = 1 << 16
"""Numbers a worker adds at a time: two blocks stay in a core's own cache, and a pass is long enough to pay for its call."""


def mean(bodies: Bodies, weights: Sequence[float], registered: int) -> Total:
    """Add updates in their order, block by block: Σ wᵢxᵢ or Σ xᵢ as each layout says.

    Blocks are independent, so any number of threads gives the same bits. Memory: one accumulator, and one block a thread.

    Args:
        bodies: the updates.
        weights: `[updates]`, positive.
        registered: how many nodes belong to the run.

    Source: McMahan et al. 2017, Algorithm 1, the server's line.
    """
    groups = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as workers:
        for name, layout in bodies.layouts.items():
            values = np.empty(layout.size, layout.dtype)
            scales = np.asarray(weights, layout.dtype) if layout.total == "weighted" else None

            def add(lo: int, name: str = name, values: np.ndarray = values, scales: np.ndarray | None = scales) -> None:
                hi = min(lo + BLOCK, values.size)
                _add(bodies.block(name, lo, hi), scales, values[lo:hi])

            for _ in workers.map(add, range(0, layout.size, BLOCK)):
                pass
            groups[name] = Group(layout, values)
    return Total(groups, float(sum(weights)), len(weights), registered)


def _add(parts: Sequence[np.ndarray], scales: np.ndarray | None, into: np.ndarray) -> None:
    """Put the sum of one block of every update into its place."""
    if scales is None:
        into[...] = parts[0]
        for part in parts[1:]:
            np.add(into, part, out=into)
        return
    scaled = np.empty_like(into)
    np.multiply(parts[0], scales[0], out=into)
    for part, scale in zip(parts[1:], scales[1:], strict=True):
        np.multiply(part, scale, out=scaled)
        np.add(into, scaled, out=into)
