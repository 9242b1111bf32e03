"""How the updates of a round lie to their mean: whether nodes pull the same way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from atoll.algorithms.algorithm import Bodies

SAMPLE, _NUMBERS, _FEWEST = 1 << 15, 1 << 20, 512
"""So many numbers of each update are looked at, and of all updates together, but never fewer than 512 of one; of longer ones in
blocks that lie evenly over it: a pass over all would cost as much as a fold. Of n independent numbers a cosine is off by
some 1/√n: half a hundredth of up to 32 updates, 3 hundredths of a thousand."""
_BLOCKS, _BLOCK = 16, 256
"""So many blocks at most, and so long at least."""


class Drift(NamedTuple):
    """What is told of a round's updates.

    Args:
        cosines: of each update to the weighted mean of all, in the fold's order; NaN where one of them is zero.
        dissimilarity: B = √(Σ wᵢ‖uᵢ‖² / ‖Σ wᵢuᵢ‖²), with Σ wᵢ = 1: 1 where all updates are the same, the larger the more
            they cancel each other; NaN where the mean is zero.
    """

    cosines: tuple[float, ...]
    dissimilarity: float


def drift(bodies: Bodies, weights: Sequence[float]) -> Drift | None:
    """Return how updates lie to their mean, over all groups that are averaged; None where none is.

    A pass of its own over a sample, a block of every update at a time: memory is that of one such table.

    Source of B: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", Definition 3, with updates for gradients.
    """
    sizes = {name: layout.size for name, layout in bodies.layouts.items() if layout.total == "weighted"}
    places = _places(sizes, min(SAMPLE, max(_NUMBERS // len(weights), _FEWEST)))
    shares = np.asarray(weights, np.float64) / sum(weights)
    squares, along, mean = np.zeros(len(shares)), np.zeros(len(shares)), 0.0
    for name, lo, hi in places:
        table = np.array(bodies.block(name, lo, hi), np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # of a hostile update, which no rule has looked at yet
            middle = shares @ table
            squares += np.einsum("ij,ij->i", table, table)
            along += table @ middle
            mean += float(middle @ middle)
    if not places:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = along / np.sqrt(squares * mean)
        return Drift(tuple(map(float, cosines)), float(np.sqrt(shares @ squares / mean)))


def _places(sizes: dict[str, int], sample: int) -> list[tuple[str, int, int]]:
    """Return what is looked at: blocks of groups, one after the other; each group has as large a part as of the whole."""
    whole, found = sum(sizes.values()), []
    for name, size in sizes.items():
        count = min(size, max(1, sample * size // max(whole, sample)))
        blocks = 1 if count == size else max(1, min(_BLOCKS, count // _BLOCK))
        for k in range(blocks):
            lo = k * size // blocks
            found.append((name, lo, lo + count // blocks))
    return [place for place in found if place[1] < place[2]]


def told(found: Drift | None, norms: Mapping[str, float | None]) -> dict[str, Any]:
    """Return what a round's facts say of updates with these norms, by node; what is no number is left out."""
    cosines = zip(norms, found.cosines, strict=True) if found else ()
    return {
        "drift": {node: {"norm": norms[node], "cosine": cosine} for node, cosine in cosines if math.isfinite(cosine)},
        "dissimilarity": found.dissimilarity if found and math.isfinite(found.dissimilarity) else None,
    }
