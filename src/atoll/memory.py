"""How much memory there is: the machine's, or what its container may take of it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from atoll.errors import LearnerError

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def total() -> int | None:
    """Return the bytes of memory that a process here can have at most; None where the system doesn't say."""
    found = []
    with contextlib.suppress(AttributeError, ValueError, OSError):  # no sysconf on Windows
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            found.append(int(Path(path).read_text()))
    return min(found, default=None)


def need(size: int, what: str) -> None:
    """Refuse what takes more bytes than there are, before the system ends the process for it.

    Raises:
        LearnerError: it does.
    """
    there = total()
    if there is not None and size > there:
        raise LearnerError(f"{what} take {size / 1e9:,.0f} GB; this machine has {there / 1e9:,.0f}")
