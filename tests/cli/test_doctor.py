"""`atoll doctor`: what it finds is so, what is wrong is said with its mend, and no secret is shown."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.federation import plan

from atoll import __version__
from atoll.cli import doctor
from atoll.server.runtime import Server
from atoll.tls import Trust


def run(*words: str | Path, code: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "atoll", "doctor", "--json", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"] == sum(one["state"] == "problem" for one in found["findings"])
    return {one["what"]: one for one in found["findings"]}


def test_a_machine_in_order(tmp_path):
    found = run("--store", tmp_path / "not" / "yet", "--port", "0")
    assert found["atoll"]["said"].startswith(f"{__version__}, Python {sys.version.split()[0]}")
    assert {"core", "[keras]", "[kafka]", "machine", "numpy", "clock", "disk", "port"} <= found.keys()
    assert found["core"]["state"] == "fine"
    assert "numpy" in found["core"]["said"]
    assert all(one["state"] != "problem" for one in found.values())


def test_what_is_wrong_is_a_problem_with_its_mend(tmp_path):
    bad = tmp_path / "plan.toml"
    bad.write_text("[plan]\nnam = 'x'\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = run(bad, "--port", str(port), "--kafka", "127.0.0.1:1", "--server", "http://me:secret@127.0.0.1:1", code=2)
    assert "plan.name: is missing" in found["plan"]["said"]
    assert found["port"]["said"].startswith(f"{port} can't be listened on")
    assert "is it running? `atoll kafka start`" in found["broker"]["said"]
    assert "http://127.0.0.1:1: no Atoll server answers there" in found["server"]["said"]
    assert "secret" not in str(found)


def test_a_plan_is_tried_and_its_broker_asked(tmp_path, kafka):
    path = tmp_path / "plan.json"
    path.write_text(plan(log={"kafka": kafka}).to_json())
    found = run(path)
    assert found["plan"]["said"] == f"tiny, a logistic model, digest {plan(log={'kafka': kafka}).digest[:12]}"
    assert found["broker"]["said"] == f"{kafka} answers: 1 in all"


def test_a_server_is_asked_for_its_run_and_its_clock(tmp_path):
    async def together() -> list[doctor.Finding]:
        server = Server(plan(), store=tmp_path / "store", port=0, tls=True)
        serving = asyncio.create_task(server.serve_async())
        try:
            (other,) = await asyncio.to_thread(lambda: list(doctor._server(server.url, Trust("0" * 64))))
            assert "another server answers there" in other.said
            return await asyncio.to_thread(lambda: list(doctor._server(server.url, Trust(server.certificate.pin))))
        finally:
            server.stop()
            await serving

    answered, clocks = asyncio.run(asyncio.wait_for(together(), 60))
    assert answered.state == clocks.state == "fine"
    assert "serves run 2" in answered.said


def test_what_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("keras", "numpy") else "1")
    found = {one.what: one for one in doctor._parts()}
    assert found["[keras]"] == ("[keras]", "absent", "keras: pip install 'atoll-fl[keras]'")
    assert found["core"] == ("core", "problem", "numpy: pip install atoll-fl")
    assert found["[sklearn]"].state == "fine"


@pytest.mark.parametrize(("chosen", "state"), [("Prescott", "note"), ("SkylakeX", "fine")])
def test_kernels_that_do_not_know_the_processor_are_a_note(monkeypatch, chosen, state):
    monkeypatch.setattr(doctor, "_openblas", lambda: chosen)
    monkeypatch.setattr(doctor, "_flags", lambda: frozenset({"avx2", "avx512f"}))
    finding = doctor._kernels()
    assert finding.state == state
    assert ("OPENBLAS_CORETYPE=SkylakeX" in finding.said) == (state == "note")


def test_a_clock_before_the_program_and_a_disk_without_leave(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.time, "time", lambda: 0.0)
    said = "1970-01-01 00:00:00 UTC: that is before this program was installed; set the clock"
    assert doctor._clock() == ("clock", "problem", said)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "can't be written" in doctor._disk(tmp_path / "store").said
