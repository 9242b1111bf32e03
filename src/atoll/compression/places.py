"""Rising places in a vector, in one or two bytes each: the low part of every place, and how many lie in each stretch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from atoll.compression.stage import plain
from atoll.errors import WireError
from atoll.vector import Flat, Group, Groups, Layout, Layouts

Places = NDArray[np.int64]


def layouts(size: int, count: int) -> Layouts:
    """Return the layouts of `count` places in a vector of `size`, in stretches of 256 or 65,536 numbers: whichever is shorter."""
    fine = count + 2 * -(-size // 256) <= 2 * count + 4 * -(-size // 65536)
    if fine:
        return {"places": plain(count, "uint8"), "counts": plain(-(-size // 256), "uint16")}
    return {"places": plain(count, "uint16"), "counts": plain(-(-size // 65536), "uint32")}


def encode(places: Places, size: int) -> Groups:
    """Write rising places down."""
    made = layouts(size, len(places))
    bits = _bits(made["places"])
    counts = np.bincount(places >> bits, minlength=made["counts"].size)
    return {
        "places": Group(made["places"], (places & ((1 << bits) - 1)).astype(made["places"].dtype)),
        "counts": Group(made["counts"], counts.astype(made["counts"].dtype)),
    }


def decode(size: int, beside: Mapping[str, Flat]) -> Places:
    """Read places back.

    Raises:
        WireError: they don't rise, or lie outside of the vector, or are more or fewer than it is said.
    """
    low, counts = beside["places"], beside["counts"]
    bits = 8 * low.itemsize
    if int(counts.sum(dtype=np.uint64)) != low.size:
        raise WireError(f"{low.size} places of numbers, and their counts add up to {counts.sum(dtype=np.uint64)}")
    places: Places = np.repeat(np.arange(counts.size, dtype=np.int64) << bits, counts) + low
    if places.size and (places[-1] >= size or (np.diff(places) <= 0).any()):
        raise WireError(f"places of numbers that don't rise, or lie outside of a vector of {size}")
    return places


def within(size: int, beside: Mapping[str, Flat]) -> Callable[[int, int], tuple[Places, int]]:
    """Return how to find the places from lo to hi, and the number of the first of them; only counts are kept at hand.

    Raises:
        WireError: as for `decode`.
    """
    decode(size, beside)
    low, counts = beside["places"], beside["counts"]
    bits = 8 * low.itemsize
    begins = np.concatenate([[0], np.cumsum(counts, dtype=np.uint32)]).astype(np.uint32)

    def found(lo: int, hi: int) -> tuple[Places, int]:
        first, last = lo >> bits, -(-hi >> bits)
        a, b = int(begins[first]), int(begins[last])
        places: Places = np.repeat(np.arange(first, last, dtype=np.int64) << bits, counts[first:last]) + low[a:b]
        left, right = np.searchsorted(places, (lo, hi))
        return places[left:right], a + int(left)

    return found


def _bits(layout: Layout) -> int:
    return 8 * np.dtype(layout.dtype).itemsize
