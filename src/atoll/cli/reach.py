"""Asking a running server for something: over TLS where its address says so, and one line where it doesn't answer."""

from __future__ import annotations

import contextlib
import json
import ssl
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Annotated, Any, cast
from urllib.parse import urlsplit

import typer

from atoll.errors import AtollError, RefusedError, UnreachableError

Pin = Annotated[str | None, typer.Option(help="Believe only the server whose key has this pin (`atoll serve --tls` prints it).")]
Ca = Annotated[Path | None, typer.Option(help="Believe servers with a certificate of this CA, a PEM file.")]


def ask(url: str, path: str, pin: str | None = None, ca: Path | None = None, token: str | None = None) -> dict[str, Any]:
    """Return what a server answers, a JSON object.

    Raises:
        AtollError: this is no address, the server isn't believed, or it asks for a token.
        UnreachableError: it doesn't answer, or no JSON object.
    """
    from atoll.tls import Trust

    place, trust = urlsplit(url), Trust(pin, ca)
    if place.scheme not in ("http", "https") or not place.hostname:
        raise AtollError(f"'{url}' is no address; it looks like http://127.0.0.1:8740")
    trust.check(url)
    try:
        if place.scheme == "http":
            line = HTTPConnection(place.hostname, place.port, timeout=10)
        else:
            line = HTTPSConnection(place.hostname, place.port, timeout=10, context=trust.context())
        with contextlib.closing(line):
            line.connect()
            if place.scheme == "https":
                trust.agrees(cast("ssl.SSLSocket", line.sock).getpeercert(binary_form=True), url)
            line.request("GET", place.path.rstrip("/") + path, headers={"Authorization": f"Bearer {token}"} if token else {})
            answer = line.getresponse()
            said = answer.read()
        if answer.status == 401:
            raise RefusedError(f"{url}: {said.decode(errors='replace')}")
        return dict(json.loads(said))
    except (OSError, ValueError, TypeError, HTTPException) as error:
        reason = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error) or type(error).__name__
        cut = isinstance(error, (HTTPException, ConnectionResetError)) and place.scheme == "http"
        mend = "if it speaks TLS, its address begins with https" if cut else "is `atoll serve` running?"
        raise UnreachableError(f"{url}: no server answers there ({reason}); {mend}") from error
