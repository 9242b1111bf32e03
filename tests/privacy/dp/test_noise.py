"""The discrete Gaussian: its probabilities, by exact mass and by chi-square; its sums; its independence from floats."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from atoll.errors import PrivacyError
from atoll.keys import Keystream, new_secret
from atoll.privacy.dp import noise
from atoll.privacy.dp.clip import STEPS
from atoll.privacy.dp.noise import discrete_gaussian


def draw(sigma: float, count: int, key: bytes = bytes(32)) -> np.ndarray:
    return discrete_gaussian(sigma, count, Keystream(key))


def masses(sigma: float, most: int) -> np.ndarray:
    """The exact probabilities of −most … most."""
    mass = np.exp(-(np.arange(-most, most + 1) ** 2) / (2 * sigma**2))
    return mass / mass.sum()


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0, 3.3, 40.0, 512.0])
def test_a_table_holds_the_exact_masses(sigma):
    high, low, least = noise._table(sigma)
    thresholds = [0, *(int(h) << 64 | int(t) for h, t in zip(high, low, strict=True)), 1 << 128]
    found = np.array([float(Fraction(b - a, 1 << 128)) for a, b in itertools.pairwise(thresholds)])
    np.testing.assert_allclose(found, masses(sigma, -least), rtol=1e-9, atol=1e-36)
    assert np.array_equal(found, found[::-1]) or abs(found - found[::-1]).max() < 1e-30
    beyond = math.erfc(-least / sigma / math.sqrt(2))
    assert beyond < 2.0**-120


@pytest.mark.parametrize("sigma", [0.5, 2.0, 20.0, 700.0, 5000.0, STEPS])
def test_draws_fit_the_distribution(sigma):
    count = 200_000
    found = draw(sigma, count)
    edges = np.unique(np.rint(np.linspace(-3, 3, 25) * sigma)) + 0.5
    seen = np.histogram(found, [-np.inf, *edges, np.inf])[0]
    most = math.ceil(8 * sigma)
    if sigma < 1000:
        sums = np.concatenate([[0], np.cumsum(masses(sigma, most))])
        places = np.clip((edges - 0.5).astype(int) + most + 1, 0, len(sums) - 1)
        below = sums[places]
    else:  # so wide that the continuous one is the same, with half a step's correction
        below = np.array([math.erfc(-edge / sigma / math.sqrt(2)) / 2 for edge in edges])
    wanted = np.diff([0, *below, 1]) * count
    keep = wanted > 5
    chi = ((seen - wanted)[keep] ** 2 / wanted[keep]).sum()
    degrees = keep.sum() - 1
    assert chi < degrees + 5 * math.sqrt(2 * degrees) + 5, f"chi-square {chi:.1f} with {degrees} degrees of freedom"


def test_a_wrong_deviation_is_noticed():
    count, found = 200_000, draw(20.0, 200_000)
    off = abs(found.std() / 20 - 1)
    assert off < 5 / math.sqrt(2 * count)
    assert abs(found.std() / 20.4 - 1) > 5 / math.sqrt(2 * count)


def test_neighbours_are_uncorrelated_and_the_last_bits_are_even():
    found = draw(STEPS, 200_000, bytes([7]) * 32)
    correlation = np.corrcoef(found[:-1], found[1:])[0, 1]
    assert abs(correlation) < 5 / math.sqrt(len(found))
    for bit in range(12):  # a sum of a coarse and a fine part: no residue is preferred
        ones = (found >> bit & 1).mean()
        assert abs(ones - 0.5) < 5 / (2 * math.sqrt(len(found))), bit


def test_the_same_key_gives_the_same_noise_and_another_another():
    assert np.array_equal(draw(STEPS, 1000), draw(STEPS, 1000))
    assert not np.array_equal(draw(STEPS, 1000), draw(STEPS, 1000, new_secret()))


def test_the_quick_search_is_the_plain_one():
    rng = np.random.default_rng(0)
    for sigma in (0.3, 5.0, 512.0):
        high = noise._table(sigma)[0]
        words = np.concatenate([rng.integers(0, 1 << 64, 50_000, np.uint64), high, high + np.uint64(1), high - np.uint64(1)])
        assert np.array_equal(noise._found(high, noise._starts(sigma), words), np.searchsorted(high, words))


def test_a_draw_between_two_thresholds_that_agree_in_64_bits_is_decided_by_the_rest(monkeypatch):
    tied = (np.array([5, 5, 9], np.uint64), np.array([10, 20, 0], np.uint64), -1)
    monkeypatch.setattr(noise, "_table", lambda sigma: tied)
    monkeypatch.setattr(noise, "_starts", noise._starts.__wrapped__)

    class Bytes:
        def __init__(self, *words: int) -> None:
            self.words = list(words)

        def take(self, count: int) -> bytes:
            return b"".join(self.words.pop(0).to_bytes(8, "little") for _ in range(count // 8))

    for rest, place in ((9, 0), (10, 1), (19, 1), (20, 2)):
        assert discrete_gaussian(1.0, 1, Bytes(5, rest)).tolist() == [place - 1]
    assert discrete_gaussian(1.0, 3, Bytes(4, 6, 9, 0)).tolist() == [-1, 1, 2]


@pytest.mark.parametrize("sigma", [0.0, -1.0, 0.05, math.inf, math.nan, 2.0**51])
def test_deviations_out_of_range_are_refused(sigma):
    with pytest.raises(PrivacyError, match="between"):
        draw(sigma, 1)
