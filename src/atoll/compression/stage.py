"""The shape of a stage: a small value of pure functions, which knows neither what comes before nor what comes after it.

A stage makes of a vector another one (`main`), on which the next stage works, and exact arrays beside it (places, scales),
which travel as they are. All their layouts follow from the vector's own. Opening is lazy: a stage is told how to read
the vector it made, and says how to read the one it was given, so that a fold opens one stretch of every update at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from atoll.vector import Dtype, Flat, Group, Groups, Layout, Layouts, Tensor

Read = Callable[[int, int], Flat]
"""`read(lo, hi)`: numbers lo to hi of a vector; may be called from many threads, and what it gives is not to be written to."""
Seed = Sequence[int]
"""Of the draws that both sides make alike."""


class Shapes(NamedTuple):
    """What a stage makes of a vector of some layout."""

    main: Layout
    beside: Layouts


class Coded(NamedTuple):
    """What a stage made of a vector, and what it remembers for the next one (empty for most)."""

    main: Group
    beside: Groups
    memory: Groups


class Stage(NamedTuple):
    """One stage, made by a factory named after its method.

    Args:
        name: as its arrays are called on the wire.
        shapes: a float32 vector's layout → those of what becomes of it.
        encode: (vector, memory, common seed, own draws) → what becomes of it.
        open: (the vector's layout, arrays beside, how to read `main`, common seed) → how to read the vector.
            Raises `WireError` for arrays that no encoder makes.
        biased: what it leaves out has to be remembered (error feedback).
        common: it does the same to every node's vector, so that sums of what it makes are what it makes of sums.
    """

    name: str
    shapes: Callable[[Layout], Shapes]
    encode: Callable[[Group, Groups, Seed, np.random.Generator], Coded]
    open: Callable[[Layout, Mapping[str, Flat], Read, Seed], Read]
    biased: bool = False
    common: bool = False


def plain(size: int, dtype: Dtype = "float32") -> Layout:
    """Return the layout of a vector that is one array.

    >>> plain(3).size
    3
    """
    return Layout((Tensor("values", (size,)),), dtype)


def reader(values: Flat) -> Read:
    """Return how to read what lies open."""
    return lambda lo, hi: values[lo:hi]
