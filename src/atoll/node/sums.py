"""A sum that nodes are shown, and what they open of it: fetched and sent until the server asks for something else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp

from atoll.errors import UnreachableError
from atoll.logs.upload import HttpAppender
from atoll.messages import StartTraining
from atoll.node.download import Downloads
from atoll.node.machine import SHORTEST
from atoll.vector import Groups, Layouts
from atoll.wire import HEADER_LIMIT, Envelope, unpack


class Sums:
    """The way of sums to and from a server.

    Args:
        url: the server's.
        downloads: where they are fetched to.
        asked: the task that the server asked for last.
        tell: told that the server is waited for.
    """

    def __init__(
        self, url: str, downloads: Downloads, asked: Callable[[], StartTraining | None], tell: Callable[..., None]
    ) -> None:
        self._url, self._downloads, self._asked, self._tell = url, downloads, asked, tell

    async def fetch(self, session: aiohttp.ClientSession, task: StartTraining, digest: str, layouts: Layouts) -> Groups:
        """Fetch the sum that a node is shown; a server that is away is asked again, until it asks for something else."""
        limit = sum(layout.nbytes for layout in layouts.values()) + HEADER_LIMIT
        while True:
            try:
                return unpack(await self._downloads.get(session, digest, limit), layouts)[0]
            except UnreachableError as error:
                await self._again(task, error)

    async def send(self, session: aiohttp.ClientSession, task: StartTraining, envelope: Envelope, opened: bytes) -> None:
        """Put an opened sum where the server finds it by its digest."""
        upload = HttpAppender(self._url, session, "sums")
        while True:
            try:
                await upload.append(envelope, [opened])
            except UnreachableError as error:
                await self._again(task, error)
            else:
                return

    async def _again(self, task: StartTraining, error: UnreachableError) -> None:
        """Wait a moment, for as long as the task is what the server asked for last."""
        if self._asked() is not task:
            raise error
        self._tell("waiting", reason=str(error))
        await asyncio.sleep(SHORTEST)
