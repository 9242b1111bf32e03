"""Asking a running server for something: over TLS where its address says so, and one line where it doesn't answer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from atoll.errors import AtollError, RefusedError, UnreachableError

if TYPE_CHECKING:
    from atoll.tls import Trust

Pin = Annotated[str | None, typer.Option(help="Believe only the server whose key has this pin (`atoll serve --tls` prints it).")]
Ca = Annotated[Path | None, typer.Option(help="Believe servers with a certificate of this CA, a PEM file.")]

ClientCertificate = Annotated[
    Path | None,
    typer.Option(
        "--certificate", help="For a server that asks for one: a file that its operator's `atoll keys certificate` wrote."
    ),
]
OperatorToken = Annotated[
    str | None,
    typer.Option(
        "--token", help="An operator's token, as `atoll viewers add NAME --role operator` showed it; best by its variable."
    ),
]
KafkaConfig = Annotated[
    Path | None,
    typer.Option(
        envvar="ATOLL_KAFKA_CONFIG", help="Where the plan's updates go through Kafka: the file by which it knows this side."
    ),
]


def ask(url: str, path: str, trust: Trust | None = None, token: str | None = None, method: str = "GET") -> dict[str, Any]:
    """Return what a server answers, a JSON object.

    Raises:
        AtollError: this is no address, the server isn't believed, or it says no.
        UnreachableError: it doesn't answer, or no JSON object.
    """
    from atoll.tls import Trust, asks_for_a_certificate

    try:
        with asked(url, path, trust or Trust(), token, method) as answer:
            said = answer.read()
        if answer.status in (401, 403):
            raise RefusedError(f"{url}: {said.decode(errors='replace')}")
        found = dict(json.loads(said))
        if answer.status >= 400:
            raise RefusedError(f"{url}: {found.get('error')}")
        return found
    except (OSError, ValueError, TypeError, HTTPException) as error:
        reason = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error) or type(error).__name__
        place, cut = urlsplit(url), isinstance(error, (HTTPException, ConnectionResetError))
        if cut and place.scheme == "https" and asks_for_a_certificate(place.hostname or "", place.port or 443):
            raise RefusedError(f"{url}: lets in only who shows a certificate of its CA: --certificate FILE") from error
        plain = cut and place.scheme == "http"
        mend = (
            "if it speaks TLS, its address begins with https"
            if plain
            else "is `atoll serve` running? --resume goes on with its run"
        )
        raise UnreachableError(f"{url}: no server answers there ({reason}); {mend}") from error


@contextlib.contextmanager
def asked(url: str, path: str, trust: Trust, token: str | None = None, method: str = "GET") -> Iterator[HTTPResponse]:
    """Ask a server that is believed, and give its answer.

    Raises:
        AtollError: this is no address, or the server isn't believed.
        OSError, HTTPException: it doesn't answer.
    """
    place = urlsplit(url)
    if place.scheme not in ("http", "https") or not place.hostname:
        raise AtollError(f"'{url}' is no address; it looks like http://127.0.0.1:8740")
    from atoll.tls import OtherPinError

    trust.check(url)
    if place.scheme == "http":
        line = HTTPConnection(place.hostname, place.port, timeout=10)
    else:
        line = HTTPSConnection(place.hostname, place.port, timeout=10, context=trust.context(url))
    with contextlib.closing(line):
        try:
            line.connect()
        except OSError as error:
            if isinstance(error, OtherPinError):
                raise RefusedError(str(error.strerror)) from error
            raise
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        line.request(method, place.path.rstrip("/") + path, headers=headers)
        yield line.getresponse()
