"""Folds: how the accepted updates of a round become one total.

Three shapes hold all of them. `mean` adds up; `coordinatewise` decides at each place alone (medians); `combination`
looks at how the updates lie to each other and then adds up those it trusts (Krum, geometric median, clipping). A new
rule is a small pure function for one of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from atoll.algorithms.algorithm import Bodies, Fold
from atoll.vector import Flat, Group, Total

BLOCK = 1 << 17
"""Numbers a worker adds at a time: two blocks stay in a core's own cache, and a pass is long enough to pay for its call."""
_LEAST = 1 << 14
"""Numbers of fewer than two such blocks aren't worth a second worker."""
_CORES = os.cpu_count() or 1
_TABLE = 1 << 18
"""Numbers in a block of all updates together, where a worker looks at all at once: such a table stays in its cache."""
_FAR = 1e200
"""The squared length of an update whose own is too large for a float: such an update adds nothing."""

Combine = Callable[[NDArray[np.floating]], Flat]
"""`combine(table)`: one block of every update, `[updates, block]`, its own to write into → the block of the result."""
Weigh = Callable[[NDArray[np.float64], Sequence[float]], tuple[Sequence[float], float]]
"""`weigh(gram, weights)`: inner products of the updates `[updates, updates]`, and their weights → (cᵢ, C); the result is
Σ cᵢxᵢ / C. Products are over all groups that meet a mean, buffers too: an attack through these alone is one as well."""


def mean(bodies: Bodies, weights: Sequence[float], registered: int) -> Total:
    """Add updates in their order, block by block: Σ wᵢxᵢ or Σ xᵢ as each layout says.

    Blocks are independent, so any number of threads gives the same bits. Memory: one accumulator, and one block a thread.

    Args:
        bodies: the updates.
        weights: `[updates]`, positive.
        registered: how many nodes belong to the run.

    Source: McMahan et al. 2017, Algorithm 1, the server's line.
    """
    return scaled_sum(bodies, weights, float(sum(weights)), registered)


def combination(weigh: Weigh) -> Fold:
    """Return the fold that adds updates up by weights found from their inner products. Plain groups add up whole.

    Memory: one accumulator, and a table of one block of every update a thread.
    """

    def fold(bodies: Bodies, weights: Sequence[float], registered: int) -> Total:
        products = gram(bodies)
        scales, whole = weigh(products, weights)
        near = products.diagonal() < _FAR
        return scaled_sum(
            bodies, [float(scale) if here else 0.0 for scale, here in zip(scales, near, strict=True)], whole, registered
        )

    return fold


def coordinatewise(combine: Combine) -> Fold:
    """Return the fold that makes each number of the result from the updates' numbers at the same place alone.

    Plain groups add up whole. The total's weight is 1: what it holds is the result itself. Memory as for `combination`.
    """

    def combined(parts: Sequence[Flat], into: Flat) -> None:
        # Minus zero and zero are equal, so which of them a rule finds is chance: with zero added, both are zero.
        np.add(combine(np.array(parts)), 0, out=into)

    def fold(bodies: Bodies, weights: Sequence[float], registered: int) -> Total:
        groups = {}
        with _workers() as workers:
            for name, layout in bodies.layouts.items():
                act, size = (combined, _rows(len(weights))) if layout.total == "weighted" else (_added, BLOCK)
                groups[name] = _group(workers, bodies, name, size, act)
        return Total(groups, 1.0, len(weights), registered)

    return fold


def gram(bodies: Bodies) -> NDArray[np.float64]:
    """Return the updates' inner products `[updates, updates]`, over all groups but the plain ones.

    In float64 and without BLAS, whose order of adding differs from machine to machine: a replay elsewhere has these bits.
    An update too long to be squared stands far away and at a right angle to all others.
    """
    count = len(bodies.ids)

    def products(table: NDArray[np.float64]) -> NDArray[np.float64]:
        part, scaled = np.zeros((count, count)), np.empty_like(table)
        for k in range(count):
            np.multiply(table[k:], table[k], out=scaled[k:])
            part[k, k:] = scaled[k:].sum(axis=1)
        return part

    total = _summed(bodies, products)
    far = ~(total.diagonal() < _FAR)
    total[far] = total[:, far] = 0.0
    total[far, far] = _FAR
    return total + np.triu(total, 1).T


