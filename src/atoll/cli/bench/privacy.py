"""What a guard costs: seconds of a node and of the server, and bytes, for one round; beside the plain update."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from atoll.errors import AtollError
from atoll.keys import Identity
from atoll.privacy.fixed import Fixed, Words
from atoll.privacy.graph import graph
from atoll.privacy.masks import apply
from atoll.privacy.secagg.terms import LARGEST, Terms
from atoll.privacy.secagg.together import PHASES, secure_sum
from atoll.privacy.secagg.update import Code
from atoll.vector import Group, Layout, Tensor, Update

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class _Updates(Mapping[str, list[Words]]):
    """One encoded update for every node, made when it is asked for: a thousand of them need no memory."""

    def __init__(self, nodes: list[str], parts: list[Words]) -> None:
        self._nodes, self._parts = nodes, parts

    def __getitem__(self, node: str) -> list[Words]:
        return [part.copy() for part in self._parts]

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)


def measure(nodes: int, parameters: int, bits: int, dropout: float, corrupt: float, clock: str) -> list[dict[str, Any]]:
    """Return a row for the plain fixed-point update and one for the secure sum, in which a fraction is lost before it sends.

    Seconds of a node are those of the quickest: it did the same as the others, and was disturbed the least.

    Raises:
        AtollError: there are too few or too many nodes, or the sum is wrong.
    """
    if not 3 <= nodes <= LARGEST:
        raise AtollError(f"--nodes: a secure sum has 3 to {LARGEST} nodes")
    if bits not in {32, 64} or clock not in CLOCKS:
        raise AtollError("--bits: 32 or 64; --clock: wall or processor")
    now = CLOCKS[clock]
    code, values = Fixed(1.0, nodes, 32 if bits == 32 else 64), np.random.default_rng(0).normal(0, 0.05, parameters)
    words, floats = code.encode(values), values.astype(np.float32)
    layout = Layout((Tensor("parameters", (parameters,)),))
    update = Update({"parameters": Group(layout, floats)}, 1.0, {"samples": 1.0})
    whole = Code({"parameters": layout}, ("samples",), 1.0, 1.0, nodes, 32 if bits == 32 else 64)
    who = [Identity.new() for _ in range(nodes)]
    lost, bad = int(dropout * nodes + 1e-9), int(corrupt * nodes + 1e-9)
    terms = Terms("bench", 1, 0, "00" * 32, 3, dropout, bad)
    updates = _Updates([one.node for one in who], [words])
    summed = secure_sum(terms, who, updates, {"masked": [one.node for one in who[:lost]]}, clock=now)
    if (summed.parts[0] != words * words.dtype.type(nodes - lost)).any():
        raise AtollError("the unmasked sum is not the plain one")
    keys = [bytes([k % 256]) * 32 for k in range(nodes)]
    letters = 4 * (summed.sent + summed.received) // 3  # they travel as base64
    plain = {
        "guard": f"plain, {bits} bits",
        "nodes": nodes,
        "parameters": parameters,
        "seconds": round(_best(lambda: code.encode(floats), now), 5),
        "bytes_per_float": words.itemsize,
    }
    secure = {
        "guard": f"secagg, {bits} bits",
        "nodes": nodes,
        "parameters": parameters,
        "lost": lost,
        "holders": graph(nodes, dropout, bad).degree,
        "seconds": round(
            _best(lambda: whole.encode(update), now)
            + min(sum(summed.seconds[phase][one] for phase in PHASES) for one in summed.survivors),
            5,
        ),
        "mask_seconds": round(min(summed.seconds["masked"][one] for one in summed.survivors), 5),
        "complete_mask_seconds": round(_best(lambda: apply([words.copy()], keys), now), 5),
        "server_seconds": round(summed.seconds["unmask"]["server"], 5),
        "bytes_per_float": round((words.nbytes + letters) / parameters, 4),
        "traffic_ratio": round((words.nbytes + letters) / words.nbytes, 4),
    }
    return [plain, secure]


def _best(act: Callable[[], object], now: Callable[[], float]) -> float:
    times = []
    for _ in range(5):
        began = now()
        act()
        times.append(now() - began)
    return min(times)


def beside(command: str, ours: Mapping[str, Any], dropout: float, corrupt: float, clock: str) -> dict[str, Any]:
    """Run another system's command for the same numbers, and return its row with how many times longer it took.

    Raises:
        AtollError: it can't be run, or prints no row.
    """
    nodes, parameters, lost = ours["nodes"], ours["parameters"], ours["lost"]
    numbers = (nodes, parameters, lost, graph(nodes, dropout, int(corrupt * nodes + 1e-9)).threshold)
    words = [*shlex.split(command), *map(str, numbers), clock]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": ""})
        row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError) as error:
        raise AtollError(f"--beside: '{command}' gave no row: {error}") from error
    times = {name: round(row[name] / ours[name], 1) for name in ("seconds", "mask_seconds", "server_seconds")}
    return {**row, "times_longer": times}
