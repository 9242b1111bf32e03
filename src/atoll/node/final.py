"""What a run leaves on a node: the final model, and the node's own where the method makes one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from atoll.durable import write_durably
from atoll.errors import UnwritableError
from atoll.vector import Groups
from atoll.wire import Buffer, pack

_PERSONAL = "personal.safetensors"


def keep_final(directory: Path, body: Buffer) -> None:
    """Write `final.safetensors`; another run's personal model goes.

    Raises:
        UnwritableError: it can't be written.
    """
    _write(directory / "final.safetensors", [memoryview(body)])
    with contextlib.suppress(OSError):
        (directory / _PERSONAL).unlink()


def keep_personal(directory: Path, mine: Groups) -> None:
    """Write `personal.safetensors`.

    Raises:
        UnwritableError: it can't be written.
    """
    _write(directory / _PERSONAL, pack(mine))


def _write(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    try:
        write_durably(path, parts)
    except OSError as error:
        raise UnwritableError(f"{path}: the model can't be written ({error.strerror})") from error
