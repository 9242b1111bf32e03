"""Noise in whole numbers: a discrete Gaussian, by a table, from a key of the operating system's generator.

Floating-point noise betrays what it was added to: not every float can come out (Mironov 2012, "On Significance of the Least
Significant Bits for Differential Privacy"). So values are put on a grid first, whole steps of it are added up exactly, and the
noise is a whole number of steps too. What is made of the sum afterwards, rounding too, can undo nothing.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from atoll.errors import PrivacyError
from atoll.keys import Keystream

_TAIL = 13.3
"""Standard deviations beyond which less than 2⁻¹²⁸ of the mass lies."""
_WIDEST = 512.0
"""The largest standard deviation that one table is made for: it stays in a core's own cache."""
_APART = 3
"""A part's standard deviation, in steps of the next coarser one: their sum is then a discrete Gaussian to 2⁻²⁵⁰."""
_BITS, _WORD = 320, 64
_BLOCK, _TRIES = 1 << 16, 3


def discrete_gaussian(sigma: float, count: int, stream: Keystream) -> NDArray[np.int64]:
    """Draw from the discrete Gaussian of standard deviation `sigma`: P(x) ∝ exp(−x²/2σ²) over all whole numbers.

    Up to σ = 512 by inversion, of 128 bits each; a larger one is k·x₁ + x₂ of two smaller ones, σ₂ = 3k, whose sum is one
    again as far as the coarse one's lattice is smooth under the fine one: 2·exp(−2π²·σ₂²/k²) in probability, 2⁻²⁵⁰.

    Args:
        sigma: in steps of the grid; at least 0.1, at most 2⁵⁰.
        count: how many.
        stream: of a key that is used for nothing else; `new_secret()` is one.

    Returns:
        `[count]`.

    Raises:
        PrivacyError: sigma is out of its range.

    Source: Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy"; Micciancio and Walter 2017,
    "Gaussian Sampling over the Integers", theorem 3 (sums over lattices).
    """
    if not 0.1 <= sigma <= 2.0**50:
        raise PrivacyError(f"noise of standard deviation {sigma:g} on a grid of whole numbers: it lies between 0.1 and 2^50")
    if sigma <= _WIDEST:
        return _by_table(sigma, count, stream)
    k = 1 << math.ceil(math.log2(sigma / _WIDEST))
    if k * _APART > _WIDEST:  # so far apart that the fine part is better made of two as well
        k = 1 << math.ceil(math.log2(sigma / _WIDEST) / 2)
    fine = float(_APART * k)
    coarse = math.sqrt(sigma * sigma - fine * fine) / k
    drawn = discrete_gaussian(coarse, count, stream)
    drawn *= k
    drawn += discrete_gaussian(fine, count, stream)
    return drawn


def _by_table(sigma: float, count: int, stream: Keystream) -> NDArray[np.int64]:
    high, low, least = _table(sigma)
    words = np.frombuffer(stream.take(8 * count), np.uint64)
    places = np.empty(count, np.int64)
    for lo in range(0, count, _BLOCK):
        places[lo : lo + _BLOCK] = _found(high, _starts(sigma), words[lo : lo + _BLOCK])
    # Where the first 64 bits are a threshold's own, the next 64 decide: it happens once in 2⁵⁰ draws.
    for at in np.flatnonzero(high[np.minimum(places, len(high) - 1)] == words):
        rest = int.from_bytes(stream.take(8), "little")
        while places[at] < len(high) and high[places[at]] == words[at] and low[places[at]] <= rest:
            places[at] += 1
    places += least
    return places


def _found(high: NDArray[np.uint64], starts: NDArray[np.int64], words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return how many thresholds lie below each word, as `np.searchsorted`, and quicker: most words' 16 upper bits say it."""
    upper = (words >> np.uint64(48)).astype(np.intp)
    places, ends = starts[upper], starts[upper + 1]
    left = np.flatnonzero(places < ends)
    for _ in range(_TRIES):
        at = left[high[places[left]] < words[left]]
        places[at] += 1
        left = at[places[at] < ends[at]]
    places[left] = np.searchsorted(high, words[left])
    return places


@lru_cache(maxsize=16)
def _starts(sigma: float) -> NDArray[np.int64]:
    """Return how many thresholds have smaller 16 upper bits than each number up to 2¹⁶."""
    return np.searchsorted(_table(sigma)[0] >> np.uint64(48), np.arange((1 << 16) + 1, dtype=np.uint64))


@lru_cache(maxsize=16)
def _table(sigma: float) -> tuple[NDArray[np.uint64], NDArray[np.uint64], int]:
    """Return the cumulative probabilities of all values but the last, as 128 bits in two words, and the least value.

    Computed in whole numbers of 320 bits: e^(−(k+1)²/2σ²) = e^(−k²/2σ²) · e^(−(2k+1)/2σ²), whose last factor goes on by
    e^(−1/σ²).
    """
    most, one = math.ceil(_TAIL * sigma), 1 << _BITS
    factor, ratio = _exp(sigma, 1), _exp(sigma, 2)
    masses = [one]
    for _ in range(most):
        masses.append(masses[-1] * factor >> _BITS)
        factor = factor * ratio >> _BITS
    both = masses[:0:-1] + masses
    whole, total, high, low = sum(both), 0, [], []
    for mass in both[:-1]:
        total += mass
        threshold = min((total << 2 * _WORD) // whole, (1 << 2 * _WORD) - 1)
        high.append(threshold >> _WORD)
        low.append(threshold & ((1 << _WORD) - 1))
    return np.array(high, np.uint64), np.array(low, np.uint64), -most


def _exp(sigma: float, times: int) -> int:
    """Return e^(−times/2σ²) in steps of 2^-320, by its series: the exponent is exact, as a fraction of whole numbers."""
    top, bottom = sigma.as_integer_ratio()
    numerator, denominator = times * bottom * bottom, 2 * top * top
    term = total = 1 << _BITS
    for k in range(1, 400):
        term = -term * numerator // (denominator * k)
        total += term
        if -1 <= term <= 1:
            break
    return total
