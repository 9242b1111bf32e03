"""Letters of a link: bytes that are too long for one message of the control channel travel in parts. Rank 1."""

from __future__ import annotations

import base64
from collections.abc import Iterator

from atoll.errors import WireError
from atoll.messages import PART, PARTS, Letter

DIGEST = 32
"""Where nodes are shown the sum, a letter begins with its SHA-256; it is fetched as models are."""
Key = tuple[str, int, int, str]
"""Which letter it is: run, round, attempt, phase."""


def written(run: str, round_: int, attempt: int, phase: str, body: bytes) -> Iterator[Letter]:
    """Return a letter's parts.

    Raises:
        WireError: it is too long.
    """
    parts = max(1, -(-len(body) // PART))
    if parts > PARTS:
        raise WireError(f"a letter of {len(body)} bytes in phase '{phase}': the limit is {PARTS * PART}")
    for part in range(parts):
        text = base64.b64encode(body[part * PART : (part + 1) * PART]).decode()
        yield Letter(run=run, round=round_, attempt=attempt, phase=phase, part=part, parts=parts, body=text)


class Desk:
    """Puts one sender's letters together; the parts of a letter come in order, and a new one takes an unfinished one's place."""

    def __init__(self) -> None:
        self._key: Key | None = None
        self._parts: list[bytes] = []

    def take(self, part: Letter) -> bytes | None:
        """Take a part; return the letter with its last one.

        Raises:
            WireError: its body is no base64.
        """
        key = part.run, part.round, part.attempt, part.phase
        try:
            body = base64.b64decode(part.body, validate=True)
        except ValueError as error:
            raise WireError("no 'link' message: body is no base64") from error
        if part.part == 0:
            self._key, self._parts = key, []
        if key != self._key or part.part != len(self._parts):
            return None  # its beginning was lost with a connection: it is said again from there
        self._parts.append(body)
        if len(self._parts) < part.parts:
            return None
        self._key, whole = None, b"".join(self._parts)
        self._parts = []
        return whole
