"""Quantiles without seeing rows: counts of values in buckets that are the same for everybody, and so add up.

A bucket is a part of an octave of floats, so its width is a fixed share of what is in it. Source: Masson, Rim and Lee 2019,
"DDSketch", section 2 (buckets by the logarithm, merged by adding), here with linear parts inside of each octave.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LOWEST, _OCTAVES = -10, 32
"""Values from 2^−10 to 2^22 have buckets of their own; nearer to 0 is 0, and what is beyond is in the last one."""
_COARSEST = 4


def fineness(room: int) -> int:
    """Return into 2 to the power of what each octave is cut, where so many counts are sent at a time: at least 16 parts."""
    return max(_COARSEST, (room // (2 * _OCTAVES)).bit_length() - 1)


def count(fine: int) -> int:
    """Return how many buckets there are."""
    return 2 * (_OCTAVES << fine)


def passes(room: int) -> int:
    """Return in how many parts all counts go, so many at a time."""
    return -(-count(fineness(room)) // room)


def add(x: NDArray[np.float32], sums: NDArray[np.float64], fine: int) -> None:
    """Add rows `[rows, features]` to the counts `[features, buckets]`; what is NaN counts nowhere."""
    for k, values in enumerate(x.T):
        sums[k] += np.bincount(buckets(values[~np.isnan(values)], fine), minlength=count(fine))


def buckets(values: NDArray[np.float32], fine: int) -> NDArray[np.intp]:
    """Return each value's bucket, in rising order.

    >>> buckets(np.array([-2.0, -1.0, 0.0, 1e-9, 1.0, 1.07, 2.0, 1e30], np.float32), 4).tolist()
    [335, 351, 512, 512, 673, 674, 689, 1023]
    """
    part, octave = np.frexp(np.abs(values.astype(np.float64)))  # part in [½, 1)
    place = ((octave - 1 - _LOWEST) << fine) + ((part - 0.5) * (2 << fine)).astype(np.intp) + 1
    place = np.where(np.abs(values) < 2.0**_LOWEST, 0, np.clip(place, 1, (_OCTAVES << fine) - 1))
    return np.asarray((_OCTAVES << fine) + np.where(values < 0, -place, place), np.intp)


def _lowest(places: NDArray[np.intp], fine: int) -> NDArray[np.float32]:
    """Return the least value that a bucket, and none before it, holds."""
    signed = places - (_OCTAVES << fine)
    # The last value of the bucket before, for those at and below zero: the largest of the next magnitude.
    away = np.where(signed > 0, signed - 1, -signed)
    edge = (1 + (away & ((1 << fine) - 1)) / (1 << fine)) * 2.0 ** ((away >> fine) + _LOWEST)
    below = np.nextafter(-edge.astype(np.float32), np.float32(np.inf))
    return np.where(signed > 0, edge.astype(np.float32), below)


def edges(sums: NDArray[np.float64], bins: int, fine: int) -> NDArray[np.float32]:
    """Return where bins begin `[features, bins − 1]`: as many rows in each as buckets allow; the last edge again where fewer do.

    A row belongs to the bin whose number is how many edges are not above its value.
    """
    found = np.zeros((len(sums), bins - 1), np.float32)
    for k, counts in enumerate(np.rint(np.maximum(sums, 0))):  # a masked sum is whole but for its rounding
        filled = np.flatnonzero(counts > 0)
        if len(filled) < 2:  # nothing to part: all in the last bin
            found[k] = _lowest(filled, fine) if len(filled) else 0
            continue
        below = np.cumsum(counts[filled])  # rows up to and with each of these
        wanted = np.arange(1, bins) * below[-1] / bins
        places = (
            np.unique(np.minimum(np.searchsorted(below, wanted, side="left"), len(filled) - 2))
            if len(filled) > bins
            else (np.arange(len(filled) - 1))
        )
        cuts = _lowest(filled[places + 1], fine)
        found[k] = np.concatenate([cuts, np.repeat(cuts[-1:], bins - 1 - len(cuts))])
    return found
