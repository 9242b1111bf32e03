"""Shares: any threshold of them is the secret, one fewer is nothing, and a liar is found."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import PrivacyError
from atoll.keys import Keystream, new_secret
from atoll.privacy.shamir import PRIME, combine, recover, split

SECRETS = st.integers(0, PRIME - 1).map(lambda value: value.to_bytes(32, "little"))


def number(value: int) -> bytes:
    return (value % PRIME).to_bytes(32, "little")


def test_the_modulus_is_the_largest_prime_below_two_to_the_256():
    def prime(n: int) -> bool:
        odd, twos = n - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        return all(
            (x := pow(base, odd, n)) in {1, n - 1} or any((x := x * x % n) == n - 1 for _ in range(twos - 1))
            for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
        )

    assert [n for n in range(PRIME, 2**256) if math.gcd(n, 2 * 3 * 5 * 7) == 1 and prime(n)] == [PRIME]


def test_known_vectors():
    # 1234 + 166 x + 94 x², the textbook's example: Wikipedia, Shamir's secret sharing (there over the integers).
    vector = {1: 1494, 2: 1942, 3: 2578, 4: 3402, 5: 4414, 6: 5614}
    for chosen in [(2, 4, 5), (1, 2, 3), (6, 1, 4)]:
        assert combine({holder: number(vector[holder]) for holder in chosen}) == number(1234)
    # Wraps around the modulus: (PRIME - 1) + (PRIME - 2) x, that is, -1 - 2x.
    assert combine({1: number(-3), 5: number(-11)}) == number(-1)


@given(SECRETS, st.integers(1, 30), st.integers(0, 10), st.randoms(use_true_random=False))
def test_any_threshold_of_shares_is_the_secret(secret, threshold, surplus, random):
    holders = random.sample(range(1, 1000), threshold + surplus)
    shares = dict(zip(holders, split(secret, threshold, holders, Keystream(new_secret())), strict=True))
    assert combine({holder: shares[holder] for holder in random.sample(holders, threshold)}) == secret
    assert combine(shares) == secret


@given(SECRETS, SECRETS, st.integers(2, 12))
def test_one_share_fewer_fits_every_secret_alike(secret, other, threshold):
    holders = list(range(1, threshold + 1))
    known = dict(zip(holders, split(secret, threshold, holders, Keystream(new_secret())), strict=True))
    del known[threshold]
    # Whatever the secret, there is just one last share that makes it fit; so what is known excludes none.
    through = {0: other, **known}
    last = sum(
        int.from_bytes(through[i], "little") * math.prod((threshold - j) * pow(i - j, -1, PRIME) for j in through if j != i)
        for i in through
    )
    assert combine({**known, threshold: number(last)}) == other


@given(st.integers(2, 12), st.integers(0, 4), st.integers(0, 1), st.data())
def test_liars_are_found_up_to_half_of_the_surplus(threshold, wrong, spare, data):
    secret = number(int.from_bytes(new_secret(), "little"))
    holders = list(range(1, threshold + 2 * wrong + spare + 1))
    shares = dict(zip(holders, split(secret, threshold, holders, Keystream(new_secret())), strict=True))
    liars = data.draw(st.sets(st.sampled_from(holders), min_size=wrong, max_size=wrong))
    for liar in liars:
        shares[liar] = number(int.from_bytes(shares[liar], "little") + 1 + liar)
    found, named = recover(shares, threshold, lambda value: value == secret)
    assert found == secret
    assert set(named) == (liars if liars & set(holders[:threshold]) else set())


def test_too_few_and_too_wrong_shares_are_refused():
    holders = [1, 2, 3, 4]
    shares = dict(zip(holders, split(number(7), 3, holders, Keystream(new_secret())), strict=True))
    with pytest.raises(PrivacyError, match="2 shares: it takes 3"):
        recover({1: shares[1], 2: shares[2]}, 3, lambda value: value == number(7))
    with pytest.raises(PrivacyError, match="more than 0 of them are wrong"):
        recover({**shares, 2: number(5)}, 3, lambda value: value == number(7))


@pytest.mark.parametrize("holders", [[0, 1, 2], [1, 1, 2], [1, 2]], ids=["the secret itself", "twice", "too few"])
def test_holders_that_make_no_sense_are_refused(holders):
    with pytest.raises(ValueError, match="shares: holders must"):
        split(number(7), 3, holders, Keystream(new_secret()))


def test_the_stream_decides_the_shares_and_a_secret_beyond_the_field_is_refused():
    key = new_secret()
    assert split(number(7), 3, [1, 2, 3], Keystream(key)) == split(number(7), 3, [1, 2, 3], Keystream(key))
    with pytest.raises(ValueError, match="below"):
        split(b"\xff" * 32, 3, [1, 2, 3], Keystream(key))


def test_51_of_100_is_quick():
    secret, holders, best = number(7), range(1, 101), math.inf
    for _ in range(20):
        began = time.perf_counter()
        split(secret, 51, holders, Keystream(bytes(32)))
        best = min(best, time.perf_counter() - began)
    assert best < 0.01  # ten to twenty times what it takes: a busy machine is no failure
