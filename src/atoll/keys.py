"""Who a node or a server is: an Ed25519 key made on first use, and signatures with it; and secrets that two parties share.

With `tls`, the home of `cryptography`. Private keys come from the operating system's generator and stay in
their file (mode 0600); a node's id is the hash of its public key.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from atoll.errors import PrivacyError, StoreError

SECRET = 32
"""Bytes in a secret, a key, and a public key for agreement."""
SEALED = 16
"""Bytes by which `encrypt` makes a message longer."""
_PIECE = 1 << 30
"""Bytes that OpenSSL takes at a time."""
_TRIED = 1 << 16
"""Bytes that a mode is tried out with."""


@dataclass(frozen=True)
class Identity:
    """A private key, and the node it makes its holder."""

    private: Ed25519PrivateKey

    @classmethod
    def new(cls) -> Identity:
        """Return a fresh identity, kept nowhere."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def at(cls, path: Path) -> Identity:
        """Return the identity kept at `path`; make it there, readable by its owner only, when there is none.

        Raises:
            StoreError: the file can't be read or written, or holds no key.
        """
        try:
            if not path.exists():
                write_private(path, Ed25519PrivateKey.generate().private_bytes_raw())
            return cls(Ed25519PrivateKey.from_private_bytes(path.read_bytes()))
        except OSError as error:
            raise StoreError(f"{path}: the key can't be kept there ({error.strerror}); choose another directory") from error
        except ValueError as error:
            raise StoreError(f"{path}: holds no Ed25519 key of 32 bytes; move the file away to begin with a new key") from error

    @classmethod
    def of(cls, token: str) -> Identity:
        """Return the one-time identity that a token is: who holds it can sign by it without showing it."""
        return cls(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"atoll token {token}".encode()).digest()))

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self.private.public_key().public_bytes_raw()

    @property
    def node(self) -> str:
        """The node's id."""
        return node_of(self.public)

    def sign(self, message: bytes) -> bytes:
        """Return the signature of a message, 64 bytes."""
        return self.private.sign(message)


def write_private(path: Path, secret: bytes) -> None:
    """Write a new file that only its owner can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)


def new_token() -> str:
    """Return a fresh token: 192 bits, so no list of guesses gets near it."""
    return secrets.token_hex(24)


def node_of(public: bytes) -> str:
    """Return the id of the node that holds a key: the first 16 bytes of its SHA-256, as hex."""
    return hashlib.sha256(public).hexdigest()[:32]


def signed_by(public: bytes, signature: bytes, message: bytes) -> bool:
    """Say whether the holder of `public` signed `message`."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def new_secret() -> bytes:
    """Return 32 bytes of the operating system's generator."""
    return secrets.token_bytes(SECRET)


def derive(secret: bytes, purpose: bytes) -> bytes:
    """Return a key of 32 bytes for one purpose (HKDF-SHA256, RFC 5869): other purposes' keys say nothing about it."""
    return HKDF(SHA256(), SECRET, None, purpose).derive(secret)


class Exchange:
    """An X25519 key (RFC 7748): two parties' keys agree on a secret that nobody between them learns.

    Args:
        private: 32 bytes.
    """

    def __init__(self, private: bytes) -> None:
        self._private = X25519PrivateKey.from_private_bytes(private)
        self._agreed: dict[bytes, bytes] = {}

    @property
    def public(self) -> bytes:
        """The public half, 32 bytes."""
        return self._private.public_key().public_bytes_raw()

    def agree(self, public: bytes, purpose: bytes) -> bytes:
        """Return the key of 32 bytes that is shared for one purpose with the holder of another key.

        Raises:
            PrivacyError: `public` is no key, or one of those few that give everybody the same secret.
        """
        if public not in self._agreed:  # it takes ten times as long as what is derived from it
            try:
                self._agreed[public] = self._private.exchange(X25519PublicKey.from_public_bytes(public))
            except ValueError as error:
                raise PrivacyError("a key for agreement that is none, or a weak one") from error
        return derive(self._agreed[public], purpose)


