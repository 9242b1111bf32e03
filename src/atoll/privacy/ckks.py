"""CKKS (Cheon et al. 2017): encrypted vectors of real or complex numbers, to be added, and multiplied with plain ones.

Enters: slots, `[degree / 2]` complex numbers for each ciphertext, and a scale that says how finely they are written. A
ciphertext is an array of words `[2, primes, degree]`, uint64: whole numbers modulo each prime, so whoever adds two, as whole
numbers, adds what is in them, and needs no library and no key for it. Everything that is made of many ciphertexts is made
one after the other. The home of TenSEAL, whose SEAL gives and takes ciphertexts by files only; those never hold plain numbers.

>>> import numpy as np
>>> key = Key(Parameters(8192, (54, 54, 55)), bytes(32))
>>> one, other = encrypt(key, [np.full(4096, 0.5 + 2j), np.full(4096, 0.25)], scale=2.0**80)
>>> [total] = decrypt(key, [one + other], scale=2.0**80)
>>> complex(np.round(total[0], 9))
(0.75+2j)
"""

from __future__ import annotations

import math
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atoll.errors import PlanError, PrivacyError
from atoll.keys import Keystream, derive

Slots = NDArray[Any]
"""The numbers of one ciphertext, float64 or complex128 `[degree / 2]`."""
Ciphertext = NDArray[np.uint64]
"""One ciphertext, or a sum of some, `[2, primes, degree]`."""

STANDARD = {1024: 27, 2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881}
"""Bits that all primes together may have at most for 128 bits of security, by degree.

Source: Albrecht et al. 2018, Homomorphic Encryption Security Standard, table 1, ternary secrets, classical attacks."""
DEVIATION = 3.24
"""Standard deviation of the noise in each coefficient of a fresh ciphertext: SEAL's centred binomial, √(21/2)."""
_HEADER = struct.Struct("<HBBBBHQ")  # SEAL's: magic number, its size, version, compression, nothing, size of all
_SCALE = 57
"""Where a saved ciphertext's scale is: after its parameters' hash, one flag and three sizes."""


@dataclass(frozen=True)
class Parameters:
    """The ring that numbers are encrypted in.

    Args:
        degree: a power of two; half as many slots are in a ciphertext.
        bits: of each prime; the last one is of keys only, and no part of a ciphertext.

    Raises:
        PlanError: they give less than 128 bits of security, or are none.
    """

    degree: int
    bits: tuple[int, ...]

    def __post_init__(self) -> None:
        most = STANDARD.get(self.degree, 0)
        if len(self.bits) < 2 or not all(20 <= bits <= 60 for bits in self.bits) or sum(self.bits) > most:
            raise PlanError(
                f"CKKS of degree {self.degree} with primes of {', '.join(map(str, self.bits))} bits: for 128 bits of security "
                f"there are two primes or more, of 20 to 60 bits each and {most} together"
            )

    @property
    def slots(self) -> int:
        """Complex numbers in one ciphertext."""
        return self.degree // 2

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one ciphertext."""
        return 2, len(self.bits) - 1, self.degree

    @property
    def additions(self) -> int:
        """How many ciphertexts can be added as whole numbers of 64 bits without running over."""
        return 1 << (64 - max(self.bits[:-1]))

    @cached_property
    def moduli(self) -> NDArray[np.uint64]:
        """The primes, `[primes, 1]`."""
        return np.array([[prime.value()] for prime in _seal(self).primes[:-1]], np.uint64)


class Flood(NamedTuple):
    """Noise that covers a decryption's own, which would tell of the key (Li and Micciancio 2021).

    It is added to the ciphertexts, so nothing that is decrypted is without it; normal, in every coefficient.

    Args:
        secret: 32 bytes that it is made of: who has the same adds the same.
        deviation: its standard deviation in a coefficient.
    """

    secret: bytes
    deviation: float


class _Seal(NamedTuple):
    """SEAL's objects for some parameters, and how a saved ciphertext begins."""

    api: Any
    context: Any
    primes: list[Any]
    encoder: Any
    begin: bytes


