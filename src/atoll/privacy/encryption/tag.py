"""A tag of ciphertexts that only holders of a key can make, and that adds up when they do (Agrawal and Boneh 2009).

A tag is the inner product of all words with secret numbers, modulo a prime, twice; each node hides its own under a pad. The
server, which knows neither, adds up tags as it adds up ciphertexts. The sum's tag is right for the sum of just those nodes'
ciphertexts, and for anything else with a probability below 2⁻⁶¹.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from atoll.keys import Keystream, derive

_PRIME = (1 << 32) - 5
_TIMES = 2
SIZE = _TIMES
"""Words of a tag, uint64."""


class Fingerprint:
    """The inner product of words that come one part after the other, with numbers that a key makes.

    Args:
        secret: 32 bytes.
    """

    def __init__(self, secret: bytes) -> None:
        self._stream = Keystream(derive(secret, b"ckks tag"))
        self._sums = [0] * _TIMES

    def add(self, words: NDArray[np.uint64]) -> None:
        """Take in the next words: whole numbers of 64 bits, not only modulo something."""
        for lo in range(0, words.size, 1 << 15):
            # In quarters of a word, so that 2¹⁵ products of 16 and 32 bits can be added up in 64.
            part = words.reshape(-1)[lo : lo + (1 << 15)].astype("<u8", copy=False).view("<u2").reshape(-1, 4)
            quarters = part.T.astype(np.uint64)
            factors = np.frombuffer(self._stream.take(4 * _TIMES * len(part)), "<u4").reshape(_TIMES, -1).astype(np.uint64)
            for time in range(_TIMES):
                products = (quarters @ factors[time]).tolist()
                self._sums[time] += sum(product << (16 * place) for place, product in enumerate(products))

    @property
    def value(self) -> list[int]:
        """What has come so far, as numbers below the prime."""
        return [total % _PRIME for total in self._sums]


def hidden(value: list[int], secret: bytes, place: int) -> NDArray[np.uint64]:
    """Return a node's tag: its fingerprint under its pad."""
    return np.array([(one + pad) % _PRIME for one, pad in zip(value, _pads(secret, place), strict=True)], np.uint64)


def matches(value: list[int], total: NDArray[np.uint64], secret: bytes, places: Iterable[int]) -> bool:
    """Say whether a sum's fingerprint is the one that the sum of some nodes' tags says."""
    said = [int(one) for one in total]
    for place in places:
        said = [one - pad for one, pad in zip(said, _pads(secret, place), strict=True)]
    return [one % _PRIME for one in said] == value


def _pads(secret: bytes, place: int) -> list[int]:
    stream = derive(secret, b"ckks pad " + place.to_bytes(2, "little"))
    return [int.from_bytes(stream[16 * time : 16 * time + 16], "little") % _PRIME for time in range(_TIMES)]
