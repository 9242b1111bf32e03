"""Who a node or a server is: an Ed25519 key made on first use, and signatures with it.

With `tls`, the home of `cryptography`. Private keys come from the operating system's generator and stay in
their file (mode 0600); a node's id is the hash of its public key.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from atoll.errors import StoreError


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