class Key:
    """A secret key: who holds it encrypts and decrypts.

    Args:
        parameters: of the ring.
        secret: 32 bytes; the same ones make the same key, on any machine.
    """

    def __init__(self, parameters: Parameters, secret: bytes) -> None:
        seal = _seal(parameters)
        seed = np.frombuffer(derive(secret, b"ckks key 0") + derive(secret, b"ckks key 1"), "<u8").tolist()
        # Only the key is made of the seed. With its generator in the context all ciphertexts would have the same noise.
        seeded, _ = _context(seal.api, parameters, seed)
        self.parameters = parameters
        self._key = seal.api.KeyGenerator(seeded).secret_key()
        self.encryptor = seal.api.Encryptor(seal.context, self._key)
        self.decryptor = seal.api.Decryptor(seal.context, self._key)


def encrypt(key: Key, chunks: Iterable[Slots], scale: float) -> Iterator[Ciphertext]:
    """Encrypt chunks of numbers, with fresh noise of the system's generator.

    Args:
        key: the secret one.
        chunks: `[degree / 2]` each.
        scale: steps that one is written in: numbers are rounded to 1 / scale.

    Raises:
        PrivacyError: the numbers times the scale are too large for the primes.
    """
    seal = _seal(key.parameters)
    ciphertext = seal.api.Ciphertext()
    with _room() as path:
        for slots in chunks:
            key.encryptor.encrypt_symmetric(_encoded(seal, slots, scale), ciphertext)
            yield _words(key.parameters, ciphertext, path)


def decrypt(key: Key, ciphertexts: Iterable[Ciphertext], scale: float, flood: Flood | None = None) -> Iterator[Slots]:
    """Return the slots of ciphertexts, complex `[degree / 2]` each. What is given to others must be flooded.

    Raises:
        PrivacyError: words that are no ciphertext.
    """
    seal, parameters = _seal(key.parameters), key.parameters
    evaluator, plain = seal.api.Evaluator(seal.context), seal.api.Plaintext()
    stream = Keystream(derive(flood.secret, b"ckks flood")) if flood else None
    with _room() as path:
        for words in ciphertexts:
            ciphertext = _loaded(parameters, words, scale, path)
            if flood and stream:
                noise = _normal(stream, parameters.slots)
                noise *= flood.deviation * math.sqrt(parameters.degree / 2) / scale
                evaluator.add_plain_inplace(ciphertext, _encoded(seal, noise, scale))
            key.decryptor.decrypt(ciphertext, plain)
            yield np.array(seal.encoder.decode_complex(plain))


def multiply(
    parameters: Parameters, ciphertexts: Iterable[Ciphertext], chunks: Iterable[Slots], scale: float, by: float
) -> Iterator[Ciphertext]:
    """Multiply ciphertexts with plain numbers, slot by slot; who does needs no key.

    Args:
        parameters: of the ciphertexts.
        ciphertexts: of some scale; sums of some are first reduced, by `reduce`.
        chunks: what each is multiplied with; all zeros are refused, since their product would be no ciphertext.
        scale: of the ciphertexts.
        by: the scale of the plain numbers; the product's is `scale * by`.

    Raises:
        PrivacyError: words that are no ciphertext, or a scale that the primes have no room for.
    """
    seal = _seal(parameters)
    evaluator = seal.api.Evaluator(seal.context)
    with _room() as path:
        for words, slots in zip(ciphertexts, chunks, strict=True):
            ciphertext = _loaded(parameters, words, scale, path)
            try:
                evaluator.multiply_plain_inplace(ciphertext, _encoded(seal, slots, by))
            except (RuntimeError, ValueError) as error:
                raise PrivacyError(f"CKKS: that can't be multiplied: {error}") from error
            yield _words(parameters, ciphertext, path)


def reduce(parameters: Parameters, words: Ciphertext) -> Ciphertext:
    """Return a sum of ciphertexts modulo each prime, as one ciphertext is."""
    reduced: Ciphertext = words % parameters.moduli
    return reduced


def room_for(parameters: Parameters, additions: int) -> float:
    """Return the largest scale at which so many vectors of slots, each at most √2 in magnitude, can be added up.

    A coefficient of a vector is at most scale · √2, and a sum must stay within ± half of the primes' product, with
    as much again for noise.
    """
    bits = math.floor(math.log2(math.prod(int(prime.value()) for prime in _seal(parameters).primes[:-1])) + 1e-6)
    return 2.0 ** (bits - 2 - math.ceil(math.log2(additions)))


