"""What a server offers: its plan and its run, read over HTTP before anything is promised."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp

from atoll.errors import AtollError, UnreachableError, WireError
from atoll.keys import Identity
from atoll.messages import PROTOCOL, Connect
from atoll.node.trust import refusal

LIMIT = 64 << 20
"""No offer is longer than this, in bytes: a plan holds the description of a model, never its weights."""
_TRIES = 60
"""How often a node looks for its server before it gives up: about five minutes."""


async def first_offer(session: aiohttp.ClientSession, url: str, waiting: Callable[[str], None]) -> dict[str, Any]:
    """Wait, for some minutes, until a server answers: it may be started after its nodes.

    Raises:
        AtollError: this is no address, what answers there is no server of this protocol, or one that isn't trusted.
        UnreachableError: nothing answered.
    """
    if not url.startswith(("http://", "https://")):
        raise AtollError(f"'{url}' is no address of a server; write it as http://host:port")
    for tries in itertools.count(1):
        try:
            return await offered(session, url)
        except UnreachableError as error:
            if tries > _TRIES:
                raise
            waiting(f"{error}; trying again")
            await asyncio.sleep(min(tries, 5))
    raise AssertionError


async def offered(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """Return `plan`, `digest`, `run` and a `challenge` of a server.

    Raises:
        UnreachableError: it doesn't answer now.
        RefusedError: its certificate isn't believed, or only one side speaks TLS.
        WireError: it is none of this protocol.
    """
    try:
        body = json.loads(await _get(session, url, "/v1/plan"))
        protocol = body.get("protocol")
    except (ValueError, AttributeError, RecursionError) as error:
        raise WireError(f"{url}/v1/plan is no plan: is it another program's address?") from error
    if protocol != PROTOCOL:
        raise WireError(f"{url} speaks protocol {protocol}, this node {PROTOCOL}: upgrade the older one")
    if not isinstance(body.get("plan"), dict) or not all(isinstance(body.get(name), str) for name in ("run", "digest")):
        raise WireError(f"{url}/v1/plan says no plan, digest or run")
    return dict(body)


def greeting(identity: Identity, name: str, offer: Mapping[str, Any], token: str | None = None) -> Connect:
    """Return the handshake that answers an offer's challenge; a token signs it too, and stays here.

    Raises:
        WireError: the offer is none.
    """
    hello = {"name": name, "key": identity.public.hex(), "plan": offer["digest"], "challenge": offer.get("challenge")}
    said = Connect.read(hello)
    words = said.signed(str(offer["run"]))
    proof = Identity.of(token).sign(words).hex() if token else ""
    return said.model_copy(update={"signature": identity.sign(words).hex(), "proof": proof})


async def _get(session: aiohttp.ClientSession, url: str, path: str) -> bytes:
    try:
        async with session.get(url + path) as response:
            content = bytearray()
            async for piece in response.content.iter_chunked(1 << 16):
                content += piece
                if len(content) > LIMIT:
                    raise WireError(f"{url}{path}: goes on after {LIMIT >> 20} MiB, and no plan is as long")
            if response.status == 200:
                return bytes(content)
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        if final := await refusal(url, error):
            raise final from error
        number = (error.errno if isinstance(error, OSError) else None) or 0
        why = os.strerror(number) if number > 0 else str(error) or type(error).__name__
        raise UnreachableError(f"{url}: no server answers there ({why})") from error
    raise UnreachableError(f"{url}{path}: HTTP {response.status}")
