"""Listening: a port taken from the first moment, and a web server that leaves signals alone."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from atoll.errors import AtollError


class Web(uvicorn.Server):
    """A web server for one application, which leaves signals to the run; its small messages are not worth compressing."""

    def __init__(self, app: Any) -> None:
        super().__init__(
            uvicorn.Config(app, http="httptools", ws="wsproto", lifespan="off", log_config=None, ws_per_message_deflate=False)
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """Take a port; port 0 takes a free one.

    Raises:
        AtollError: it can't be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)  # from now on the port is taken, and who comes early waits
    except OSError as error:
        listener.close()
        raise AtollError(
            f"can't listen on {host} port {port} ({error.strerror}): choose another --port, or 0 for a free one"
        ) from error
    return listener
