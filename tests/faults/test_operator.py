"""What an operator sees when parts of a run are switched off: `atoll status` says what is waited for, and the end is in order."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tests.federation import atoll, events, plan, rows

from atoll.logs.broker import free_port
from atoll.store.sql import SqlStore


def status(url: str) -> str:
    """What `atoll status` prints, or the line that says why it can't."""
    done = subprocess.run([sys.executable, "-m", "atoll", "status", url], check=False, capture_output=True, text=True)
    return done.stdout + done.stderr


def until(said: Callable[[str], bool], url: str, seconds: float = 40) -> str:
    """Look again and again, until the status is as it should be."""
    over = time.monotonic() + seconds
    while not said(seen := status(url)):
        assert time.monotonic() < over, seen
    return seen


def data(place: Path, count: int) -> list[Path]:
    for k in range(count):
        x, y = rows(k)
        np.savez(place / f"{k}.npz", x=x, y=y)
    return [place / f"{k}.npz" for k in range(count)]


def test_too_few_nodes_are_waited_for_until_the_deadline(tmp_path):
    """One node of three: status says so, and at the deadline server and node leave with exit code 3, everything stored."""
    (tmp_path / "plan.json").write_text(plan(cohort={"minimum": 3, "deadline": 8}).to_json())
    (mine,) = data(tmp_path, 1)
    words = ["serve", tmp_path / "plan.json", "--port", "0", "--store", tmp_path / "store", "--json"]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(atoll(*words, log=tmp_path / "server.log"))
        for event in events(server):
            if event["what"] == "listening":
                join = ["join", event["url"], "--data", mine, "--name", "alone", "--dir", tmp_path / "alone", "--json"]
                node = stack.enter_context(atoll(*join, log=tmp_path / "node.log"))
                url = event["url"]
            if event["what"] == "joined":
                seen = status(url)
                assert "waiting for nodes: round 1: 1 of at least 3 nodes are here; " in seen
                assert " s left" in seen
        assert server.wait(20) == 3
        assert node.wait(20) == 3
    said = "round 1: the deadline is over and 1 of at least 3 nodes are here"
    assert said in (tmp_path / "server.log").read_text()
    assert said in (tmp_path / "node.log").read_text()
    found = SqlStore(tmp_path / "store").history()
    assert (found["outcome"], [one["name"] for one in found["nodes"]]) == ("gave_up", ["alone"])


def test_the_plug_is_pulled_on_each_part_in_turn(tmp_path):
    agreed = plan(plan={"rounds": 100_000}, cohort={"minimum": 2, "quorum": 1.0, "deadline": 60})
    (tmp_path / "plan.json").write_text(agreed.to_json())
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = ["serve", tmp_path / "plan.json", "--port", str(port), "--store", tmp_path / "store"]
    with contextlib.ExitStack() as stack:

        def start(name: str, *command: str | Path) -> subprocess.Popen[str]:
            out = stack.enter_context((tmp_path / f"{name}.out").open("a"))
            process = subprocess.Popen([sys.executable, "-m", "atoll", *map(str, command)], stdout=out, stderr=out, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        def join(k: int, path: Path) -> subprocess.Popen[str]:
            return start(f"n{k}", "join", url, "--data", path, "--name", f"n{k}", "--dir", tmp_path / f"n{k}")

        server = start("server", *words)
        until(lambda seen: "0 of at least 2 nodes are here" in seen, url)
        files = data(tmp_path, 3)
        nodes = [join(k, path) for k, path in enumerate(files)]
        until(lambda seen: "n0: " in seen and "n2: " in seen and "of 3 updates" in seen, url)
        nodes[1].send_signal(signal.SIGSTOP)  # so that it is killed while a round waits for it, never just after its answer
        until(lambda seen: "2 of 3 updates are in, waiting for n1" in seen, url)
        nodes[1].kill()
        assert "n1: lost " in until(lambda seen: "n1: lost" in seen, url)
        nodes[2].send_signal(signal.SIGSTOP)
        seen = until(lambda seen: "silent for" in seen, url)
        assert "waiting for n1 (lost)" in seen
        assert "n2: answered, silent for" in seen or "n2: training, silent for" in seen
        nodes[2].send_signal(signal.SIGCONT)
        nodes[1] = join(1, files[1])
        until(lambda seen: "silent" not in seen and "lost" not in seen and "of 3 updates" in seen, url)
        server.kill()
        server.wait()
        assert "--resume" in status(url)
        server = start("server", *words, "--resume")
        until(lambda seen: "of 3 updates" in seen and "lost" not in seen, url)
        server.terminate()
        assert server.wait(30) == 0
        assert [node.wait(30) for node in nodes] == [0, 0, 0]
    found = json.loads(
        subprocess.run(
            [sys.executable, "-m", "atoll", "history", "--store", tmp_path / "store", "--json"],
            check=True, capture_output=True, text=True,
        ).stdout
    )  # fmt: skip
    assert found["outcome"] == "stopped"
    assert found["rounds"]
