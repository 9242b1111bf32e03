"""Bodies of refused updates, set aside for a person to look at. No aggregation and no replay ever reads them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from atoll.wire import Address, Buffer

KEPT = 20
"""So many bodies of a run are kept at most, the newest."""
PLACE = "quarantine"
log = logging.getLogger("atoll.server")


def path_of(directory: Path, address: Address, digest: str) -> Path:
    """Return where a refused body lies in a store's directory, if it was kept."""
    _, round_, attempt, node = address
    return directory / PLACE / address.run / f"{round_}-{attempt}-{node}-{digest}.safetensors"


def set_aside(directory: Path, address: Address, digest: str, body: Buffer, room: Callable[[int], str | None]) -> None:
    """Keep a refused body; where the disk or the quota has no room, the run goes on without.

    Args:
        directory: of the store.
        address: of the update.
        digest: of its bytes.
        body: its bytes.
        room: asked before so many bytes are kept; says why there is no room.
    """
    path = path_of(directory, address, digest)
    if path.exists():
        return
    if full := room(len(body)):
        log.warning("refused update %s isn't kept: %s", digest[:12], full)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        for old in sorted(path.parent.iterdir(), key=lambda one: one.stat().st_mtime_ns)[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: a refused update can't be kept there (%s)", path, error.strerror)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
