"""What a handshake must sign: something fresh of this server's own, so that a signature that was overheard is worth nothing."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time

from atoll.errors import UnreachableError

LIFE = 120.0
"""For how many seconds a challenge may be answered."""
_STAMP, _NONCE, _SEAL = 8, 16, 32


class Challenges:
    """Makes challenges, and takes each back once.

    None is remembered when it is made, so asking for many costs the server nothing: a challenge carries its end of life and
    this server's seal (HMAC-SHA256). Remembered is only what was answered, until some time after its life is over.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._used: dict[str, float] = {}
        self._swept = time.monotonic()

    def new(self) -> str:
        """Return a challenge, in hex."""
        body = int(1000 * (time.monotonic() + LIFE)).to_bytes(_STAMP, "big") + secrets.token_bytes(_NONCE)
        return (body + self._seal(body)).hex()

    def take(self, challenge: str) -> None:
        """Take a challenge that was answered.

        Raises:
            UnreachableError: it is not this server's, too old, or was answered before: with a new one it may go through.
        """
        said, now = bytes.fromhex(challenge), time.monotonic()
        body, seal = said[:-_SEAL], said[-_SEAL:]
        ends = int.from_bytes(body[:_STAMP], "big") / 1000
        if now > self._swept + LIFE:
            self._used, self._swept = {one: end for one, end in self._used.items() if end >= now}, now
        if not hmac.compare_digest(seal, self._seal(body)) or ends < now or challenge in self._used:
            raise UnreachableError("the handshake answers no challenge that is open: ask for a new one")
        self._used[challenge] = ends

    def _seal(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, hashlib.sha256)
