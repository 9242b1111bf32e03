"""Whole federations for tests: a server and its nodes in one event loop, or each as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atoll.node.runtime import Node
from atoll.plan import Plan
from atoll.server.runtime import Server

LOGISTIC: dict[str, Any] = {
    "plan": {"name": "tiny", "rounds": 3, "seed": 1},
    "model": {"logistic": True, "inputs": 4},
    "training": {"epochs": 2, "batch_size": 8, "learning_rate": 0.5},
    "cohort": {"minimum": 3, "deadline": 20, "grace": 1},
}


def say(figures: str) -> None:
    """Show figures to a person who runs the test with `-s`."""
    sys.stdout.write(f"{figures}\n")


def plan(**sections: Mapping[str, Any]) -> Plan:
    """The tiny logistic plan, with some keys changed."""
    return Plan.of(LOGISTIC).with_(**sections)


def rows(seed: int, count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Rows of four numbers whose sum's sign is the class."""
    x = np.random.default_rng(seed).normal(size=(count, 4))
    return x, (x.sum(axis=1) > 0).astype(float)


def clients(count: int = 3) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {f"node-{k}": rows(k) for k in range(count)}


def run(agreed: Plan, data: Mapping[str, Any], place: Path, **options: Any) -> dict[str, Any]:
    """Run a server and nodes in one event loop; return the history."""

    async def together() -> dict[str, Any]:
        server = Server(agreed, store=place / "store", port=0, **options)
        shared: Any = {"allow": options.get("allow", ()), "learner": options.get("learner")}
        nodes = [Node(server.url, one, name=name, directory=place / name, **shared) for name, one in data.items()]
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))
        return history

    return asyncio.run(asyncio.wait_for(together(), 60))


@contextlib.contextmanager
def atoll(*words: str | Path, log: Path, patience: float = 100) -> Iterator[subprocess.Popen[str]]:
    """An `atoll` process whose output is read by the test, ended with the block whatever happens."""
    with log.open("w") as errors:
        command = [sys.executable, "-m", "atoll", *map(str, words)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        guard = threading.Timer(patience, process.kill)
        guard.start()
        try:
            yield process
        finally:
            guard.cancel()
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
            if process.poll() is None:
                process.kill()
                process.wait()
            assert process.stdout
            process.stdout.close()


def events(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """The events that a process prints with --json."""
    assert process.stdout
    for line in process.stdout:
        yield json.loads(line)


def run_processes(plan_file: Path, data: Mapping[str, Path], place: Path, more: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Run a server process and a process for each node; return the history that the server prints."""
    with contextlib.ExitStack() as stack:
        words = ["serve", plan_file, "--port", "0", "--store", place / "store", "--json", *more]
        server = stack.enter_context(atoll(*words, log=place / "server.log"))
        nodes = {}
        for event in events(server):
            if event["what"] == "history":
                for node in nodes.values():
                    assert node.wait(20) == 0
                return event
            if event["what"] == "listening":
                for name, path in data.items():
                    join = ["join", event["url"], "--data", path, "--name", name, "--dir", place / name, "--json"]
                    nodes[name] = stack.enter_context(atoll(*join, log=place / f"{name}.log"))
    raise AssertionError((place / "server.log").read_text())
