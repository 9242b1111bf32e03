"""What the server answers over HTTP: the plan, models by digest, runs, its state of health."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from atoll.errors import AtollError
from atoll.logs import pieces
from atoll.messages import PROTOCOL
from atoll.plan import Plan
from atoll.server.book import Book
from atoll.store.models import Models
from atoll.store.sql import SqlStore


class Site(Protocol):
    """What the pages show."""

    plan: Plan
    run: str
    store: SqlStore
    models: Models
    book: Book

    def challenge(self) -> str:
        """Something fresh for a handshake to sign."""
        ...

    def status(self) -> dict[str, Any]:
        """The current run's state, as plain values."""
        ...


def routes(site: Site) -> list[Route]:
    """Return the read-only routes."""
    agreed = functools.cache(lambda: json.loads(site.plan.to_json()))  # every node asks for it, and it doesn't change

    async def plan(request: Request) -> Response:
        del request
        body = {
            "protocol": PROTOCOL,
            "run": site.run,
            "digest": site.plan.digest,
            "plan": agreed(),
            "challenge": site.challenge(),
        }
        return JSONResponse(body, headers={"Cache-Control": "no-store"})

    async def agreement(request: Request) -> Response:
        if request.path_params["digest"] != site.plan.digest:
            return JSONResponse({"error": f"the run's plan is {site.plan.digest}"}, 404)
        return Response(site.plan.to_json(), media_type="application/json")  # the very bytes that the digest is of

    async def runs(request: Request) -> Response:
        del request
        listed = await asyncio.to_thread(site.store.runs)
        return JSONResponse({"current": site.run, "runs": [row.run for row in listed]})

    async def run(request: Request) -> Response:
        try:
            history = await asyncio.to_thread(site.store.history, request.path_params["run"])
        except AtollError as error:
            return JSONResponse({"error": str(error)}, 404)
        return JSONResponse(_plain(history))

    async def status(request: Request) -> Response:
        del request
        return JSONResponse(site.status())

    async def healthz(request: Request) -> Response:
        del request
        return JSONResponse({"status": "ok", "run": site.run})

    pages = {
        "/v1/plan": plan,
        "/v1/plans/{digest}": agreement,
        **_models(site),
        "/v1/runs": runs,
        "/v1/runs/{run}": run,
        "/v1/status": status,
    }
    return [Route(path, page, methods=["GET"]) for path, page in {**pages, "/healthz": healthz}.items()]


def _models(site: Site) -> dict[str, Callable[[Request], Awaitable[Response]]]:
    """Return what gives models by digest, and steps from one to the next."""

    async def model(request: Request) -> Response:
        digest = request.path_params["digest"]
        try:
            path = site.models.path(digest)
        except AtollError as error:
            return JSONResponse({"error": str(error)}, 404)
        return _file(request, path, digest, site.book.fetched)

    async def step(request: Request) -> Response:
        before, digest = request.path_params["before"], request.path_params["digest"]
        if (path := site.models.step(before, digest)) is None:
            return JSONResponse({"error": f"no step leads from model {before[:64]} to {digest[:64]}: fetch it whole"}, 404)
        return _file(request, path, f"{before}-{digest}", site.book.fetched)

    return {"/v1/models/{digest}": model, "/v1/models/{digest}/from/{before}": step}


def _plain(value: Any) -> Any:
    """The same value with null for each number that JSON doesn't have: the loss of a run that went astray.

    >>> _plain({"losses": [0.5, float("nan")]})
    {'losses': [0.5, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


_PIECE = 1 << 20


def _file(request: Request, path: Path, digest: str, sent: Callable[[int], None]) -> Response:
    """Answer with an immutable file, or with its end from `Range: bytes=first-` on, in pieces long enough to be quick.

    `sent` is told how long each is.
    """
    headers = {
        "ETag": f'"{digest}"',
        "Cache-Control": "public, max-age=31536000, immutable",
        "Accept-Ranges": "bytes",
        "X-Content-Type-Options": "nosniff",
    }
    if request.headers.get("If-None-Match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    size, start = path.stat().st_size, 0
    if asked := re.fullmatch("bytes=([0-9]{1,19})-", request.headers.get("Range", "")):
        start = int(asked[1])
        if start >= size:
            return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"

    async def content() -> AsyncIterator[bytes | memoryview]:
        for piece in pieces(path, start, _PIECE):
            sent(len(piece))
            yield memoryview(piece)

    headers["Content-Length"] = str(size - start)
    return StreamingResponse(content(), 206 if asked else 200, headers, "application/octet-stream")
