"""Who may look: the pages and figures of runs ask for a viewer's token, where the store has any; what nodes need stays open.

A token comes as `Authorization: Bearer`, as a cookie, or once as `?token=`, which is turned into the cookie: no address keeps it.
"""

from __future__ import annotations

import asyncio
import math
import re
import time

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from atoll.errors import AtollError
from atoll.store.viewers import Viewers, hash_of

_GUARDED = re.compile(r"/|/runs/[^/]*|/metrics|/v1/status|/v1/runs|/v1/runs/[^/]*")
_COOKIE = "atoll"
_FRESH = 0.5
"""For how long, in seconds, what was read of the list is believed."""


class Viewing:
    """An application behind a list of viewers.

    Args:
        app: the application.
        viewers: who may look.
    """

    def __init__(self, app: ASGIApp, viewers: Viewers) -> None:
        self._app, self._viewers = app, viewers
        self._known: frozenset[str] | None = None
        self._read = -math.inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        answer = await self._refusal(Request(scope)) if scope["type"] == "http" and _GUARDED.fullmatch(scope["path"]) else None
        await (answer or self._app)(scope, receive, send)

    async def _refusal(self, request: Request) -> Response | None:
        try:
            known = await self._now()
        except AtollError as error:
            return _no(503, str(error))
        if known is None:
            return None
        shown = request.query_params.get("token")
        if shown and hash_of(shown) in known:
            answer = RedirectResponse(request.url.remove_query_params("token"), 303, {"Cache-Control": "no-store"})
            secure = request.url.scheme == "https"
            answer.set_cookie(_COOKIE, shown, httponly=True, secure=secure, samesite="strict")
            return answer
        kind, _, bearer = request.headers.get("Authorization", "").partition(" ")
        token = bearer if kind.lower() == "bearer" else request.cookies.get(_COOKIE, "")
        if hash_of(token) in known:
            return None
        return _no(401, "this server asks who looks: show a viewer's token, `atoll viewers add NAME` on its machine makes one")

    async def _now(self) -> frozenset[str] | None:
        if time.monotonic() - self._read > _FRESH:
            self._known = await asyncio.to_thread(self._viewers.hashes)
            self._read = time.monotonic()
        return self._known


def _no(status: int, reason: str) -> Response:
    headers = {"WWW-Authenticate": "Bearer", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return Response(f"{reason}\n", status, headers, "text/plain")
