"""The embedded log's two HTTP routes: put an update, and ask how much of it is there."""

from __future__ import annotations

from typing import Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from atoll.errors import LogError, RefusedError, WireError
from atoll.logs.embedded import HEADER, EmbeddedLog
from atoll.wire import Address, Envelope

PATH = "/v1/runs/{run}/rounds/{round:int}/{attempt:int}/updates/{node}"


class Admit(Protocol):
    """Says why an update can't count now, or None where it can."""

    def __call__(self, envelope: Envelope, /) -> str | None:
        """Say so."""
        ...


def routes(log: EmbeddedLog, admit: Admit) -> list[Route]:
    """Return the routes; everything that can be refused is, before a byte of the body is read.

    Args:
        log: where bodies go.
        admit: asked about each update.
    """

    async def put(request: Request) -> Response:
        try:
            envelope = _envelope(request)
            start = _start(request, envelope)
            if log.received(envelope) < envelope.size and (reason := admit(envelope)):
                return _refuse(409, reason)
            new = await log.receive(envelope, start, request.stream())
        except WireError as error:
            return _refuse(400, str(error))
        except RefusedError as error:
            return _refuse(413 if "limit" in str(error) else 409, str(error))
        except LogError as error:
            return _refuse(507, str(error))
        except ClientDisconnect:
            return _refuse(400, "the connection broke off: what came is kept, send the rest")
        return JSONResponse({"digest": envelope.digest}, 201 if new else 200)

    async def head(request: Request) -> Response:
        try:
            envelope = _envelope(request)
        except WireError as error:
            return _refuse(400, str(error))
        return Response(headers={"Upload-Offset": str(log.received(envelope))})

    def _envelope(request: Request) -> Envelope:
        envelope = Envelope.from_header(request.headers.get(HEADER, ""))
        path = request.path_params
        if envelope.address != Address(path["run"], path["round"], path["attempt"], path["node"]):
            raise WireError("the envelope is for another address than the path")
        if envelope.address.run != log.run:
            raise WireError(f"run {envelope.address.run} is not the one that is served: it is {log.run}")
        envelope.verify()
        return envelope

    return [Route(PATH, put, methods=["PUT"]), Route(PATH, head, methods=["HEAD"])]


def _start(request: Request, envelope: Envelope) -> int:
    """Where the sent bytes go on, from `Content-Range: bytes first-last/size`."""
    said = request.headers.get("Content-Range")
    if said is None:
        return 0
    try:
        unit, ranges = said.split(" ", 1)
        span, size = ranges.split("/", 1)
        first, last = map(int, span.split("-", 1))
    except ValueError as error:
        raise WireError(f"no range: {said!r}; it is 'bytes first-last/size'") from error
    if unit != "bytes" or int(size) != envelope.size or last != envelope.size - 1 or not 0 <= first <= last:
        raise WireError(f"the range {said!r} doesn't fit a body of {envelope.size} bytes")
    return first


def _refuse(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status)