@lru_cache(maxsize=8)
def _seal(parameters: Parameters) -> _Seal:
    try:
        from tenseal import sealapi
    except ImportError as error:
        raise PlanError(f"encryption needs TenSEAL ({error}): pip install 'atoll-fl[tenseal]'") from error
    context, primes = _context(sealapi, parameters, None)
    seal = _Seal(sealapi, context, primes, sealapi.CKKSEncoder(context), b"")
    sample = sealapi.Ciphertext()
    sealapi.Encryptor(context, sealapi.KeyGenerator(context).secret_key()).encrypt_symmetric(
        _encoded(seal, np.zeros(parameters.slots), 1.0), sample
    )
    with _room() as path:
        _, begin = _saved(sample, path, 8 * math.prod(parameters.shape))
    return seal._replace(begin=begin)


def _context(api: Any, parameters: Parameters, seed: list[int] | None) -> tuple[Any, list[Any]]:
    made = api.EncryptionParameters(api.SCHEME_TYPE.CKKS)
    made.set_poly_modulus_degree(parameters.degree)
    primes = api.CoeffModulus.Create(parameters.degree, list(parameters.bits))
    made.set_coeff_modulus(primes)
    if seed is not None:
        made.set_random_generator(api.Blake2xbPRNGFactory(seed))
    return api.SEALContext(made, True, api.SEC_LEVEL_TYPE.TC128), primes


def _encoded(seal: _Seal, slots: Slots, scale: float) -> Any:
    plain = seal.api.Plaintext()
    try:
        seal.encoder.encode(slots.astype(np.complex128).tolist(), scale, plain)
    except (RuntimeError, ValueError) as error:
        raise PrivacyError(f"CKKS: numbers up to {np.abs(slots).max():g} can't be written at scale {scale:g}: {error}") from error
    return plain


def _words(parameters: Parameters, ciphertext: Any, path: Path) -> Ciphertext:
    words, _ = _saved(ciphertext, path, 8 * math.prod(parameters.shape))
    return np.frombuffer(words, np.uint64).reshape(parameters.shape)


def _saved(ciphertext: Any, path: Path, size: int) -> tuple[bytes, bytes]:
    """Return a ciphertext's words and what SEAL's file has before them, in one header for uncompressed content."""
    import zstandard  # SEAL compresses what it saves

    ciphertext.save(str(path))
    data = path.read_bytes()
    magic, length, major, minor, *_ = _HEADER.unpack_from(data)
    content = zstandard.ZstdDecompressor().decompressobj().decompress(data[_HEADER.size :])
    return content[-size:], _HEADER.pack(magic, length, major, minor, 0, 0, _HEADER.size + len(content)) + content[:-size]


def _loaded(parameters: Parameters, words: Ciphertext, scale: float, path: Path) -> Any:
    seal = _seal(parameters)
    if words.shape != parameters.shape or words.dtype != np.uint64:
        raise PrivacyError(f"words of shape {words.shape} are no ciphertext, which is {parameters.shape}")
    begin = bytearray(seal.begin)
    struct.pack_into("<d", begin, _HEADER.size + _SCALE, scale)
    path.write_bytes(begin + np.ascontiguousarray(reduce(parameters, words)).tobytes())
    ciphertext = seal.api.Ciphertext()
    try:
        ciphertext.load(seal.context, str(path))
    except (RuntimeError, ValueError) as error:
        raise PrivacyError(f"words that are no ciphertext at scale {scale:g}: {error}") from error
    return ciphertext


@contextmanager
def _room() -> Iterator[Path]:
    memory = "/dev/shm"  # noqa: S108  a directory of our own is made in it
    with tempfile.TemporaryDirectory(prefix="atoll-", dir=memory if os.access(memory, os.W_OK) else None) as directory:
        yield Path(directory) / "ciphertext"


def _normal(stream: Keystream, count: int) -> Slots:
    """Return complex numbers whose both parts are standard normal (Box and Muller 1958)."""
    uniform = (np.frombuffer(stream.take(16 * count), "<u8") >> np.uint64(11)).astype(np.float64).reshape(2, count)
    uniform += 0.5
    uniform *= 2.0**-53
    numbers: Slots = np.sqrt(-2 * np.log(uniform[0])) * np.exp(2j * np.pi * uniform[1])
    return numbers
