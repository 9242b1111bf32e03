"""The node's unsent updates: sealed bytes on disk until the server has judged them, resent as they are; and their way out."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from atoll.durable import write_all
from atoll.errors import StoreError, UnwritableError, WireError
from atoll.logs import Appender
from atoll.logs.access import Access
from atoll.logs.upload import HttpAppender
from atoll.plan import Plan
from atoll.wire import Address, Envelope


async def appender(plan: Plan, url: str, session: aiohttp.ClientSession, node: str, access: Access) -> Appender:
    """Return the way out that a plan names: to the server's own log, or to Kafka.

    Raises:
        RefusedError: Kafka doesn't let this node write where the plan has it write.
    """
    if plan.log.kafka is None:
        return HttpAppender(url, session)
    from atoll.logs.kafka import KafkaAppender  # an optional part

    topic = f"{plan.log.topic}.{node}" if plan.log.apart else plan.log.topic
    found = KafkaAppender(plan.log.kafka, topic, access)
    await asyncio.to_thread(found.check)
    return found


class Outbox:
    """A directory of sealed updates, each with its envelope beside it.

    Args:
        directory: made when missing.

    Raises:
        StoreError: it can't be made or written.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{directory}: updates can't be kept there ({error.strerror}); choose another --dir") from error

    def keep(self, envelope: Envelope, parts: Sequence[memoryview]) -> None:
        """Write an update down; what an older task left is dropped.

        Raises:
            UnwritableError: there is no room for it at present.
        """
        body, note = self._paths(envelope.address)
        try:
            for old in self._directory.iterdir():
                old.unlink()
            with body.open("wb", buffering=0) as file:
                for part in parts:
                    write_all(file, part)
            note.write_text(envelope.to_header())
        except OSError as error:
            raise UnwritableError(f"{body}: the update can't be kept ({error.strerror}); free some space") from error

    def kept(self, address: Address) -> str | None:
        """Return the digest of the kept update for a task, or None; a damaged one doesn't count."""
        try:
            envelope, body = self.take(address)
            with body.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == envelope.digest:
                    return envelope.digest
        except (StoreError, WireError, OSError):
            pass
        return None

    def take(self, address: Address) -> tuple[Envelope, Path]:
        """Return a kept update's envelope and file.

        Raises:
            StoreError: it isn't there.
        """
        body, note = self._paths(address)
        try:
            return Envelope.from_header(note.read_text()), body
        except OSError as error:
            raise StoreError(f"{note}: the kept update is gone ({error.strerror})") from error

    def drop(self, address: Address) -> None:
        """Let an update go."""
        for path in self._paths(address):
            path.unlink(missing_ok=True)

    def _paths(self, address: Address) -> tuple[Path, Path]:
        stem = f"{address.run}-{address.round}-{address.attempt}"
        return self._directory / f"{stem}.safetensors", self._directory / f"{stem}.json"