def along(bodies: Bodies) -> NDArray[np.float64]:
    """Return each update's inner product with itself and with the last one, `[2, updates]`; otherwise as `gram`, and quicker."""

    def products(table: NDArray[np.float64]) -> NDArray[np.float64]:
        scaled = np.multiply(table, table[-1])
        last = scaled.sum(axis=1)
        return np.array([np.multiply(table, table, out=scaled).sum(axis=1), last])

    total = _summed(bodies, products)
    far = ~(total[0] < _FAR)
    total[0, far], total[1, far] = _FAR, 0.0
    return total


def _summed(bodies: Bodies, act: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> NDArray[np.float64]:
    """Add up, in their order, what `act` makes of each block of all updates `[updates, block]`; plain groups stay out."""
    size = _rows(len(bodies.ids))

    def part(place: tuple[str, int]) -> NDArray[np.float64]:
        name, lo = place
        with np.errstate(over="ignore", invalid="ignore"):
            return act(np.array(bodies.block(name, lo, min(lo + size, bodies.layouts[name].size)), np.float64))

    averaged = {name: layout.size for name, layout in bodies.layouts.items() if layout.total == "weighted"}
    places = [(name, lo) for name, numbers in averaged.items() for lo in range(0, numbers, size)]
    total: NDArray[np.float64] = np.zeros(())
    with _workers() as workers:
        for one in workers.map(part, places):
            total = total + one
    return total


def distances(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return squared distances `[updates, updates]` from inner products: ‖x − y‖² = x·x + y·y − 2 x·y."""
    squares = products.diagonal()
    away = np.maximum(squares[:, None] + squares - 2 * products, 0.0)
    np.fill_diagonal(away, 0.0)
    return away


def scaled_sum(bodies: Bodies, scales: Sequence[float], whole: float, registered: int) -> Total:
    """Add up what has a scale: Σ cᵢxᵢ; plain groups Σ xᵢ over all."""
    groups = {}
    chosen = [place for place, scale in enumerate(scales) if scale]
    with _workers() as workers:
        for name, layout in bodies.layouts.items():
            typed = np.asarray([scales[place] for place in chosen], layout.dtype)
            act = partial(_scaled, chosen, typed) if layout.total == "weighted" else _added
            groups[name] = _group(workers, bodies, name, min(BLOCK, max(_LEAST, layout.size // _CORES + 1)), act)
    return Total(groups, whole, len(scales), registered)


def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_CORES)


def _rows(updates: int) -> int:
    """How many numbers of each update a table holds."""
    return max(_TABLE // updates, 1 << 10)


def _group(
    workers: ThreadPoolExecutor, bodies: Bodies, name: str, size: int, act: Callable[[Sequence[Flat], Flat], None]
) -> Group:
    """Let `act` put one block of every update into its place, for all blocks of a group."""
    layout = bodies.layouts[name]
    values = np.empty(layout.size, layout.dtype)

    def put(lo: int) -> None:
        hi = min(lo + size, values.size)
        act(bodies.block(name, lo, hi), values[lo:hi])

    places = range(0, layout.size, size)
    for _ in (workers.map if len(places) > 1 else map)(put, places):
        pass
    return Group(layout, values)


def _added(parts: Sequence[Flat], into: Flat) -> None:
    into[...] = parts[0]
    for place in range(1, len(parts)):
        np.add(into, parts[place], out=into)


def _scaled(chosen: Sequence[int], scales: Flat, parts: Sequence[Flat], into: Flat) -> None:
    if not chosen:
        into[...] = 0
        return
    scaled = np.empty_like(into)
    np.multiply(parts[chosen[0]], scales[0], out=into)
    for place, scale in zip(chosen[1:], scales[1:], strict=True):
        np.multiply(parts[place], scale, out=scaled)
        np.add(into, scaled, out=into)
