"""Who may act on a running server: an operator, by a token that no browser sends by itself."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import aiohttp
import pytest
from tests.federation import plan, rows

from atoll.cli import look
from atoll.cli import nodes as cli
from atoll.errors import RefusedError
from atoll.keys import Identity
from atoll.node.runtime import Node
from atoll.server import viewing
from atoll.server.runtime import Server
from atoll.store.enrolment import Enrolment
from atoll.store.sql import SqlStore
from atoll.store.viewers import Viewers

ACTS = ("/v1/stop", "/v1/nodes/north/revoke")


def test_an_operator_revokes_and_stops_and_no_secret_is_left_anywhere(tmp_path, monkeypatch, caplog, capsys):
    """Viewers, cookies and strangers may not; the run ends in order, and its record says by whom."""
    monkeypatch.setattr(viewing, "_FRESH", 0.0)
    caplog.set_level(logging.DEBUG)
    place = tmp_path / "store"
    viewers, enrolment = Viewers(place), Enrolment(place)
    invited = {name: enrolment.add(name) for name in ("north", "east", "south")}
    secrets = [*invited.values()]

    async def refused(session: aiohttp.ClientSession, status: int, **shown: Any) -> None:
        for path in ACTS:
            async with session.post(path, **shown) as answer:
                assert (answer.status, "only an operator may do that" in await answer.text()) == (status, True), path

    async def together() -> dict[str, Any]:
        gone, closed = asyncio.Event(), asyncio.Event()

        def watch(event: Any) -> None:
            {"revoked": gone, "round": closed}.get(event["what"], asyncio.Event()).set()

        agreed = plan(plan={"rounds": 1000}, cohort={"minimum": 2, "quorum": 1.0})
        server = Server(agreed, store=place, port=0, watch=watch, tls=True)
        pin = server.certificate.pin
        serving = asyncio.create_task(server.serve_async())
        joining = [
            asyncio.create_task(
                Node(server.url, rows(1), name=name, directory=tmp_path / name, pin=pin, token=token).start_async()
            )
            for name, token in invited.items()
        ]
        jar = aiohttp.CookieJar(unsafe=True)
        async with aiohttp.ClientSession(server.url, connector=aiohttp.TCPConnector(ssl=False), cookie_jar=jar) as session:
            await refused(session, 401)  # while everybody may look, nobody may act
            viewer, operator = viewers.add("ward"), viewers.add("anna", "operator")
            secrets.extend((viewer, operator))
            await refused(session, 401)
            await refused(session, 401, params={"token": operator})
            await refused(session, 403, headers={"Authorization": f"Bearer {viewer}"})
            async with session.post("/", data={"token": viewer}, allow_redirects=False) as answer:
                assert answer.status == 303
            await refused(session, 401)  # by the viewer's cookie
            jar.clear()
            cookie = {"Cookie": f"atoll={operator}"}  # an operator's: somebody else's page could have had it sent
            await refused(session, 401, headers=cookie)
            async with session.get("/v1/status", headers=cookie) as answer:
                assert answer.status == 401
            async with session.post("/", data={"token": operator}, allow_redirects=False) as answer:
                assert answer.status == 401, "and no form makes one of it"
            async with session.get("/v1/stop", headers={"Authorization": f"Bearer {operator}"}) as answer:
                assert answer.status == 405

        await closed.wait()
        known: Any = {"server": server.url, "pin": pin, "token": operator, "as_json": True}
        with pytest.raises(RefusedError, match="'west' is not enrolled; there are: north, east, south"):
            await asyncio.to_thread(cli.revoke, "west", **known)
        await asyncio.to_thread(cli.revoke, "north", **known)
        await gone.wait()
        with pytest.raises(RefusedError, match="the node 'north' was revoked by the server's operator"):
            await joining[0]
        await asyncio.to_thread(look.stop, server.url, pin, token=operator, as_json=True)
        history = await serving
        assert [end.outcome for end in await asyncio.gather(*joining[1:])] == ["stopped"] * 2
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    assert (history["outcome"], history["reason"]) == ("stopped", "stopped by anna, an operator")
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said == [{"name": "north", "node": Identity.at(tmp_path / "north" / "node.key").node}, {"run": history["run"]}]
    store = SqlStore(place)
    record = "".join(str(link.entry) for link in store.links(history["run"]))
    for one in (viewers, enrolment, store):
        one.close()
    assert "stopped by anna" in record
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not any(secret.encode() in text for secret in secrets for text in (*files.values(), caplog.text.encode()))
    keys = {path for path in files if path.name.endswith(".key")}
    assert len(keys) == 6  # three nodes', the server's own, its TLS key and its CA's
    for key in keys:
        held = files[key]
        assert not any(held in text or held.hex().encode() in text for path, text in files.items() if path != key)
        assert held.hex() not in caplog.text


def test_an_older_list_knows_viewers_only(tmp_path):
    viewers = Viewers(tmp_path)
    viewers.add("ward")
    with viewers._base.begin() as base:
        base.exec_driver_sql("ALTER TABLE viewers DROP COLUMN role")
        base.exec_driver_sql("UPDATE schema SET version = 4")
    viewers.close()
    again = Viewers(tmp_path)
    again.add("anna", "operator")
    assert [(one.name, one.role) for one in again.all()] == [("ward", "viewer"), ("anna", "operator")]
    again.close()
