"""Distributed differential privacy: each node adds a share of the noise inside a secure sum, and nobody sees less than all of it.

The server learns the sum alone, with noise in it already, and need not be trusted with updates. Shares are as large as the
smallest cohort needs whose sum is ever revealed, less those nodes that may leave theirs out; more survivors bring more noise.
"""

from __future__ import annotations

import math

from atoll.errors import PlanError, PrivacyError
from atoll.keys import Keystream
from atoll.privacy.dp.central import WITHIN, shares
from atoll.privacy.dp.clip import length, shortened, whole
from atoll.privacy.dp.noise import discrete_gaussian
from atoll.vector import Group, Groups

_FINE = 17
"""The bound is at most 2¹⁷ steps: with noise that is still a whole number that a float32 holds."""
_LEAST, _MOST = 4.0, 8.0
"""A share's standard deviation: at least so many steps, so that a sum of shares is a discrete Gaussian to 2⁻²⁰⁰ (Kairouz, Liu,
Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation", lemma 11); at most so
many bounds, so that a float32 holds it."""
_TAIL = 13.4


def step(bound: float) -> float:
    """Return the grid's step for a bound: a power of two, so that a secure sum's own numbers hold it exactly."""
    return math.ldexp(1.0, math.ceil(math.log2(bound)) - _FINE)


def share(bound: float, multiplier: float, nodes: int) -> float:
    """Return the standard deviation of one node's noise, in steps, where `nodes` nodes' together are `multiplier` bounds.

    Raises:
        PlanError: it is too small or too large to be written.
    """
    sigma = multiplier * bound / step(bound) / math.sqrt(nodes)
    if not _LEAST <= sigma <= _MOST * bound / step(bound):
        raise PlanError(
            f"privacy.distributed_noise: a share of {multiplier:g} / √{nodes} bounds can't be written exactly; it lies between "
            f"{_LEAST * 2.0 ** (1 - _FINE):.1g} and {_MOST:g}"
        )
    return sigma


def widest(bound: float, multiplier: float, nodes: int) -> float:
    """Return the largest number that a noisy update ever holds."""
    return bound + _TAIL * share(bound, multiplier, nodes) * step(bound)


def noisy(groups: Groups, bound: float, multiplier: float, nodes: int, key: bytes) -> dict[str, Group]:
    """Return an update made no longer than a bound, on the grid, with this node's share of the noise.

    Cut towards zero, so that it is no longer in whole steps either. The count within an adaptive bound (`central.WITHIN`) is no
    part of its length, and has noise of its own, see `central.shares`.

    Args:
        groups: the update's.
        bound: the longest that it may be, over all groups; 1 where it is sent in units of an adaptive one.
        multiplier: the whole noise's standard deviation over the bound.
        nodes: how many shares make the whole.
        key: 32 bytes of the operating system's generator, for this update alone.

    Raises:
        PlanError: as `share`.
    """
    sigmas, grid, stream = shares(multiplier, groups), step(bound), Keystream(key)
    long = length({name: group for name, group in groups.items() if name != WITHIN})
    scale, found = shortened(long, bound) / grid, {}
    for name in sorted(groups):
        values = groups[name].values
        drawn = discrete_gaussian(share(bound, sigmas[name], nodes), values.size, stream)
        found[name] = groups[name].with_values((whole(values, 1 / grid if name == WITHIN else scale) + drawn) * grid)
    return found


def actual(multiplier: float, survivors: int, least: int, corrupt: int) -> float:
    """Return the noise multiplier of a sum over survivors, of whom `corrupt` may have left out their share.

    Args:
        multiplier: the planned one, of a sum over `least` survivors.
        survivors: whose updates are in the sum.
        least: the fewest that shares are made for.
        corrupt: how many may not add any.

    Raises:
        PrivacyError: there are fewer: the sum must not be released.

    >>> actual(1.0, 12, 5, 1) ** 2
    2.75
    """
    if survivors < least:
        raise PrivacyError(f"the noise of {survivors} nodes falls short of the promise: it takes {least}; nothing is released")
    return multiplier * math.sqrt((survivors - corrupt) / (least - corrupt))
