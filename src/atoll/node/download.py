"""Models on their way to a node: into files known by their digest, from where a download broke off."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp

from atoll.compression import Down
from atoll.durable import write_durably
from atoll.errors import LayoutError, LogError, UnreachableError, UnwritableError, WireError
from atoll.logs import Progress
from atoll.logs.bodies import Incoming, mapped
from atoll.vector import Groups, Layouts, finite
from atoll.wire import Buffer, digest_of, unpack

Followed = Callable[[Buffer, Buffer], Sequence[memoryview]]
"""The bytes of the file of a model, and of a step from it → those of the file of the model that it leads to."""


class Downloads:
    """A directory that holds the newest model, whole or half; older ones go.

    Args:
        url: of the server, without a path.
        directory: made when missing.
    """

    def __init__(self, url: str, directory: Path) -> None:
        self._url, self._directory = url, directory
        self._verified: str | None = None
        self._turn = asyncio.Lock()

    async def get(
        self,
        session: aiohttp.ClientSession,
        digest: str,
        limit: int,
        progress: Progress | None = None,
        followed: Followed | None = None,
    ) -> memoryview:
        """Return a model's bytes, mapped from its file: they cost no memory until they are looked at.

        Args:
            session: an open HTTP session.
            digest: the model's.
            limit: the longest that it may be, in bytes.
            progress: told how many bytes are here.
            followed: takes a step, where models are made by steps from the ones before.

        Raises:
            UnreachableError: the server doesn't answer, or broke off; what came is kept, the same call goes on from there.
            WireError: what came is another model, or longer than the limit.
            UnwritableError: it can't be written at present.
        """
        path = self._directory / f"{digest}.safetensors"
        async with self._turn:  # a run that is stopped asks for the very model that a round may be fetching
            if self._verified != digest or not path.is_file():
                try:
                    if not (followed and await self._follow(session, digest, path, limit, followed)):
                        self._make_room(path)
                        await self._fetch(session, digest, path, limit, progress)
                except aiohttp.ClientError as error:
                    raise UnreachableError(
                        f"{self._url}: the model can't be fetched ({str(error) or type(error).__name__})"
                    ) from error
                except TimeoutError as error:
                    raise UnreachableError(f"{self._url}: the model stopped coming") from error
                except OSError as error:
                    raise UnwritableError(f"{path}: the model can't be kept ({error.strerror}); free some space") from error
                self._verified = digest
            return mapped(path)

    async def _follow(self, session: aiohttp.ClientSession, digest: str, path: Path, limit: int, followed: Followed) -> bool:
        """Get to a model by a step from the one that is here; say whether that led to it. If not, it is fetched whole."""
        here = sorted(self._directory.glob("*.safetensors"), key=lambda one: one.stat().st_mtime)
        if not here or path in here:
            return False
        before, step = here[-1], path.with_suffix(".step")
        async with session.get(f"{self._url}/v1/models/{digest}/from/{before.stem}") as response:
            if response.status != 200:
                return False
            coming = await asyncio.to_thread(Incoming, step, 0)
            try:
                await coming.pour(response.content.iter_any(), limit)
            finally:
                coming.close()
        try:
            parts = await asyncio.to_thread(followed, mapped(before), mapped(step))
        except (LogError, WireError, LayoutError):  # half a model is here, or what came is no step from it
            return False
        if digest_of(parts) != digest:
            return False
        await asyncio.to_thread(write_durably, path, parts)
        self._make_room(path)
        return True

    def _make_room(self, path: Path) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        for old in self._directory.iterdir():
            if old != path:
                with contextlib.suppress(PermissionError):  # where a mapped file can't be removed, the next time
                    old.unlink(missing_ok=True)

    async def _fetch(
        self, session: aiohttp.ClientSession, digest: str, path: Path, limit: int, progress: Progress | None
    ) -> None:
        start = path.stat().st_size if path.exists() else 0
        asked = {"Range": f"bytes={start}-"} if start else {}
        async with session.get(f"{self._url}/v1/models/{digest}", headers=asked) as response:
            if response.status not in (200, 206, 416):
                raise UnreachableError(f"{self._url}: the model {digest[:12]} isn't there (HTTP {response.status})")
            model = await asyncio.to_thread(Incoming, path, 0 if response.status == 200 else start)
            try:
                if response.status != 416:  # there may be nothing left to come
                    await model.pour(response.content.iter_any(), limit, progress)
            finally:
                model.close()
        if model.size > limit:
            path.unlink()
            raise WireError(f"{self._url}: the model goes on after {limit} bytes, more than the plan's can have")
        if model.digest != digest:
            path.unlink()
            if start:  # a crash may have spoilt what was here
                raise UnreachableError(f"{self._url}: what was here of model {digest[:12]} is none of it: it is fetched anew")
            raise WireError(f"{self._url}: the model that came is not {digest[:12]}: it was altered on the way")


def received(body: Buffer, layouts: Layouts, down: Down) -> Groups:
    """Return the groups of a model that the server sent, as views into its bytes, or opened where they are small (`down`).

    Raises:
        WireError, LayoutError: it is no model of the plan, or holds NaN or infinity: nothing is to be done with it.
    """
    groups = down.received(unpack(body, down.layouts(layouts))[0], layouts)
    for name, group in groups.items():
        if not finite(group.values):
            raise LayoutError(f"the model that the server sent holds NaN or infinity (in group '{name}'): it isn't used here")
    return groups
