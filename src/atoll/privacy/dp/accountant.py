"""What noise costs: ε for a δ after so many releases, and the noise, the releases or the sampling that an ε allows.

Without sampling a row of Gaussian mechanisms is one Gaussian mechanism, whose ε has a closed form; with Poisson sampling it is
computed from the privacy loss distribution, by dp-accounting (this file is its home). Every figure is an upper bound.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from atoll.errors import PrivacyError

_INTERVAL = 1e-4
"""The width of a cell of a privacy loss distribution; its losses are rounded up, so ε is no smaller than it is."""
COARSE = 1e-3
"""The same where ε is computed many times: to solve for something, or in every round."""
_NEAR = 1e-4
"""How near a solved noise comes to the least that suffices, relatively; it lies above."""
MOST = 1e7
"""Releases, or a multiplier, beyond which nothing is solved for."""


class Release(NamedTuple):
    """What left at once: so many Gaussian mechanisms, each with this noise multiplier, of units drawn at this rate."""

    multiplier: float
    steps: int = 1
    rate: float = 1.0


@lru_cache(maxsize=4096)
def epsilon(multiplier: float, steps: int, delta: float, rate: float = 1.0, interval: float = _INTERVAL) -> float:
    """Return ε after some releases, each with Gaussian noise of `multiplier` times the sensitivity.

    Args:
        multiplier: noise's standard deviation over the sensitivity; 0 for none.
        steps: how many releases.
        delta: δ, in (0, 1).
        rate: with which chance a neighbour's part is in a release, drawn each time for itself and in secret; 1: always.
        interval: see `_INTERVAL`.

    Returns:
        ε; infinite without noise.

    Raises:
        PrivacyError: something is out of its range, or dp-accounting isn't installed.

    >>> round(epsilon(1.0, 1, 1e-5), 4), epsilon(1.0, 0, 1e-5)
    (4.3772, 0.0)
    """
    if not (multiplier >= 0 and steps >= 0 and 0 < delta < 1 and 0 <= rate <= 1):
        raise PrivacyError(f"no accounting for multiplier {multiplier}, {steps} releases, delta {delta} and rate {rate}")
    if steps == 0 or rate == 0:
        return 0.0
    if multiplier == 0:
        return math.inf
    if rate == 1:
        return _gaussian(math.sqrt(steps) / multiplier, delta)
    # Sampling never costs: the bound without it holds too, and is the nearer one where nearly everybody is drawn.
    return min(_sampled(multiplier, steps, delta, rate, interval), _gaussian(math.sqrt(steps) / multiplier, delta))


def composed(releases: Iterable[Release], delta: float) -> float:
    """Return ε of releases that may differ from one another; of equal ones it is `epsilon`'s, in coarse cells.

    Raises:
        PrivacyError: as `epsilon`.

    >>> composed([Release(2.0), Release(2.0)], 1e-5) == epsilon(2.0, 2, 1e-5)
    True
    """
    kinds = Counter[tuple[float, float]]()
    for one in releases:
        kinds[one.multiplier, one.rate] += one.steps
    if len(kinds) > 1:
        return _mixed(tuple(sorted((*kind, steps) for kind, steps in kinds.items())), delta)
    return max((epsilon(noise, steps, delta, rate, COARSE) for (noise, rate), steps in kinds.items()), default=0.0)


def multiplier_for(target: float, steps: int, delta: float, rate: float = 1.0) -> float:
    """Return the least noise multiplier with which ε stays at or under a target; other arguments as for `epsilon`.

    Raises:
        PrivacyError: as `epsilon`; or the target is not above 0, or so small that no noise is enough.
    """
    _positive(target)
    return _least(lambda noise: epsilon(noise, steps, delta, rate, COARSE) <= target, "a noise multiplier")


def steps_within(target: float, multiplier: float, delta: float, rate: float = 1.0) -> int:
    """Return the most releases with which ε stays at or under a target; other arguments as for `epsilon`."""
    _positive(target)

    def within(steps: int) -> bool:
        return epsilon(multiplier, steps, delta, rate, COARSE) <= target

    if not within(1):
        return 0
    low, high = 1, 2
    while within(high):
        low, high = high, 2 * high
        if low > MOST:
            return int(MOST)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low


def rate_within(target: float, multiplier: float, steps: int, delta: float) -> float:
    """Return the largest sampling rate with which ε stays at or under a target; 0 where none does; as `epsilon` otherwise."""
    _positive(target)
    if epsilon(multiplier, steps, delta) <= target:
        return 1.0
    low, high = 1e-9, 1.0
    if epsilon(multiplier, steps, delta, low, COARSE) > target:
        return 0.0
    while high / low > 1 + _NEAR:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if epsilon(multiplier, steps, delta, middle, COARSE) <= target else (low, middle)
    return low


def _least(enough: Callable[[float], bool], what: str) -> float:
    low, high = 0.0, 1.0
    while not enough(high):
        low, high = high, 2 * high
        if high > MOST:
            raise PrivacyError(f"{what} of {MOST:.0e} isn't enough: raise epsilon, or plan fewer rounds")
    while high - low > _NEAR * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _positive(target: float) -> None:
    if not target > 0:
        raise PrivacyError(f"an epsilon of {target}: it is above 0")


@lru_cache(maxsize=4096)
def _mixed(kinds: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """Return ε of several kinds of mechanisms, each a multiplier, a rate and how many there are."""
    if not (kinds[0][0] > 0 and 0 < delta < 1 and all(0 < rate <= 1 and steps > 0 for _, rate, steps in kinds)):
        raise PrivacyError(f"no accounting for delta {delta} and these multipliers, rates and numbers: {kinds}")
    whole = _gaussian(math.sqrt(math.fsum(steps / noise**2 for noise, _, steps in kinds)), delta)
    if all(rate == 1 for _, rate, _ in kinds):
        return whole
    first, *others = (_lost(noise, rate, COARSE).self_compose(steps) for noise, rate, steps in kinds)
    for one in others:
        first = first.compose(one)
    return min(float(first.get_epsilon_for_delta(delta)), whole)


def _sampled(multiplier: float, steps: int, delta: float, rate: float, interval: float) -> float:
    return float(_lost(multiplier, rate, interval).self_compose(steps).get_epsilon_for_delta(delta))


@lru_cache(maxsize=8)
def _lost(multiplier: float, rate: float, interval: float) -> Any:
    """Return the privacy loss distribution of one release."""
    try:
        from dp_accounting.pld import privacy_loss_distribution
    except ModuleNotFoundError as error:
        raise PrivacyError(f"accounting for sampling: {error.name} is not installed; pip install 'atoll-fl[privacy]'") from error
    return privacy_loss_distribution.from_gaussian_mechanism(
        multiplier, value_discretization_interval=interval, sampling_prob=rate
    )


def _gaussian(mu: float, delta: float) -> float:
    """Return ε of one Gaussian mechanism whose sensitivity is `mu` standard deviations.

    Source: Balle and Wang 2018, "Improving the Gaussian Mechanism for Differential Privacy", theorem 8:
    δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ).
    """

    def lost(eps: float) -> float:
        first, second = mu / 2 - eps / mu, -mu / 2 - eps / mu
        return math.exp(_log_phi(first)) - math.exp(eps + _log_phi(second))

    if lost(0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while lost(high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if lost(middle) > delta else (low, middle)
    return high


def _log_phi(x: float) -> float:
    """Return log Φ(x), also far out where Φ itself is no float any more."""
    if x > -25:
        return math.log(math.erfc(-x / math.sqrt(2)) / 2)
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log1p(-1 / x**2 + 3 / x**4 - 15 / x**6)