def fingerprint(parts: Iterable[memoryview]) -> bytes:
    """Return 32 bytes that are others for other contents, ten times as fast as SHA-256 (GMAC under a key that all know).

    Not for what somebody gains by finding two contents with the same ones: that is easy.

    Args:
        parts: flat, of bytes.
    """
    mac = Cipher(algorithms.AES(bytes(SECRET)), modes.GCM(bytes(12))).encryptor()
    for part in parts:
        for lo in range(0, len(part), _PIECE):
            mac.authenticate_additional_data(part[lo : lo + _PIECE])
    mac.finalize()
    return hashlib.sha256(mac.tag).digest()


def encrypt(key: bytes, message: bytes, bound: bytes) -> bytes:
    """Return a message that only a holder of `key` reads, and only together with `bound` (AES-256-GCM).

    The nonce is constant: a key encrypts one message, ever.
    """
    return AESGCM(key).encrypt(bytes(12), message, bound)


def decrypt(key: bytes, sealed: bytes, bound: bytes) -> bytes:
    """Return what `encrypt` hid.

    Raises:
        PrivacyError: it was altered, or belongs to another key or another `bound`.
    """
    try:
        return AESGCM(key).decrypt(bytes(12), sealed, bound)
    except (InvalidTag, ValueError) as error:
        raise PrivacyError("an encrypted message that was altered, or isn't for this node") from error


class Keystream:
    """The bytes that AES-256-CTR makes of a key, used for nothing else: indistinguishable from random ones.

    Args:
        key: 32 bytes.
        start: the first byte to give; a multiple of 16.
    """

    def __init__(self, key: bytes, start: int = 0) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.CTR((start // 16).to_bytes(16, "big"))).encryptor()

    def fill(self, zeros: memoryview, into: memoryview) -> None:
        """Write the next bytes, as many as there are zeros, into a buffer of that length."""
        self._cipher.update_into(zeros, into)

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        return self._cipher.update(bytes(count))


class Pad:
    """Bytes to cover others with: AES-256-CTR of numbers that all know, indistinguishable from random ones.

    Block i, of 16 bytes, is AES(i) ⊕ (i + 1), with numbers of 128 bits, the highest byte first. That is what decryption in CFB
    mode makes of the numbers, too, for which OpenSSL has wider instructions on some processors, twice as fast.

    Args:
        key: 32 bytes, used for nothing else.
        start: the first byte to give; a multiple of 16.
    """

    def __init__(self, key: bytes, start: int = 0) -> None:
        first = (start // 16).to_bytes(16, "big")
        self._cipher = _by_cfb(key, first) if cfb_is_faster() else _by_ctr(key, first)

    def fill(self, numbers: memoryview, into: memoryview) -> None:
        """Write the next bytes into a buffer.

        Args:
            numbers: those of the next blocks, i + 1 for each, as bytes; the last one may be cut.
            into: as many bytes.
        """
        self._cipher.update_into(numbers, into)


def _by_ctr(key: bytes, first: bytes) -> CipherContext:
    return Cipher(algorithms.AES(key), modes.CTR(first)).encryptor()


def _by_cfb(key: bytes, first: bytes) -> CipherContext:
    from cryptography.hazmat.decrepit.ciphers.modes import CFB  # to encrypt with; nothing is here

    return Cipher(algorithms.AES(key), CFB(first)).decryptor()


@lru_cache
def cfb_is_faster() -> bool:
    """Say by which of two modes this machine makes a pad, whose bytes are the same: it is tried out once."""
    data, into = bytes(_TRIED), memoryview(bytearray(_TRIED))

    def seconds(make: Callable[[bytes, bytes], CipherContext]) -> float:
        cipher, times = make(bytes(SECRET), bytes(16)), []
        for _ in range(5):
            began = time.perf_counter()
            cipher.update_into(data, into)
            times.append(time.perf_counter() - began)
        return min(times)

    try:
        return seconds(_by_cfb) < seconds(_by_ctr)
    except (ImportError, UnsupportedAlgorithm):  # not all releases of cryptography have it there, nor all libraries under it
        return False
