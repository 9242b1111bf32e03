"""The two HTTP routes of what goes up to a log in the server: put an update, or an opened sum; ask how much of it is there."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable
from typing import Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from atoll.errors import AtollError, LogError, RefusedError, UnreachableError, WireError
from atoll.logs.embedded import EmbeddedLog
from atoll.logs.upload import HEADER
from atoll.wire import Envelope

PATH = "/v1/runs/{run}/rounds/{round}/{attempt}/updates/{node}"
SUMS = "/v1/runs/{run}/rounds/{round}/{attempt}/sums/{node}"
_RANGE = re.compile("bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")
_STATUSES = ((WireError, 400), (RefusedError, 409), (LogError, 507))


class Admit(Protocol):
    """Says why an update can't count now, or None where it can."""

    def __call__(self, envelope: Envelope, /) -> str | None:
        """Say so."""
        ...


async def _nothing(envelope: Envelope, reason: str) -> None:
    del envelope, reason


def routes(
    log: EmbeddedLog,
    admit: Admit,
    altered: Callable[[Envelope, str], Awaitable[None]] = _nothing,
    wait: Callable[[str], float] = lambda _: 0.0,
    path: str = PATH,
) -> list[Route]:
    """Return the routes; everything that can be refused is, before a byte of the body is read.

    Args:
        log: where bodies go.
        admit: asked about each update.
        altered: told of a body that isn't what its envelope says, and why.
        wait: asked for how many seconds a node may begin none, since it has begun too many.
        path: of both routes.
    """

    async def put(request: Request) -> Response:
        try:
            envelope = _envelope(request, log.run)
            start = _start(request, envelope)
            if envelope.size > log.limit:
                raise _StatusError(413, f"the update has {envelope.size} bytes, the limit is {log.limit}")
            if log.received(envelope) < envelope.size and (reason := admit(envelope)):
                raise _StatusError(409, reason)
            if seconds := wait(envelope.address.node):
                raise _StatusError(429, f"the node has begun too many uploads: try again in {math.ceil(seconds)} s")
            try:
                new = await log.receive(envelope, start, request.stream())
            except RefusedError as error:
                await altered(envelope, str(error))
                raise
        except ClientDisconnect:
            return _error(400, "the connection broke off: what came is kept, send the rest")
        except AtollError as error:
            return _error(_status(error, request), str(error))
        return JSONResponse({"digest": envelope.digest}, 201 if new else 200)

    async def head(request: Request) -> Response:
        try:
            there = await log.offset(_envelope(request, log.run))
        except AtollError as error:
            return _error(_status(error, request), str(error))
        return Response(headers={"Upload-Offset": str(there)})

    return [Route(path, put, methods=["PUT"]), Route(path, head, methods=["HEAD"])]


class _StatusError(RefusedError):
    """A refusal with an HTTP status of its own."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def _status(error: AtollError, request: Request) -> int:
    if isinstance(error, _StatusError):
        return error.status
    if isinstance(error, UnreachableError):  # not for good: the same body may go through later
        return 416 if "Content-Range" in request.headers else 408
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)


def _envelope(request: Request, run: str) -> Envelope:
    envelope = Envelope.from_header(request.headers.get(HEADER, ""))
    path = request.path_params
    if tuple(map(str, envelope.address)) != (path["run"], path["round"], path["attempt"], path["node"]):
        raise WireError("the envelope is for another address than the path")
    if envelope.address.run != run:
        raise _StatusError(404, f"run {envelope.address.run} is not the one that is served: it is {run}")
    try:
        envelope.verify()
    except WireError as error:
        raise _StatusError(403, str(error)) from error
    return envelope


def _start(request: Request, envelope: Envelope) -> int:
    """Where the sent bytes go on, from `Content-Range: bytes first-last/size`."""
    said = request.headers.get("Content-Range")
    if said is None:
        return 0
    if not (read := _RANGE.fullmatch(said)):
        raise WireError(f"no range: {said[:100]!r}; it is 'bytes first-last/size'")
    first, last, size = map(int, read.groups())
    if size != envelope.size or last != size - 1 or first > last:
        raise WireError(f"the range {said!r} doesn't fit a body of {envelope.size} bytes")
    return first


def _error(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status)
