"""Workload N: whole rounds over real processes on loopback; nodes return the model plus noise."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atoll.cli.bench.aggregate import processor_time, rss_anon
from atoll.learner import Correct, Fit, Rows
from atoll.plan import Plan
from atoll.vector import Group, Groups, Layout, Metrics, Tensor

ROLE = "atoll.cli.bench.rounds"
FLOOR = "atoll.cli.bench.floor"
_LONGEST = 3600.0
"""Seconds after which a benchmark's process is ended, come what may."""
_BLOCK = 1 << 20
"""The noise repeats after so many numbers: a model of any size takes no second one beside it."""


class Noise:
    """A learner that doesn't learn: the model plus a little noise, so that every update is a new one."""

    can: frozenset[str] = frozenset()

    def __init__(self, parameters: int) -> None:
        self.layouts: Mapping[str, Layout] = {"parameters": Layout((Tensor("all", (parameters,)),))}
        self._noise = np.random.default_rng().random(_BLOCK, np.float32)

    def initial(self, seed: int) -> Groups:
        """Return random numbers."""
        layout = self.layouts["parameters"]
        return {"parameters": Group(layout, np.random.default_rng(seed).random(layout.size, np.float32))}

    def fit(
        self,
        groups: Groups,
        rows: Rows,
        steps: int,
        batch_size: int,
        rng: np.random.Generator,
        correct: Correct | None = None,
        *,
        rate: float = 1.0,
    ) -> Fit:
        """Add noise."""
        del rows, steps, batch_size, correct, rate
        values, noise = groups["parameters"].values.copy(), self._noise * rng.random(1, np.float32)
        for lo in range(0, values.size, _BLOCK):
            values[lo : lo + _BLOCK] += noise[: values.size - lo]
        return Fit({"parameters": groups["parameters"].with_values(values)}, {})

    def evaluate(self, groups: Groups, rows: Rows) -> Metrics:
        """Say nothing of use."""
        del groups
        return {"samples": float(len(rows)), "loss": 0.0}


def measure(
    nodes: int, parameters: int, rounds: int, log: str, *, floor: bool = True, turns: bool = False, bits: int | None = None
) -> dict[str, Any]:
    """Return the seconds a round, those of the floor, the seconds from command to first round, and the peaks of memory.

    With `turns`, two of three rounds go without signatures, checks and the record: see `unchecked`. With `bits`, updates are
    added up under masks, in numbers of so many bits, and plain rounds are timed just before.
    """
    with tempfile.TemporaryDirectory(prefix="atoll-bench-") as place, _broker(log, Path(place)) as address:
        least = _floor(nodes, parameters, rounds, address, Path(place)) if floor else None
        plain = _ours(nodes, parameters, rounds, address, Path(place) / "plain", turns=False) if bits else None
        seconds, spent, start, memory = _ours(nodes, parameters, rounds, address, Path(place), turns=turns, bits=bits)
    ours = float(np.median(seconds[1:] if rounds > 1 else seconds))
    return {
        "log": log,
        "nodes": nodes,
        "parameters": parameters,
        "s_per_round": round(ours, 4),
        **(_cost(seconds, spent) if turns else {}),
        **({"bits": bits, **_beside(plain[0], plain[1], seconds, spent)} if plain else {}),
        "floor_s_per_round": least and round(least, 4),
        "ratio": least and round(ours / least, 2),
        "start_s": round(start, 2),
        "rss_mb": round(memory["server"].peak / 1e6, 1),
        "node_rss_mb": round(memory["node"].peak / 1e6, 1),
        "growth_models": round((memory["server"].peak - memory["server"].first) / (4 * parameters), 2),
    }


def _beside(
    plain: Sequence[float], plain_spent: Sequence[float], ours: Sequence[float], spent: Sequence[float]
) -> dict[str, float]:
    """What secure rounds take beside plain ones, by the clock and of all processes' processor time; the first isn't counted."""
    before, after = float(np.median(plain[1:])), float(np.median(ours[1:]))
    cpu_before, cpu = float(np.mean(plain_spent[1:])), float(np.mean(spent[1:]))
    return {
        "plain_s_per_round": round(before, 4),
        "to_plain": round(after / before, 2),
        "cpu_s": round(cpu, 4),
        "plain_cpu_s": round(cpu_before, 4),
        "cpu_to_plain": round(cpu / cpu_before, 2),
    }


def _cost(seconds: Sequence[float], spent: Sequence[float]) -> dict[str, float]:
    """What checks cost, of rounds with all of them, with hashes alone, and with none, in turn; the first three are not counted.

    The shares are of all processes' processor time, which other work on the machine disturbs less than the seconds.
    """
    checked, _, unchecked = (float(np.median(seconds[3 + turn :: 3])) for turn in range(3))
    all_, hashes, none = (float(np.mean(spent[3 + turn :: 3])) for turn in range(3))
    return {
        "checked_s": round(checked, 4),
        "unchecked_s": round(unchecked, 4),
        "checked_cpu_s": round(all_, 4),
        "checks_share": round(1 - hashes / all_, 4),
        "hashes_share": round((hashes - none) / all_, 4),
    }


