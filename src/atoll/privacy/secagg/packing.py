"""Sets and tables of a cohort's nodes as bytes: nodes go by their numbers, and what isn't in order is refused."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from atoll.errors import PrivacyError


def pack_set(places: AbstractSet[int], count: int) -> bytes:
    """Return some numbers below `count` as one bit each."""
    return sum(1 << place for place in places).to_bytes(set_bytes(count), "little")


def set_bytes(count: int) -> int:
    """Return how many bytes a set of numbers below `count` takes."""
    return -(-count // 8)


def unpack_set(data: bytes, count: int) -> frozenset[int]:
    """Return the numbers that `pack_set` packed.

    Raises:
        PrivacyError: it isn't that long, or has numbers beyond.
    """
    bits = int.from_bytes(data, "little")
    if len(data) != set_bytes(count) or bits >> count:
        raise PrivacyError("a set of nodes that isn't one of this cohort")
    return frozenset(place for place in range(count) if bits >> place & 1)


def pack_table(rows: Mapping[int, bytes]) -> bytes:
    """Return equally long entries by number: two bytes for each number, in order, and the entry."""
    return b"".join(place.to_bytes(2, "little") + rows[place] for place in sorted(rows))


def unpack_table(data: bytes, width: int, count: int) -> dict[int, bytes]:
    """Return the entries of `width` bytes that `pack_table` packed, by numbers below `count`.

    Raises:
        PrivacyError: it is no such table: a rest, a number twice or beyond.
    """
    rows, last = {}, -1
    for lo in range(0, len(data), 2 + width):
        place = int.from_bytes(data[lo : lo + 2], "little")
        if not last < place < count or lo + 2 + width > len(data):
            raise PrivacyError("a table of nodes that is cut, or names one twice, or one that isn't in this cohort")
        rows[place], last = data[lo + 2 : lo + 2 + width], place
    return rows
