"""Workload W: one update made of many large ones, in memory: their weighted mean, or another rule's result."""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.algorithms import known
from atoll.errors import AtollError
from atoll.vector import Flat, Group, Layout, Tensor

_REPEATS = 5


class _Updates:
    """Updates in memory, as a fold wants them."""

    def __init__(self, flats: Sequence[Flat]) -> None:
        self.ids = [str(k) for k in range(len(flats))]
        self.layouts = {"parameters": Layout((Tensor("all", (flats[0].size,)),))}
        self.reference = {"parameters": Group(self.layouts["parameters"], flats[0])}
        self._flats = flats

    def block(self, group: str, lo: int, hi: int) -> Sequence[Flat]:
        del group
        return [flat[lo:hi] for flat in self._flats]


def measure(updates: int, parameters: int, rule: str = "fedavg") -> dict[str, Any]:
    """Return the throughput of a rule and of numpy's weighted mean, best of some tries in turn, and the rule's extra memory.

    Raises:
        AtollError: there is no such rule, or it needs more updates.
    """
    if rule not in known() or known()[rule]().needs:
        raise AtollError(f"--rule: '{rule}' is no rule for models; `atoll bench aggregate --help` names them")
    method = known()[rule]()
    if updates < method.least:
        raise AtollError(f"--updates: '{rule}' needs at least {method.least}")
    base = np.random.default_rng(0).standard_normal(parameters, dtype=np.float32)
    flats = [np.roll(base, 1009 * k) for k in range(updates)]
    weights = [100.0 + 10 * k for k in range(updates)]
    scales = [np.float32(weight) for weight in weights]

    def floor() -> NDArray[np.float32]:
        total = flats[0] * scales[0]
        part = np.empty_like(total)
        for flat, scale in zip(flats[1:], scales[1:], strict=True):
            np.multiply(flat, scale, out=part)
            np.add(total, part, out=total)
        return total

    def ours() -> Flat:
        return method.fold(_Updates(flats), weights, updates).groups["parameters"].values

    same = {"same_bits": bool((floor() == ours()).all())} if rule == "fedavg" else {}
    times = {act: min(_timed(act) for _ in range(_REPEATS)) for act in (floor, ours)}
    volume = updates * base.nbytes / 1e9
    return {
        "rule": rule,
        "gb_per_s": round(volume / times[ours], 2),
        "numpy_gb_per_s": round(volume / times[floor], 2),
        "ratio": round(times[floor] / times[ours], 2),
        **same,
        "extra_mb": round(_extra(ours) / 1e6, 1),
        "model_mb": round(base.nbytes / 1e6, 1),
    }


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _extra(act: Callable[[], object]) -> float:
    """Anonymous memory that a call needs at its peak, in bytes: sampled beside it, result included."""
    import threading

    gc.collect()
    before = peak = _anonymous()
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = act()
    peak = max(peak, _anonymous())
    over.set()
    watcher.join()
    del kept
    return peak - before


def _anonymous() -> int:
    return rss_anon(os.getpid()) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rss_anon(pid: int) -> int:
    """Return a process' anonymous resident memory in bytes; 0 where the system doesn't tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def processor_time(pid: int) -> float:
    """Return the seconds of processor time that a process has taken; 0 where the system doesn't tell."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
