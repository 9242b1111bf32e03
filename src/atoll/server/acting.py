"""What an operator does to a running server from elsewhere: stop its run, revoke a node. `viewing` has found out who asks."""

from __future__ import annotations

import asyncio
from typing import Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from atoll.errors import AtollError, RefusedError
from atoll.server.door import Door


class Site(Protocol):
    """What is acted on."""

    run: str
    door: Door

    def stop(self, reason: str = ...) -> None:
        """End the run in order."""
        ...


def routes(site: Site) -> list[Route]:
    """Return the routes: each acts, and only for an operator."""

    async def stop(request: Request) -> Response:
        site.stop(f"stopped by {request.state.operator}, an operator")
        return JSONResponse({"run": site.run})

    async def revoke(request: Request) -> Response:
        name = request.path_params["name"]
        try:
            gone = await asyncio.to_thread(site.door.revoke, name)
        except AtollError as error:
            return JSONResponse({"error": str(error)}, 404 if isinstance(error, RefusedError) else 503)
        return JSONResponse({"name": name, "node": gone.node})

    acts = {"/v1/stop": stop, "/v1/nodes/{name}/revoke": revoke}
    return [Route(path, act, methods=["POST"]) for path, act in acts.items()]
