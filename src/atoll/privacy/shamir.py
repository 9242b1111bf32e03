"""Secrets in shares (Shamir 1979): any `threshold` of them give the secret back, one fewer tell nothing at all.

Over the integers modulo the largest prime below 2²⁵⁶, so a key of 32 bytes is one element and a share is as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache

from atoll.errors import PrivacyError
from atoll.keys import SECRET, Keystream

PRIME = 2**256 - 189
_LAZY = 32
"""Steps between two reductions: holders are small, and a long division costs more than a few digits more."""


def elements(stream: Keystream) -> Iterator[int]:
    """Yield uniform elements of the field."""
    while True:
        value = int.from_bytes(stream.take(SECRET), "little")
        if value < PRIME:  # fails once in 2²⁴⁸
            yield value


def split(secret: bytes, threshold: int, holders: Sequence[int], stream: Keystream) -> list[bytes]:
    """Return a share of 32 bytes for each holder, in their order.

    Args:
        secret: 32 bytes, little-endian, below `PRIME`.
        threshold: how many shares give it back.
        holders: where the polynomial is evaluated: distinct, from 1 on.
        stream: where the polynomial's other coefficients come from; secret, and used for nothing else.

    Raises:
        ValueError: the secret is no element, holders repeat or are too few, or one of them is 0: its share would be the secret.
    """
    constant = int.from_bytes(secret, "little")
    if len(secret) != SECRET or constant >= PRIME:
        raise ValueError(f"a secret has {SECRET} bytes and is below 2**256 - 189")
    if not 1 <= threshold <= len(holders) or len(set(holders)) < len(holders) or min(holders) < 1 or max(holders) >= PRIME:
        raise ValueError(f"{threshold} of {len(holders)} shares: holders must be as many, distinct, and from 1 on")
    source = elements(stream)
    descending = [*(next(source) for _ in range(threshold - 1)), constant]
    shares = []
    for holder in holders:
        value = 0
        for lo in range(0, threshold, _LAZY):
            for coefficient in descending[lo : lo + _LAZY]:
                value = value * holder + coefficient
            value %= PRIME
        shares.append(value.to_bytes(SECRET, "little"))
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret that shares were made of: all of them are used, so give `threshold` of them.

    Wrong shares, or too few, give a wrong secret and no error: see `recover`.

    Args:
        shares: by holder.
    """
    holders = tuple(sorted(shares))
    factors = _at_zero(holders)
    total = sum(factor * int.from_bytes(shares[holder], "little") for factor, holder in zip(factors, holders, strict=True))
    return (total % PRIME).to_bytes(SECRET, "little")


@lru_cache(maxsize=64)
def _at_zero(holders: tuple[int, ...]) -> tuple[int, ...]:
    """Return Lagrange's coefficients at 0: Π xⱼ / Π (xⱼ - xᵢ). Many secrets with the same holders share them."""
    tops, bottoms = [], []
    for one in holders:
        top = bottom = 1
        for other in holders:
            if other != one:
                top = top * other % PRIME
                bottom = bottom * (other - one) % PRIME
        tops.append(top)
        bottoms.append(bottom)
    before = [1]
    for bottom in bottoms:
        before.append(before[-1] * bottom % PRIME)
    inverse = pow(before[-1], -1, PRIME)  # one inversion for all of them (Montgomery's trick)
    factors = []
    for place in reversed(range(len(holders))):
        factors.append(tops[place] * inverse * before[place] % PRIME)
        inverse = inverse * bottoms[place] % PRIME
    return tuple(reversed(factors))


def recover(shares: Mapping[int, bytes], threshold: int, right: Callable[[bytes], bool]) -> tuple[bytes, tuple[int, ...]]:
    """Return the secret although some shares may be wrong, and the holders of those that were found to be.

    The first `threshold` shares are tried; when they give nothing right, up to half of the surplus may be wrong (Gao 2003,
    decoding Reed-Solomon codes).

    Args:
        shares: by holder.
        threshold: how many shares give the secret back.
        right: says whether a secret is the one that was split, by its hash or public key.

    Raises:
        PrivacyError: there are too few, or too many of them are wrong.
    """
    if len(shares) < threshold:
        raise PrivacyError(f"{len(shares)} shares: it takes {threshold}")
    holders = sorted(shares)
    secret = combine({holder: shares[holder] for holder in holders[:threshold]})
    if right(secret):
        return secret, ()
    values = [int.from_bytes(shares[holder], "little") % PRIME for holder in holders]
    found = _decode(holders, values, threshold)
    if not found or not right(secret := found[0].to_bytes(SECRET, "little")):
        raise PrivacyError(
            f"{len(shares)} shares give no secret that fits: more than {(len(shares) - threshold) // 2} of them are wrong"
        )
    return secret, tuple(holder for holder, value in zip(holders, values, strict=True) if _at(found, holder) != value)


Polynomial = list[int]
"""Coefficients modulo the prime, the constant first, the last one not 0."""


def _decode(points: Sequence[int], values: Sequence[int], threshold: int) -> Polynomial | None:
    """Return the polynomial of a degree below `threshold` that goes through all points but at most half of the surplus."""
    whole, through = [1], [0]
    for point, value in zip(points, values, strict=True):  # Newton's interpolation, one point after the other
        scale = (value - _at(through, point)) * pow(_at(whole, point), -1, PRIME)
        through = _plus(through, whole, scale)
        whole = _plus([0, *whole], whole, -point)
    before, now, factor_before, factor = whole, through, [0], [1]
    while 2 * (len(now) - 1) >= len(points) + threshold:
        quotient, rest = _divide(before, now)
        before, now = now, rest
        product = [0]
        for power, coefficient in enumerate(quotient):
            product = _plus(product, [0] * power + factor, coefficient)
        factor_before, factor = factor, _plus(factor_before, product, -1)
    found, rest = _divide(now, factor)
    return found if rest == [0] and len(found) <= threshold else None


def _at(polynomial: Polynomial, point: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * point + coefficient) % PRIME
    return value


def _plus(one: Polynomial, other: Polynomial, scale: int) -> Polynomial:
    """Return one + scale · other."""
    size = max(len(one), len(other))
    left, right = one + [0] * (size - len(one)), other + [0] * (size - len(other))
    return _trim([(a + scale * b) % PRIME for a, b in zip(left, right, strict=True)])


def _divide(top: Polynomial, bottom: Polynomial) -> tuple[Polynomial, Polynomial]:
    rest, inverse = list(top), pow(bottom[-1], -1, PRIME)
    quotient = [0] * max(1, len(top) - len(bottom) + 1)
    for power in reversed(range(len(top) - len(bottom) + 1)):
        quotient[power] = scale = rest[power + len(bottom) - 1] * inverse % PRIME
        for place, coefficient in enumerate(bottom):
            rest[power + place] = (rest[power + place] - scale * coefficient) % PRIME
    return _trim(quotient), _trim(rest)


def _trim(polynomial: Polynomial) -> Polynomial:
    while len(polynomial) > 1 and not polynomial[-1]:
        polynomial.pop()
    return polynomial
