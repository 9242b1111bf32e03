"""Masks: what goes on comes off, whatever the number of threads; and they look like nothing at all."""

from __future__ import annotations

import hmac
from unittest.mock import patch

import numpy as np
import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import PrivacyError
from atoll.keys import Exchange, cfb_is_faster, decrypt, derive, encrypt, new_secret
from atoll.privacy.masks import apply

KEYS = [bytes([number]) * 32 for number in range(1, 8)]
DTYPES = (np.uint32, np.uint64)


def pad(key, start, size):
    """AES-256 of each block's number, block by block, ⊕ the next number."""
    aes = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    blocks = range(start // 16, (start + size + 15) // 16)
    one = b"".join(aes.update(place.to_bytes(16, "big")) for place in blocks)
    other = b"".join((place + 1).to_bytes(16, "big") for place in blocks)
    return bytes(a ^ b for a, b in zip(one, other))[:size]


@pytest.mark.parametrize("faster", [True, False], ids=["cfb", "ctr"])
@given(st.lists(st.tuples(st.integers(0, 70), st.sampled_from(DTYPES)), min_size=1, max_size=3), st.integers(1, 5))
def test_masks_are_the_pads_words_whatever_the_threads_and_the_mode(faster, shapes, threads):
    parts = [np.arange(size, dtype=dtype) for size, dtype in shapes]
    with patch("atoll.keys.cfb_is_faster", lambda: faster):
        apply(parts, KEYS[:2], KEYS[2:3], threads=threads)
    start = 0
    for part, (size, dtype) in zip(parts, shapes):
        masks = [np.frombuffer(pad(key, start, part.nbytes), dtype) for key in KEYS[:3]]
        assert (part == np.arange(size, dtype=dtype) + masks[0] + masks[1] - masks[2]).all()
        start += -(-part.nbytes // 16) * 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_masks_go_on_from_block_to_block(dtype):
    words = np.zeros(200_003, dtype)  # three blocks and a bit, or six
    apply([words], KEYS[:1])
    assert words.astype(words.dtype.newbyteorder("<")).tobytes() == pad(KEYS[0], 0, words.nbytes)
    other = np.zeros(200_003, dtype)
    with patch("atoll.keys.cfb_is_faster", lambda: not cfb_is_faster()):
        apply([other], KEYS[:1], threads=3)
    assert (words == other).all()


@pytest.mark.parametrize("lacking", [ImportError, UnsupportedAlgorithm])
def test_a_machine_without_the_faster_mode_takes_the_other(lacking):
    with patch("atoll.keys._by_cfb", side_effect=lacking("none here")):
        assert not cfb_is_faster.__wrapped__()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_goes_on_comes_off(dtype):
    parts = [np.arange(200_001, dtype=dtype), np.arange(0, dtype=dtype), np.arange(3, dtype=np.uint64)]
    apply(parts, KEYS[:4], KEYS[4:], threads=1)
    assert (parts[0][:1000] != np.arange(1000)).all()
    apply(parts, KEYS[4:], KEYS[:4], threads=2)
    assert all((part == np.arange(part.size)).all() for part in parts)


def test_words_are_uniform():
    words = np.zeros(1 << 18, np.uint32)
    apply([words], [new_secret()])
    counts = np.bincount(words.view(np.uint8), minlength=256)
    expected = words.nbytes / 256
    assert 150 < ((counts - expected) ** 2 / expected).sum() < 390  # chi-square, 255 degrees of freedom: ±6 σ


def test_two_parties_agree_and_no_third():
    ours, theirs, third = new_secret(), new_secret(), new_secret()
    key = Exchange(ours).agree(Exchange(theirs).public, b"masks")
    assert key == Exchange(theirs).agree(Exchange(ours).public, b"masks")
    assert (
        len(
            {
                key,
                Exchange(ours).agree(Exchange(theirs).public, b"shares"),
                Exchange(third).agree(Exchange(ours).public, b"masks"),
            }
        )
        == 3
    )


def test_agreement_is_that_of_rfc_7748_and_derivation_that_of_rfc_5869():
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert Exchange(alice).public.hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert Exchange(bob).public.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    extracted = hmac.digest(bytes(32), shared, "sha256")
    assert Exchange(alice).agree(Exchange(bob).public, b"masks") == hmac.digest(extracted, b"masks\x01", "sha256")


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31), b"short"])
def test_a_weak_key_is_refused(public):
    with pytest.raises(PrivacyError, match="a weak one"):
        Exchange(new_secret()).agree(public, b"masks")


def test_an_altered_or_misplaced_message_is_refused():
    key = derive(new_secret(), b"shares")
    sealed = encrypt(key, b"hello", b"from 1 to 2")
    assert decrypt(key, sealed, b"from 1 to 2") == b"hello"
    for wrong, bound in (
        (sealed[:-1] + bytes([sealed[-1] ^ 1]), b"from 1 to 2"),
        (sealed, b"from 1 to 3"),
        (b"", b"from 1 to 2"),
    ):
        with pytest.raises(PrivacyError, match="altered"):
            decrypt(key, wrong, bound)
