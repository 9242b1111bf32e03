"""TLS on the one port: a CA of the server's own, a pin or a CA for its nodes, and one line for everybody else."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_commands import atoll as command
from tests.cli.test_commands import one_line
from tests.federation import atoll, clients, events, plan, rows

from atoll.errors import AtollError, RefusedError
from atoll.node.runtime import Node
from atoll.server.runtime import Server
from atoll.tls import Trust, loopback, own


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
    """Plan, models, updates and the control channel: everything goes by the one port, and every node believes it in its own way."""

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
        (True, "http", {"pin": "0" * 64}, "--pin and --ca are for an address with TLS"),
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
    text = subprocess.run(
        ["openssl", "x509", "-in", again.chain, "-noout", "-ext", "subjectAltName"], capture_output=True, text=True, check=True
    )
    assert "DNS:example.org" in text.stdout
    assert subprocess.run(["openssl", "verify", "-x509_strict", "-CAfile", tmp_path / "tls" / "ca.pem", again.chain], check=False).returncode == 0
    key = subprocess.run(["openssl", "pkey", "-in", again.key, "-pubout", "-outform", "DER"], capture_output=True, check=True)
    assert hashlib.sha256(key.stdout).hexdigest() == again.pin


def test_other_machines_come_in_by_tls_or_by_so_many_words(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(plan(cohort={"deadline": 0.2}).to_json())
    serve = ["serve", path, "--port", "0", "--store", tmp_path / "store"]
    for host in ("0.0.0.0", "::"):
        said = one_line(command(*serve, "--host", host))
        assert f"--host {host} lets other machines in" in said
        assert "add --tls; or --insecure" in said
    assert command(*serve, "--host", "0.0.0.0", "--insecure").returncode == 3  # it listened, and nobody came
    assert "belong together" in one_line(command(*serve, "--tls-cert", path))
    assert "no certificate in PEM with its key" in one_line(command(*serve, "--tls-cert", path, "--tls-key", path))
    assert loopback("localhost")
    assert not loopback("0.0.0.0")
    assert not loopback("")


def test_by_command_with_certificates_of_ones_own(tmp_path):
    own(tmp_path / "made", "127.0.0.1")
    chain, key, ca = (tmp_path / "made" / name for name in ("server.pem", "server.key", "ca.pem"))
    path = tmp_path / "plan.json"
    path.write_text(plan().to_json())
    words = ["serve", path, "--port", "0", "--store", tmp_path / "store", "--tls-cert", chain, "--tls-key", key, "--json"]
    with atoll(*words, log=tmp_path / "log") as server:
        heard = next(event for event in events(server) if event["what"] == "listening")
        url, pin = heard["url"], heard["pin"]
        assert "0 of at least 3 nodes are here" in command("status", url, "--pin", pin).stdout
        assert "0 of at least 3 nodes are here" in command("status", url, "--ca", ca).stdout
        assert "its key has the pin" in one_line(command("status", url, "--pin", "1" * 64))
        assert "certificate" in one_line(command("status", url))
        assert "if it speaks TLS, its address begins with https" in one_line(command("status", url.replace("https", "http")))


def test_what_a_pin_is_held_against():
    with pytest.raises(RefusedError, match="the pin none"):
        Trust("0" * 64).agrees(None, "https://x")
    assert Trust("0" * 64).context().verify_mode is ssl.CERT_NONE
    assert Trust().context().verify_mode is ssl.CERT_REQUIRED
