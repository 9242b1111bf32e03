"""What a run leaves on a node: the final model, and the node's own where the method makes one."""

from __future__ import annotations

from pathlib import Path

from atoll.errors import UnwritableError
from atoll.store.models import write_durably
from atoll.vector import Groups
from atoll.wire import Buffer, pack


def keep_final(directory: Path, body: Buffer, mine: Groups | None) -> None:
    """Write `final.safetensors`, and `personal.safetensors` where there is one; another run's goes.

    Raises:
        UnwritableError: they can't be written.
    """
    personal = directory / "personal.safetensors"
    try:
        write_durably(directory / "final.safetensors", [memoryview(body)])
        if mine is None:
            personal.unlink(missing_ok=True)
        else:
            write_durably(personal, pack(mine))
    except OSError as error:
        raise UnwritableError(f"{directory}: the final model can't be written ({error.strerror})") from error
