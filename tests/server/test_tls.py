"""TLS on the one port: a CA of the server's own, a pin or a CA for its nodes, and one line for everybody else."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import stat
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_commands import atoll as command
from tests.cli.test_commands import one_line
from tests.federation import atoll, clients, events, plan, rows

from atoll.cli.nodes import certificate_ as certificate
from atoll.cli.reach import ask
from atoll.errors import AtollError, RefusedError, UnreachableError
from atoll.node.runtime import Node
from atoll.server.runtime import Server
from atoll.tls import Trust, loopback, own, pair


def together(place: Path, talk: Callable[[Server], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    async def both() -> Any:
        server = Server(plan(plan={"rounds": 1}), store=place / "store", port=0, **options)
        serving = asyncio.create_task(server.serve_async())
        try:
            return await talk(server)
        finally:
            server.stop()
            await serving

    return asyncio.run(asyncio.wait_for(both(), 60))


def test_a_run_over_tls_by_pin_and_by_ca(tmp_path):
    """Plan, models, updates and the control channel: all by the one port, which each node believes in its own way."""

    async def talk(server: Server) -> list[str]:
        assert server.url.startswith("https://127.0.0.1:")
        ways = ({"pin": server.certificate.pin}, {"ca": tmp_path / "store" / "tls" / "ca.pem"}, {"pin": server.certificate.pin})
        nodes = [
            Node(server.url, data, name=name, directory=tmp_path / name, **way)
            for (name, data), way in zip(clients().items(), ways, strict=True)
        ]
        return [end.outcome for end in await asyncio.gather(*(node.start_async() for node in nodes))]

    assert together(tmp_path, talk, tls=True) == ["completed"] * 3


@pytest.mark.parametrize(
    ("tls", "scheme", "how", "said"),
    [
        (True, "https", {"pin": "0" * 64}, "its key has the pin .*…, not 0000000000000000…: another server answers there"),
        (True, "https", {}, "its certificate isn't believed here .*: join with the operator's --pin, or a --ca"),
        (True, "http", {}, "what answers there speaks TLS; write its address as https://"),
        (False, "https", {"pin": "0" * 64}, "what answers there speaks no TLS; write its address as http://"),
        (True, "http", {"pin": "0" * 64}, "--pin, --ca and --certificate are for an address with TLS"),
        (True, "https", {"pin": "abc"}, "--pin 'abc' is none: it is 64 of the signs"),
    ],
)
def test_who_is_not_believed_ends_in_one_line(tmp_path, tls, scheme, how, said):
    async def talk(server: Server) -> None:
        url = f"{scheme}://{server.url.partition('://')[2]}"
        await Node(url, rows(1), directory=tmp_path / "node", **how).start_async()

    with pytest.raises(AtollError, match=said) as refused:
        together(tmp_path, talk, tls=tls)
    assert "\n" not in str(refused.value)


def test_a_ca_of_somebody_else_is_not_believed(tmp_path):
    own(tmp_path / "other", "127.0.0.1")

    async def talk(server: Server) -> None:
        await Node(server.url, rows(1), directory=tmp_path / "node", ca=tmp_path / "other" / "ca.pem").start_async()

    with pytest.raises(RefusedError, match="its certificate isn't believed here"):
        together(tmp_path, talk, tls=True)


def test_the_pin_outlives_the_certificate_and_keys_are_private(tmp_path):
    first = own(tmp_path / "tls", "127.0.0.1")
    files = {path.name: path.read_bytes() for path in (tmp_path / "tls").iterdir()}
    again = own(tmp_path / "tls", "example.org")
    assert first.pin == again.pin
    assert {name for name, content in files.items() if (tmp_path / "tls" / name).read_bytes() == content} == {
        "ca.key",
        "ca.pem",
        "server.key",
    }
    assert {path.name for path in (tmp_path / "tls").iterdir() if path.stat().st_mode & 0o077} == {"ca.pem", "server.pem"}
    chain, ca = again.chain, tmp_path / "tls" / "ca.pem"
    assert "DNS:example.org" in openssl("x509", "-in", chain, "-noout", "-ext", "subjectAltName").decode()
    assert openssl("verify", "-x509_strict", "-CAfile", ca, chain).endswith(b"OK\n")
    assert hashlib.sha256(openssl("pkey", "-in", again.key, "-pubout", "-outform", "DER")).hexdigest() == again.pin


def openssl(*words: str | Path) -> bytes:
    return subprocess.run(["openssl", *map(str, words)], capture_output=True, check=True).stdout


def test_other_machines_come_in_by_tls_or_by_so_many_words(tmp_path):
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(AtollError, match=f"--host {host} lets other machines in.*add --tls; or --insecure"):
            Server(plan(), host=host, port=0, store=tmp_path / "store")

    async def talk(server: Server) -> bool:
        return await asyncio.to_thread(ask, server.url.replace("0.0.0.0", "127.0.0.1"), "/healthz")

    assert together(tmp_path, talk, host="0.0.0.0", insecure=True)["status"] == "ok"
    with pytest.raises(AtollError, match="no certificate in PEM with its bare key"):
        Server(plan(), port=0, store=tmp_path / "store", tls=(Path(__file__), Path(__file__)))
    assert loopback("localhost")
    assert not loopback("")


def test_by_command_with_certificates_of_ones_own(tmp_path):
    own(tmp_path / "made", "127.0.0.1")
    chain, key, ca = (tmp_path / "made" / name for name in ("server.pem", "server.key", "ca.pem"))
    path = tmp_path / "plan.json"
    path.write_text(plan().to_json())
    assert "belong together" in one_line(command("serve", path, "--tls-cert", chain))
    words = ["serve", path, "--port", "0", "--store", tmp_path / "store", "--tls-cert", chain, "--tls-key", key, "--json"]
    with atoll(*words, log=tmp_path / "log") as server:
        heard = next(event for event in events(server) if event["what"] == "listening")
        url, pin = heard["url"], heard["pin"]
        assert "0 of at least 3 nodes are here" in command("status", url, "--pin", pin).stdout
        assert ask(url, "/v1/status", Trust(ca=ca))["phase"] == "waiting for nodes"
        with pytest.raises(RefusedError, match="its key has the pin"):
            ask(url, "/v1/status", Trust("1" * 64))
        with pytest.raises(UnreachableError, match="certificate"):
            ask(url, "/v1/status")
        with pytest.raises(UnreachableError, match="if it speaks TLS, its address begins with https"):
            ask(url.replace("https", "http"), "/v1/status")


def test_what_a_pin_is_held_against():
    assert Trust("0" * 64).context("https://x").verify_mode is ssl.CERT_NONE
    assert Trust().context("https://x").verify_mode is ssl.CERT_REQUIRED


def test_who_shows_no_certificate_does_not_get_past_the_handshake(tmp_path, capsys):
    """Plan, channel, updates, status: all of it, by pin and by CA; and the node says in one line what it lacks."""
    store = tmp_path / "store"
    (tmp_path / "mine").mkdir()
    for name in (*clients(), "operator"):
        certificate(name, tmp_path / "mine" / name, store)
        assert f"only {name} may have it" in capsys.readouterr().out
    own(tmp_path / "other", "127.0.0.1")
    pair(tmp_path / "other", "stranger", tmp_path / "stranger")
    assert stat.S_IMODE((tmp_path / "stranger").stat().st_mode) == 0o600
    ca = store / "tls" / "ca.pem"

    async def talk(server: Server) -> list[str]:
        pin = server.certificate.pin
        for shown in ({}, {"certificate": tmp_path / "stranger"}):
            with pytest.raises(RefusedError, match="lets in only who shows a certificate of its CA: --certificate FILE"):
                await Node(server.url, rows(1), directory=tmp_path / "none", pin=pin, **shown).start_async()
        with pytest.raises(RefusedError, match="lets in only who shows a certificate of its CA"):
            await asyncio.to_thread(ask, server.url, "/v1/status", Trust(pin))
        mine = Trust(pin, None, tmp_path / "mine" / "operator")
        assert (await asyncio.to_thread(ask, server.url, "/v1/status", mine))["phase"] == "waiting for nodes"
        ways = ({"pin": pin}, {"ca": ca}, {"pin": pin, "ca": ca})
        nodes = [
            Node(server.url, data, name=name, directory=tmp_path / name, certificate=tmp_path / "mine" / name, **way)
            for (name, data), way in zip(clients().items(), ways, strict=True)
        ]
        return [end.outcome for end in await asyncio.gather(*(node.start_async() for node in nodes))]

    assert together(tmp_path, talk, tls=True, client_certificates=True) == ["completed"] * 3
    with pytest.raises(AtollError, match="--client-certificates is a part of TLS: add --tls"):
        Server(plan(), store=tmp_path / "store", port=0, client_certificates=True)
    with pytest.raises(AtollError, match="no key with its certificate in PEM"):
        Node("https://x", rows(1), directory=tmp_path / "none", certificate=ca)
    with pytest.raises(AtollError, match="is there already"):
        certificate("operator", tmp_path / "mine" / "operator", store)
