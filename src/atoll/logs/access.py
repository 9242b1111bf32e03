"""How a client proves to Kafka who it is: a file of its own, never the plan, which everybody sees.

Enters: a file of `name=value` lines in librdkafka's names, as `atoll kafka users` writes it. Leaves: settings for a client.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from atoll.errors import AtollError

Access = Mapping[str, str]
PLAIN: Access = {}
"""Of a broker that asks nobody."""
KEYS = frozenset(
    (
        "security.protocol",
        "sasl.mechanism",
        "sasl.username",
        "sasl.password",
        "ssl.ca.location",
        "ssl.ca.pem",
        "ssl.certificate.location",
        "ssl.key.location",
        "ssl.key.password",
    )
)
"""What such a file may say. Other names of librdkafka's can load libraries, run commands, or not look whom they talk to."""
_SECRET = ("sasl.password", "ssl.key.password")


def read(path: Path | None) -> Access:
    r"""Return what a file says, or nothing without one. In `ssl.ca.pem` each `\n` stands for a new line.

    Raises:
        AtollError: it can't be read, others may read it, or a line says what isn't wanted.
    """
    if path is None:
        return PLAIN
    try:
        text, mode = path.read_text(encoding="utf-8"), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no text"
        raise AtollError(f"--kafka-config {path}: can't be read ({why}); `atoll kafka users add` writes such a file") from error
    found = dict(_line(path, number, line) for number, line in enumerate(text.splitlines(), 1) if _says(line))
    if os.name == "posix" and mode & (stat.S_IRGRP | stat.S_IROTH) and any(name in found for name in _SECRET):
        raise AtollError(f"--kafka-config {path}: other users of this machine may read its password; chmod 600 {path}")
    if not found.get("security.protocol", "").endswith("SSL"):
        raise AtollError(f"--kafka-config {path}: security.protocol is SASL_SSL or SSL: no password goes in the open")
    return found


def written(access: Access) -> str:
    """Return the text of a file that says so."""
    return "".join(f"{name}={value.replace(chr(10), chr(92) + 'n')}\n" for name, value in access.items())


def _says(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _line(path: Path, number: int, line: str) -> tuple[str, str]:
    name, found, value = (part.strip() for part in line.partition("="))
    if not found or name not in KEYS:  # the line itself is never shown: it may be the password
        said = f"'{name}' is none of {', '.join(sorted(KEYS))}" if found else "is no name=value"
        raise AtollError(f"--kafka-config {path}: line {number}: {said}")
    return name, value.replace("\\n", "\n") if name == "ssl.ca.pem" else value
