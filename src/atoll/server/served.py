"""What is served on the server's one port: pages, acts, uploads that are wanted; over it all, nodes' connections."""

from __future__ import annotations

from functools import partial
from typing import Protocol

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp

from atoll.drive import Drive
from atoll.errors import UnreachableError
from atoll.logs import Reader
from atoll.logs.embedded import EmbeddedLog
from atoll.server import acting, http, page, uploads
from atoll.server.channel import Channel
from atoll.server.intake import Intake
from atoll.server.pace import UPLOAD
from atoll.server.state import Phase, State, admits
from atoll.server.viewing import Viewing
from atoll.store.viewers import Viewers
from atoll.wire import Envelope


class Site(http.Site, page.Site, acting.Site, Protocol):
    """The server that answers."""

    drive: Drive[State]
    channel: Channel
    intake: Intake
    log: EmbeddedLog | Reader
    sums: EmbeddedLog | None
    viewers: Viewers


def app(site: Site) -> ASGIApp:
    """Return all of it."""
    routes: list[Route] = [*http.routes(site), *page.routes(site), *acting.routes(site)]
    wait = partial(site.channel.spare, cost=UPLOAD)
    if isinstance(site.log, EmbeddedLog):
        routes += uploads.routes(site.log, partial(_admits, site), site.intake.spoilt, wait)
    if site.sums:
        routes += uploads.routes(site.sums, partial(_admits_sum, site), wait=wait, path=uploads.SUMS)
    return site.channel.over(Viewing(Starlette(routes=routes), site.viewers))


def _admits(site: Site, envelope: Envelope) -> str | None:
    """Say why a node's update isn't wanted now."""
    return site.door.refuses(envelope.address.node) or admits(site.drive.state, envelope.address)


def _admits_sum(site: Site, envelope: Envelope) -> str | None:
    """Say why a node's opened sum isn't wanted now.

    Raises:
        UnreachableError: it may be soon: a server that was started again has yet to ask for what another one asked for.
    """
    run, address = site.drive.state, envelope.address
    opening = run.relay is not None and run.relay.phase == run.steps.opens
    if (address.round, address.attempt) == (run.round, run.attempt):
        if opening and run.relay and address.node in run.relay.asked:
            return site.door.refuses(address.node)
        if not opening and run.phase not in (Phase.CLOSING, Phase.ENDING, Phase.ENDED):
            raise UnreachableError("nobody is asked yet to open a sum in this round: try again soon")
    return f"nobody asks this node to open a sum of round {address.round} attempt {address.attempt}"
