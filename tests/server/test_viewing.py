"""Who may look: everybody, until the first viewer is added; then who shows a token."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.cli.test_commands import atoll as command
from tests.cli.test_commands import one_line
from tests.federation import clients, plan

from atoll.cli.reach import ask
from atoll.errors import RefusedError
from atoll.node.runtime import Node
from atoll.server import viewing
from atoll.server.runtime import Server
from atoll.store.viewers import Viewers
from atoll.tls import Trust

GUARDED = ("/", "/runs/some", "/metrics", "/v1/status", "/v1/runs", "/v1/runs/some")
OPEN = ("/healthz", "/v1/plan", "/v1/models/none", "/v1/plans/none")


def test_once_a_viewer_is_added_everybody_is_asked(tmp_path, monkeypatch, caplog):
    """Over TLS; nodes take part as before, and the token stays out of logs, addresses and the store."""
    monkeypatch.setattr(viewing, "_FRESH", 0.0)
    caplog.set_level(logging.DEBUG)
    viewers = Viewers(tmp_path / "store")

    async def seen(session: aiohttp.ClientSession, path: str, **shown: Any) -> int:
        async with session.get(path, allow_redirects=False, **shown) as answer:
            if answer.status == 401:
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert "Traceback" not in await answer.text()
            return answer.status

    async def together() -> str:
        server = Server(plan(plan={"rounds": 1}), store=tmp_path / "store", port=0, tls=True)
        serving = asyncio.create_task(server.serve_async())
        jar = aiohttp.CookieJar(unsafe=True)  # it takes cookies of bare addresses, too
        connector = aiohttp.TCPConnector(ssl=False)
        async with aiohttp.ClientSession(server.url, connector=connector, cookie_jar=jar) as session:
            for path in (*GUARDED, *OPEN):
                assert await seen(session, path) in (200, 404), path
            token = viewers.add("ward")
            for path in GUARDED:
                assert await seen(session, path) == 401, path
                assert await seen(session, path, headers={"Authorization": "Bearer wrong"}) == 401
                assert await seen(session, path, params={"token": token}) == 401, "no address opens anything"
                assert await seen(session, path, headers={"Authorization": f"Bearer {token}"}) in (200, 404)
            for path in OPEN:
                assert await seen(session, path) in (200, 404), path
            async with session.get("/", headers={"Accept": "text/html"}) as answer:
                assert answer.status == 401
                assert '<form method="post">' in await answer.text()
            for wrong, status in (({"token": "wrong"}, 401), ({"token": "x" * 2000}, 413), (b"\xff%zz&&token;=%00&token", 401)):
                async with session.post("/", data=wrong) as answer:
                    assert answer.status == status
            async with session.post("/", data={"token": token}, allow_redirects=False) as answer:
                assert (answer.status, answer.headers["Location"]) == (303, "/")
                cookie = answer.headers["Set-Cookie"]
                assert all(word in cookie for word in ("HttpOnly", "Secure", "SameSite=strict"))
            assert await seen(session, "/") == 200
            viewers.revoke("ward")
            assert await seen(session, "/") == 401  # nobody left, and still nobody else
            pin = server.certificate.pin
            with pytest.raises(RefusedError, match="asks who looks"):
                await asyncio.to_thread(ask, server.url, "/v1/status", Trust(pin), token)
            fresh = viewers.add("ward")
            assert (await asyncio.to_thread(ask, server.url, "/v1/status", Trust(pin), fresh))["plan"] == "tiny"
        nodes = [Node(server.url, data, name=name, directory=tmp_path / name, pin=pin) for name, data in clients().items()]
        await asyncio.gather(serving, *(node.start_async() for node in nodes))
        return token

    token = asyncio.run(asyncio.wait_for(together(), 60))
    viewers.close()
    assert token not in caplog.text
    assert not any(token.encode() in path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())


def test_commands(tmp_path: Path):
    store = tmp_path / "store"
    assert "everybody who reaches the server may look" in command("viewers", "list", "--store", store).stdout
    assert len(json.loads(command("viewers", "add", "ward", "--store", store, "--json").stdout)["token"]) == 48
    assert "'ward' has a token already" in one_line(command("viewers", "add", "ward", "--store", store))
    assert "there is no viewer 'home'; there are: ward" in one_line(command("viewers", "revoke", "home", "--store", store))
