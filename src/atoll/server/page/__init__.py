"""The status page: what a run does, how its models do, what its rounds cost; read-only, and all on one page.

Enters: the run's present state and the store. Leaves: HTML that needs nothing from elsewhere and runs one script, which
asks again every second. Everything in it that somebody else wrote is escaped. Imported by the runtime only.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from atoll.errors import AtollError
from atoll.server.page import metrics, view
from atoll.server.page.past import Past
from atoll.store import RunRow
from atoll.store.sql import SqlStore

_HERE = Path(__file__).parent
_STYLE, _SCRIPT = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
_FRESH = 0.4
"""For how long, in seconds, what was rendered is given to whoever else asks: many viewers cost what one does."""
_KEPT = 8
"""How many runs' pasts, and how many rendered pages, are kept."""


class Site(Protocol):
    """What the page shows."""

    run: str
    store: SqlStore

    def status(self) -> dict[str, Any]:
        """The current run's state, as plain values."""
        ...


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src {_hash(_STYLE)}; script-src {_hash(_SCRIPT)}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Pages:
    """Renders pages, and remembers what it has read of each run.

    All in one thread of its own: neither the event loop nor the threads that verify and aggregate ever wait for a page.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._worker = ThreadPoolExecutor(1, "page")
        self._pasts: OrderedDict[str, Past] = OrderedDict()
        self._made: OrderedDict[Any, tuple[float, asyncio.Future[str | None]]] = OrderedDict()
        words = Environment(
            loader=FileSystemLoader(_HERE),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        words.filters.update(view.FILTERS)
        self._template = words.get_template("page.html")

    async def page(self, run: str, which: view.Which) -> str | None:
        """Return the page of a run, or None where there is no such run.

        Raises:
            StoreError: it can't be read.
        """
        return await self._once((run, which), run, lambda status: self.render(run, which, status))

    async def metrics(self) -> str:
        """Return the current run's figures as Prometheus reads them.

        Raises:
            StoreError: they can't be read.
        """

        def make(status: Mapping[str, Any] | None) -> str | None:
            row = self._site.store.get(self._site.run)
            return metrics.exposition(status, self.past(row)) if status and row else None

        return await self._once("metrics", self._site.run, make) or ""

    async def _once(self, key: Any, run: str, make: Callable[[Mapping[str, Any] | None], str | None]) -> str | None:
        """Give what is being made or was made just now, or have it made from the run's present state."""
        began, text = self._made.pop(key, (-math.inf, None))
        if text is None or (text.done() and time.monotonic() - began > _FRESH):
            status = self._site.status() if run == self._site.run else None
            began, text = time.monotonic(), asyncio.get_running_loop().run_in_executor(self._worker, make, status)
        self._made[key] = began, text
        if len(self._made) > _KEPT:
            self._made.popitem(last=False)
        return await asyncio.shield(text)

    def render(self, run: str, which: view.Which, status: Mapping[str, Any] | None) -> str | None:
        """Make a page."""
        row = self._site.store.get(run)
        if row is None:
            return None
        seen = view.view(self._site.store, row, self._site.run, self.past(row), which, status)
        return self._template.render(seen, style=_STYLE, script=_SCRIPT)

    def past(self, row: RunRow) -> Past:
        """Return what is stored of a run by now."""
        past = self._pasts.pop(row.run, None) or Past(self._site.store, row)
        past.refresh()
        self._pasts[row.run] = past
        if len(self._pasts) > _KEPT:
            self._pasts.popitem(last=False)
        return past


def routes(site: Site) -> list[Route]:
    """Return the routes of the page and of the metrics."""
    pages = Pages(site)

    async def page(request: Request) -> Response:
        which = view.Which(*(_number(request.query_params.get(name)) for name in ("rounds", "runs")))
        try:
            text = await pages.page(request.path_params.get("run", site.run), which)
        except AtollError as error:
            return _no(503, str(error))
        if text is None:
            return _no(404, "there is no such run; / lists those that there are")
        return Response(text, media_type="text/html", headers=HEADERS)

    async def scrape(request: Request) -> Response:
        del request
        try:
            return Response(await pages.metrics(), headers={"Content-Type": metrics.CONTENT_TYPE})
        except AtollError as error:
            return _no(503, str(error))

    return [Route(path, answer, methods=["GET"]) for path, answer in (("/", page), ("/runs/{run}", page), ("/metrics", scrape))]


def _no(status: int, reason: str) -> Response:
    return Response(f"{reason}\n", status, media_type="text/plain", headers=HEADERS)


def _number(said: str | None) -> int:
    """Which page of a long table is asked for: the first, where it is said in no way that can be understood."""
    return max(1, int(said)) if said and said.isascii() and said.isdecimal() and len(said) < 7 else 1
