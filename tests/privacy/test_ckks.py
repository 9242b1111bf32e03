"""CKKS as TenSEAL does it: what is encrypted adds up, multiplies and comes back; nothing else is written anywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.errors import PlanError, PrivacyError
from atoll.privacy import ckks
from atoll.privacy.ckks import STANDARD, Flood, Key, Parameters, decrypt, encrypt, multiply, reduce, room_for

RING = Parameters(8192, (54, 54, 55))
KEY = Key(RING, b"k" * 32)
SCALE = 2.0**80
SMALL = Parameters(4096, (36, 36, 37))


def slots(seed: int, largest: float = 1.0, count: int = RING.slots) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.uniform(-1, 1, count) + 1j * rng.uniform(-1, 1, count)) * largest


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 1024), st.floats(1e-6, 1.0), st.integers(1, 4))
def test_as_many_as_are_allowed_add_up_with_the_largest_scale(count, largest, chunks):
    scale = room_for(RING, count)
    one = [slots(number, largest) for number in range(chunks)]
    words = list(encrypt(KEY, one, scale))
    # The same ciphertext that often is the worst of all sums: noise and numbers add up in the same direction.
    back = list(decrypt(KEY, (each * np.uint64(count) for each in words), scale))
    for got, put in zip(back, one, strict=True):
        assert np.abs(got - count * put).max() <= count * (1e-13 + 2.0**20 / scale)


def test_the_largest_sum_fills_its_words_and_does_not_run_over():
    count, scale = RING.additions, room_for(RING, RING.additions)
    assert count == 1024
    [words] = encrypt(KEY, [np.full(RING.slots, 1 + 1j)], scale)
    assert int(words.max()) * count < 1 << 64
    [back] = decrypt(KEY, [words * np.uint64(count)], scale)
    assert np.abs(back - count * (1 + 1j)).max() < 1e-6


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_products_with_plain_numbers(seed):
    one, by = slots(seed), slots(seed + 1)
    products = multiply(RING, encrypt(KEY, [one], 2.0**45), [by], 2.0**45, 2.0**40)
    [back] = decrypt(KEY, products, 2.0**85)
    assert np.abs(back - one * by).max() < 1e-7


def test_sums_of_different_ciphertexts_are_reduced_before_a_product():
    total = sum(next(encrypt(KEY, [slots(number)], 2.0**45)) for number in range(50))
    assert (reduce(RING, total) < RING.moduli).all()
    [back] = decrypt(KEY, multiply(RING, [total], [np.full(RING.slots, 0.5)], 2.0**45, 2.0**40), 2.0**85)
    assert np.abs(back - 0.5 * sum(slots(number) for number in range(50))).max() < 1e-6


def test_other_parameters_serve_as_well():
    key = Key(SMALL, bytes(32))
    one = slots(1, count=SMALL.slots)
    [words] = encrypt(key, [one], 2.0**55)
    assert words.shape == (2, 2, 4096)
    [back] = decrypt(key, [words], 2.0**55)
    assert np.abs(back - one).max() < 1e-12


def test_the_same_secret_makes_the_same_key_and_another_one_another():
    one = slots(2)
    [words] = encrypt(KEY, [one], SCALE)
    [back] = decrypt(Key(RING, b"k" * 32), [words], SCALE)
    assert np.abs(back - one).max() < 1e-12
    [garbage] = decrypt(Key(RING, b"l" * 32), [words], SCALE)
    assert np.abs(garbage).min() > 1


def test_no_two_ciphertexts_share_their_randomness():
    # The key is made of a seed; were ciphertexts too, two of them would differ by the plain difference of their numbers.
    first, second = encrypt(KEY, [slots(1), slots(1)], SCALE)
    [third] = encrypt(Key(RING, b"k" * 32), [slots(1)], SCALE)
    for one, other in ((first, second), (first, third), (second, third)):
        assert (one[1] != other[1]).mean() > 0.999
        assert (one[0] != other[0]).mean() > 0.999


def test_a_ciphertext_looks_like_random_numbers():
    [words] = encrypt(KEY, [np.full(RING.slots, 1.0)], SCALE)
    for place, prime in enumerate(RING.moduli[:, 0].tolist()):
        counts = np.histogram(words[:, place].ravel() / prime, bins=64, range=(0, 1))[0]
        chi = float(((counts - 256) ** 2 / 256).sum())
        assert chi < 130  # 63 degrees of freedom: beyond it once in 10⁶


def test_noise_is_what_the_parameters_say():
    # Per slot √degree · deviation, over the scale; a sum of n has √n as much.
    zeros = [np.zeros(RING.slots)] * 40
    fresh = np.concatenate(list(decrypt(KEY, encrypt(KEY, zeros[:10], 2.0**45), 2.0**45)))
    total = sum(encrypt(KEY, zeros, 2.0**45))
    [added] = decrypt(KEY, [total], 2.0**45)
    expected = ckks.DEVIATION * math.sqrt(RING.degree) / 2**45
    assert np.sqrt(np.mean(np.abs(fresh) ** 2)) == pytest.approx(expected, rel=0.05)
    assert np.sqrt(np.mean(np.abs(added) ** 2)) == pytest.approx(expected * math.sqrt(40), rel=0.05)


def test_a_flood_has_its_deviation_in_each_coefficient_and_is_the_same_for_all():
    zeros = [np.zeros(RING.slots)] * 3
    words = list(encrypt(KEY, zeros, SCALE))
    one, again, other = (list(decrypt(KEY, words, SCALE, Flood(secret * 32, 2.0**60))) for secret in (b"a", b"a", b"b"))
    assert (np.array(one) == np.array(again)).all()
    noise, else_ = np.concatenate(one), np.concatenate(other)
    expected = 2.0**60 * math.sqrt(RING.degree) / SCALE
    for found in (noise, else_, noise - else_):
        assert np.sqrt(np.mean(np.abs(found) ** 2)) == pytest.approx(
            expected * (math.sqrt(2) if found is not noise and found is not else_ else 1), rel=0.05
        )
    assert abs(np.corrcoef(noise.real, else_.real)[0, 1]) < 0.05
    assert abs(np.corrcoef(noise.real, noise.imag)[0, 1]) < 0.05
    assert len(set(np.round(noise.real, 40))) > 12_000  # no chunk has another's


@pytest.mark.parametrize("degree", STANDARD)
def test_parameters_below_128_bits_of_security_are_refused(degree):
    most = STANDARD[degree]
    for bits in ((most // 2, most - most // 2 + 1), (most,), ()):
        with pytest.raises(PlanError, match="128 bits of security"):
            Parameters(degree, bits)


def test_the_table_is_the_one_that_seal_checks_too():
    from tenseal import sealapi

    for degree, most in STANDARD.items():
        assert sealapi.CoeffModulus.MaxBitCount(degree, sealapi.SEC_LEVEL_TYPE.TC128) == most
    assert sum(RING.bits) <= STANDARD[RING.degree]


@pytest.mark.parametrize(
    ("words", "what"),
    [(np.zeros((2, 2, 4096), np.uint64), "are no ciphertext, which is"), (np.zeros((2, 2, 8192)), "are no ciphertext, which is")],
)
def test_what_is_no_ciphertext_is_refused(words, what):
    with pytest.raises(PrivacyError, match=what):
        list(decrypt(KEY, [words], SCALE))


def test_what_does_not_fit_is_refused():
    with pytest.raises(PrivacyError, match="can't be written at scale"):
        list(encrypt(KEY, [np.full(RING.slots, 1e6)], 2.0**100))
    with pytest.raises(PrivacyError, match="can't be multiplied"):
        list(multiply(RING, encrypt(KEY, [slots(1)], 2.0**80), [slots(2)], 2.0**80, 2.0**80))
    with pytest.raises(PrivacyError, match="can't be multiplied"):
        list(multiply(RING, encrypt(KEY, [slots(1)], 2.0**40), [np.zeros(RING.slots)], 2.0**40, 2.0**40))


def test_nothing_stays_where_ciphertexts_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(ckks.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(ckks.os, "access", lambda *_: False)
    seen = []
    for words in encrypt(KEY, [slots(1), slots(2)], SCALE):
        seen += [path.stat().st_size for path in tmp_path.rglob("ciphertext")]
        list(decrypt(KEY, [words], SCALE))
    assert len(seen) == 2
    assert min(seen) > 200_000
    assert not list(tmp_path.iterdir())
