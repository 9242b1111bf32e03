"""The server's door: who may come in by the store's list, and who must leave."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from atoll.errors import StoreError
from atoll.keys import node_of
from atoll.messages import Connect
from atoll.store.enrolment import Enrolled, Enrolment

log = logging.getLogger("atoll.server.door")
_EVERY = 0.5
"""Seconds between looks at the list."""
_BACK = 60.0
"""How far back a look goes, in seconds: longer than a change may wait for the database."""


class Door:
    """Lets in whom the list names; everybody, where nobody was ever added to it.

    Args:
        directory: of the server's store.
        run: whose handshakes come.
    """

    def __init__(self, directory: Path, run: str) -> None:
        self._list, self._run = Enrolment(directory), run
        self._revoked = set(self._list.revoked())
        self.close = self._list.close

    async def admit(self, message: Connect) -> None:
        """Let a node in, whose handshake's signature was checked.

        Raises:
            RefusedError: it may not come in.
        """
        key, said = bytes.fromhex(message.key), message.signed(self._run)
        await asyncio.to_thread(self._list.admit, message.name, key, message.proof, said)
        self._revoked.discard(node_of(key))

    def revoke(self, name: str) -> Enrolled:
        """Let a name in no more; its node leaves at the next look at the list.

        Raises:
            RefusedError: there is no such name.
        """
        return self._list.revoke(name)

    def refuses(self, node: str) -> str | None:
        """Say why nothing of a node's counts, or None."""
        return "the node was revoked" if node in self._revoked else None

    async def watch(self, leave: Callable[[str], Awaitable[None]]) -> None:
        """Have each node that is revoked leave, within a second."""
        for node in tuple(self._revoked):
            await leave(node)
        while True:
            await asyncio.sleep(_EVERY)
            try:
                gone = await asyncio.to_thread(self._list.revoked, time.time() - _BACK)
            except StoreError as error:
                log.warning("who was revoked can't be read: %s", error)
                continue
            self._revoked |= gone
            for node in gone:  # again each time: one may have been on its way in
                await leave(node)