class Anonymous:
    """The anonymous memory of a process, watched from now to its end.

    Attributes:
        first, peak: in bytes.
    """

    def __init__(self, pid: int) -> None:
        self.first = self.peak = rss_anon(pid)
        threading.Thread(target=self._watch, args=(pid,), daemon=True).start()

    def _watch(self, pid: int) -> None:
        while now := rss_anon(pid):
            self.peak = max(self.peak, now)
            time.sleep(0.02)


@contextlib.contextmanager
def _broker(log: str, place: Path) -> Iterator[str | None]:
    if log == "embedded":
        yield None
        return
    from atoll.logs import broker

    try:
        yield broker.start(place / "kafka", report=lambda _: None).address
    finally:
        broker.stop(place / "kafka")


def _plan(nodes: int, rounds: int, address: str | None, bits: int | None) -> Plan:
    return Plan.of(
        {
            "plan": {"name": "rounds", "rounds": rounds},
            "model": {"logistic": True},
            "cohort": {"minimum": nodes, "quorum": 1.0},
            "log": {"kafka": address},
            "privacy": {"secure_aggregation": True, "bits": bits, "clip": 1024.0, "largest_weight": 1.0} if bits else {},
        }
    )


def _ours(
    nodes: int, parameters: int, rounds: int, address: str | None, place: Path, *, turns: bool, bits: int | None = None
) -> tuple[list[float], list[float], float, dict[str, Anonymous]]:
    place.mkdir(exist_ok=True)
    plan = place / "plan.json"
    plan.write_text(_plan(nodes, rounds, address, bits).to_json())
    turned = ["turns"] if turns else []
    began = time.perf_counter()
    marks: list[float] = []
    spent: list[float] = []
    processes: list[subprocess.Popen[str]] = []
    memory: dict[str, Anonymous] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(spawned(ROLE, "server", str(plan), str(parameters), str(place / "store"), *turned))
        for line in server.stdout or ():
            event = json.loads(line)
            if event["what"] == "listening":
                mine = event["url"], str(parameters)
                words = [(*mine, f"node-{k:03}", str(place / f"node-{k}"), *turned) for k in range(nodes)]
                processes = [stack.enter_context(spawned(ROLE, "node", *one)) for one in words]
                memory = {"server": Anonymous(server.pid), "node": Anonymous(processes[0].pid)}
            if event["what"] == "round" or (event["what"] == "asked" and not marks):
                marks.append(time.perf_counter())
                spent.append(sum(processor_time(one.pid) for one in (server, *processes)))
    if len(marks) != rounds + 1:
        raise RuntimeError(f"the run ended after {len(marks) - 1} of {rounds} rounds")
    return np.diff(marks).tolist(), np.diff(spent).tolist(), marks[0] - began, memory


def _floor(nodes: int, parameters: int, rounds: int, address: str | None, place: Path) -> float:
    with contextlib.ExitStack() as stack:
        words = [str(nodes), str(parameters * 4), str(rounds), str(place / "floor"), *([address] if address else [])]
        server = stack.enter_context(spawned(FLOOR, "server", *words))
        lines = iter(server.stdout or ())
        url = next(lines).strip()
        for k in range(nodes):
            stack.enter_context(spawned(FLOOR, "node", url, str(k), *words))
        seconds = [float(line) for line in lines]
    if len(seconds) != rounds:
        raise RuntimeError(f"the floor ended after {len(seconds)} of {rounds} rounds")
    return statistics.median(seconds[1:] or seconds)


@contextlib.contextmanager
def spawned(module: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process in a role of this benchmark, ended with the block."""
    process = subprocess.Popen([sys.executable, "-m", module, *words], stdout=subprocess.PIPE, text=True)
    guard = threading.Timer(_LONGEST, process.kill)
    guard.start()
    try:
        yield process
        process.wait(timeout=_LONGEST)
    finally:
        guard.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


def _server(plan: str, parameters: str, store: str, turns: str = "") -> None:
    from atoll.cli.bench.unchecked import Switch, install
    from atoll.server.runtime import Server

    def watch(event: Mapping[str, Any]) -> None:
        print(json.dumps(event), flush=True)
        if event["what"] == "asked" and turns:
            Switch.turn(event["round"])

    if turns:
        install()
    Server(Plan.load(plan), store=store, port=0, learner=Noise(int(parameters)), watch=watch).serve()


def _node(url: str, parameters: str, name: str, directory: str, turns: str = "") -> None:
    from atoll.cli.bench.unchecked import Turning, install
    from atoll.node.runtime import Node

    if turns:
        install()
    kind = Turning if turns else Node
    kind(url, (np.zeros((1, 1)), np.zeros(1)), name=name, directory=directory, learner=Noise(int(parameters))).start()


if __name__ == "__main__":
    (_server if sys.argv[1] == "server" else _node)(*sys.argv[2:])
