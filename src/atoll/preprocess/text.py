"""Text as numbers, by rules that the plan states: nothing is learnt from data, so nothing of it is told.

Every node makes the same numbers of the same text, and none has to say which words its rows hold.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_SIGN = 1 << 31
NOTHING = -1
"""The target where a text has ended."""


def hashed(texts: Iterable[Any], size: int) -> NDArray[np.float32]:
    """Return how often each word occurs, as rows `[texts, size]` of length 1; text without a word is a row of zeros.

    A word, in lower case, is counted in the place that its CRC-32 says, up or down by the checksum's top bit: words that
    share a place then cancel out on the average.

    Source: Weinberger et al. 2009, "Feature Hashing for Large Scale Multitask Learning", definition 1.

    >>> (hashed(["Good soup, GOOD!", "…"], 4) * 5**0.5).round().tolist()
    [[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    rows = [_WORD.findall(str(text).lower()) for text in texts]
    known = {word: zlib.crc32(word.encode()) for words in rows for word in words}
    counts = np.zeros((len(rows), size), np.float32)
    for row, words in zip(counts, rows, strict=True):
        for word in words:
            row[known[word] % size] += -1 if known[word] & _SIGN else 1
    counts /= np.maximum(1, np.linalg.norm(counts, axis=1, keepdims=True))
    return counts


def spelled(texts: Iterable[Any], length: int, alphabet: str) -> NDArray[np.int32]:
    """Return the first characters of each text by their places in an alphabet, `[texts, length]`.

    Places begin at 1; what isn't in the alphabet is one more than its length, and 0 is behind the text's end.

    >>> spelled(["abca", "b?"], 3, "abc").tolist()
    [[1, 2, 3], [2, 4, 0]]
    """
    places = {character: at for at, character in enumerate(alphabet, 1)}
    other, rows = len(alphabet) + 1, [str(text)[:length] for text in texts]
    codes = np.zeros((len(rows), length), np.int32)
    for row, text in zip(codes, rows, strict=True):
        row[: len(text)] = [places.get(character, other) for character in text]
    return codes


def foretold(texts: Iterable[Any], length: int, alphabet: str) -> NDArray[np.int32]:
    """Return what comes after each character of `spelled`: another one, 0 for the text's end, and behind that `NOTHING`.

    >>> foretold(["abca", "b?"], 3, "abc").tolist()
    [[2, 3, 1], [4, 0, -1]]
    """
    rows = [str(text) for text in texts]
    codes = spelled(rows, length + 1, alphabet)[:, 1:]
    ends = np.array([len(text) for text in rows], np.intp)
    codes[np.arange(length) >= ends[:, None]] = NOTHING
    return codes
