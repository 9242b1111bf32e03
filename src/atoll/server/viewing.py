"""Who may look and who may act: pages and figures ask for a token where the store has any, and acts for an operator's.

A token comes as `Authorization: Bearer`. A browser sends a viewer's once, by the form that refuses it, and gets a cookie, good
for looking only: no page of somebody else's can have a browser act. What nodes need stays open. No address holds a token.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Mapping
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from atoll.errors import AtollError
from atoll.store.viewers import Person, Viewers, hash_of

_PAGES = r"/|/runs/[^/]*"
_GUARDED = re.compile(_PAGES + r"|/metrics|/v1/status|/v1/runs|/v1/runs/[^/]*")
_ACTS = re.compile(r"/v1/stop|/v1/nodes/[^/]*/revoke")
_COOKIE = "atoll"
_FRESH = 0.5
"""For how long, in seconds, what was read of the list is believed."""
_FORM = 1024
"""A form with a token is no longer, in bytes."""
_ASK = "this server asks who looks: show a viewer's token, `atoll viewers add NAME` on its machine makes one"
_DOOR = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Atoll</title>
<form method="post"><p>This server asks who looks.</p><p><label>Viewer's token
<input name="token" type="password" autocomplete="current-password" required autofocus></label> <button>Look</button></p></form>
</html>
"""
_STRICT = {
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
Known = Mapping[str, Person]


class Viewing:
    """An application behind a list of people.

    Args:
        app: the application; of an act, the request's `state.operator` says whose it is.
        viewers: who may look, and who may act.
    """

    def __init__(self, app: ASGIApp, viewers: Viewers) -> None:
        self._app, self._viewers = app, viewers
        self._known: Known | None = None
        self._read = -math.inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        answer: Response | None = None
        if scope["type"] == "http":
            request, path = Request(scope, receive), scope["path"]
            try:
                if _ACTS.fullmatch(path):
                    answer = _may_act(request, await self._now() or {})
                elif _GUARDED.fullmatch(path) and (known := await self._now()) is not None:
                    answer = await _may_look(request, known)
            except AtollError as error:
                answer = _no(503, str(error))
        await (answer or self._app)(scope, receive, send)

    async def _now(self) -> Known | None:
        if time.monotonic() - self._read > _FRESH:
            self._known = await asyncio.to_thread(self._viewers.known)
            self._read = time.monotonic()
        return self._known


def _may_act(request: Request, known: Known) -> Response | None:
    who = known.get(hash_of(_bearer(request)))
    if who is None or who.role != "operator":
        status = 403 if who else 401
        return _no(status, "only an operator may do that: `atoll viewers add NAME --role operator` on its machine makes a token")
    request.state.operator = who.name
    return None


async def _may_look(request: Request, known: Known) -> Response | None:
    if request.method == "POST" and re.fullmatch(_PAGES, request.url.path):
        return await _signed_in(request, known)
    by_cookie = known.get(hash_of(request.cookies.get(_COOKIE, "")))
    if hash_of(_bearer(request)) in known or (by_cookie and by_cookie.role == "viewer"):
        return None
    browser = "text/html" in request.headers.get("Accept", "")
    return _no(401, _DOOR, html=True) if browser and re.fullmatch(_PAGES, request.url.path) else _no(401, _ASK)


async def _signed_in(request: Request, known: Known) -> Response:
    """Turn a viewer's token, sent by the form, into a cookie."""
    sent = bytearray()
    async for piece in request.stream():
        sent += piece
        if len(sent) > _FORM:
            return _no(413, "no token is as long")
    token = parse_qs(sent.decode(errors="replace")).get("token", [""])[0].strip()
    who = known.get(hash_of(token))
    if who is None or who.role != "viewer":
        return _no(401, _DOOR, html=True)
    answer = RedirectResponse(request.url.path, 303, {"Cache-Control": "no-store"})
    answer.set_cookie(_COOKIE, token, httponly=True, secure=request.url.scheme == "https", samesite="strict")
    return answer


def _bearer(request: Request) -> str:
    kind, _, token = request.headers.get("Authorization", "").partition(" ")
    return token if kind.lower() == "bearer" else ""


def _no(status: int, reason: str, *, html: bool = False) -> Response:
    headers = {"WWW-Authenticate": "Bearer", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **_STRICT}
    return Response(f"{reason}\n", status, headers, "text/html" if html else "text/plain")
