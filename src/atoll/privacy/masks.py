"""Masks: the words that a key stands for, added to or taken from an update in place.

A mask is a pad made by AES-256-CTR under a key of 32 bytes (`atoll.keys.Pad`), read as little-endian words: uniform modulo 2¹⁶,
2³² or 2⁶⁴ to anybody without the key. One key masks one update: all its parts, one after the other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from atoll.keys import Pad
from atoll.privacy.fixed import Words

_BLOCK = 1 << 18
"""Bytes at a time: what is masked, the mask and the numbers it is made of stay in a core's cache."""
_KEYS = 512
"""Keys at a time: each holds a cipher's state."""
_ALIGN = 16
"""A cipher's block: a stream can begin there, and so does each part, and each thread."""
_WORTH = 1 << 24
"""Bytes of masks from which threads are worth starting: ciphers and numpy let go of Python's lock."""
_MOST = 8
"""Threads at most."""


def apply(parts: Sequence[Words], plus: Sequence[bytes], minus: Sequence[bytes] = (), threads: int | None = None) -> None:
    """Add the masks of some keys to an update, and take those of others from it, in place.

    The same words whatever the number of threads. Memory: three blocks a thread.

    Args:
        parts: flat, contiguous arrays of uint16, uint32 or uint64.
        plus: keys of 32 bytes, whose masks are added.
        minus: keys of 32 bytes, whose masks are subtracted.
        threads: how many share the work; as many as the machine has cores, when it is worth it, if None.
    """
    start = 0
    for part in parts:
        count = threads or (min(os.cpu_count() or 1, _MOST) if part.nbytes * (len(plus) + len(minus)) >= _WORTH else 1)
        step = max(_ALIGN, _aligned(-(-part.nbytes // count))) // part.itemsize
        pieces = [(part[lo : lo + step], start + lo * part.itemsize) for lo in range(0, part.size, step)]
        if len(pieces) < 2:
            for words, first in pieces:
                _apply(words, first, plus, minus)
        else:
            with ThreadPoolExecutor(len(pieces)) as pool:
                for _ in pool.map(lambda piece: _apply(piece[0], piece[1], plus, minus), pieces):
                    pass  # an error comes out here
        start += _aligned(part.nbytes)


def _aligned(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN


def _apply(words: Words, start: int, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    size = min(_BLOCK, _aligned(words.nbytes))
    places = np.arange(1, size // _ALIGN + 1, dtype=np.uint64)
    numbers = np.zeros((places.size, 2), ">u8")
    mask = np.empty(size // words.itemsize, words.dtype.newbyteorder("<"))
    given, into = numbers.data.cast("B"), mask.data.cast("B")
    for keys, act in ((plus, np.add), (minus, np.subtract)):
        for first in range(0, len(keys), _KEYS):
            pads = [Pad(key, start) for key in keys[first : first + _KEYS]]
            for lo in range(0, words.size, mask.size):
                block = words[lo : lo + mask.size]
                np.add(places, np.uint64((start + lo * words.itemsize) // _ALIGN), out=numbers[:, 1])
                these, here, made = given[: block.nbytes], into[: block.nbytes], mask[: block.size]
                for pad in pads:
                    pad.fill(these, here)
                    act(block, made, out=block)
