"""Files that survive a power cut."""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import RawIOBase
from pathlib import Path


def write_durably(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write a file whole or not at all: on return it survives a power cut."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb", buffering=0) as file:
            for part in parts:
                write_all(file, memoryview(part).cast("B"))
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_all(file: RawIOBase, data: bytes | memoryview) -> None:
    """Write all of some bytes to an unbuffered file: a disk that is nearly full takes a part of them without a word."""
    view = memoryview(data)
    while view.nbytes:
        view = view[file.write(view) or 0 :]


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable (where the system can)."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
