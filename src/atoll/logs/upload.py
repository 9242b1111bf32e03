"""The node's end of the log inside the server: updates go up by HTTP, and go on where they broke off."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from urllib.parse import quote

import aiohttp

from atoll.errors import RefusedError, UnreachableError
from atoll.logs import Progress, pieces
from atoll.logs.bodies import check_size
from atoll.wire import Buffer, Envelope

HEADER = "Atoll-Envelope"
STALL = 120.0
"""Seconds without a byte, on either end, until a connection counts as dead."""
_AGAIN = (408, 416, 429)
"""Refusals of this moment: the same body may go through later, unlike with any other status from 400 to 499."""


class HttpAppender:
    """The node's end: `PUT`, resumed after an interruption where the server says it stands.

    Args:
        url: of the server, without a path.
        session: an open HTTP session; whoever opened it closes it.
        what: goes up: `updates`, or `sums` that nodes opened.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, what: str = "updates") -> None:
        self._url, self._session, self._what = url.rstrip("/"), session, what
        self._tried: set[str] = set()
        # No limit to a whole upload, however long: only to a time in which nothing moves.
        self._patience = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=STALL)

    async def append(self, envelope: Envelope, body: Sequence[Buffer] | Path, progress: Progress | None = None) -> None:
        """See `Appender.append`."""
        check_size(envelope, body)
        run, round_, attempt, node = envelope.address
        url = f"{self._url}/v1/runs/{quote(run)}/rounds/{round_}/{attempt}/{self._what}/{quote(node)}"
        headers = {HEADER: envelope.to_header()}
        try:
            start = await self._offset(url, headers, envelope.size) if envelope.digest in self._tried else 0
            self._tried.add(envelope.digest)
            if start < envelope.size or not envelope.size:
                await self._put(url, headers, envelope, body, start, progress)
        except (aiohttp.ClientError, OSError) as error:
            said = str(error) or type(error).__name__
            raise UnreachableError(f"{self._url}: the update log doesn't answer ({said})") from error
        except RefusedError:
            self._tried.discard(envelope.digest)
            raise
        self._tried.discard(envelope.digest)
        if progress:
            progress(envelope.size)

    async def _offset(self, url: str, headers: dict[str, str], size: int) -> int:
        async with self._session.head(url, headers=headers, timeout=self._patience) as response:
            if response.status >= 500 or response.status in _AGAIN:
                raise UnreachableError(f"{self._url}: the update log failed (HTTP {response.status})")
            said = response.headers.get("Upload-Offset", "0")
            return min(int(said), size) if re.fullmatch("[0-9]{1,19}", said) else 0

    async def _put(
        self,
        url: str,
        headers: dict[str, str],
        envelope: Envelope,
        body: Sequence[Buffer] | Path,
        start: int,
        progress: Progress | None,
    ) -> None:
        now = asyncio.get_running_loop().time
        async with asyncio.timeout(STALL) as moving:

            async def stream() -> AsyncIterator[Buffer]:
                sent = start
                for piece in pieces(body, start):
                    yield piece
                    sent += len(piece)
                    moving.reschedule(now() + STALL)
                    if progress:
                        progress(sent)

            headers = {**headers, "Content-Length": str(envelope.size - start), "Content-Type": "application/octet-stream"}
            if start:
                headers["Content-Range"] = f"bytes {start}-{envelope.size - 1}/{envelope.size}"
            async with self._session.put(url, headers=headers, data=stream(), timeout=self._patience) as response:
                if response.status not in (200, 201):
                    raise await self._no(response)

    async def _no(self, response: aiohttp.ClientResponse) -> RefusedError | UnreachableError:
        text = (await response.content.read(8192)).decode(errors="replace")[:2000]
        with contextlib.suppress(ValueError, KeyError, TypeError):
            text = str(json.loads(text)["error"])
        if response.status >= 500 or response.status in _AGAIN:
            return UnreachableError(f"{self._url}: the update log failed (HTTP {response.status}: {text})")
        return RefusedError(text or f"{self._url}: HTTP {response.status}")

    async def close(self) -> None:
        """See `Appender.close`."""
