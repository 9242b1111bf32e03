"""A program in a process of its own: what it says at its end, and what it took from the command on."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from atoll.errors import AtollError


class Done(NamedTuple):
    """What came of a program: the JSON object in its last line, and its seconds by the clock and of all processors."""

    told: dict[str, Any]
    wall_s: float
    cpu_s: float


def run(*words: str) -> Done:
    """Run Python with these words.

    Raises:
        AtollError: it failed.
    """
    # Bytecode is kept, as it is by default: without, each start compiles the sources anew.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=environment)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise AtollError(f"the workload can't run ({last}); it needs JAX: pip install 'atoll-fl[jax]'")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Done(json.loads(done.stdout.splitlines()[-1]), wall, cpu)


def peak() -> int:
    """Return the most memory that this program took, in MB; without /proc, what started it may count too."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    return (kilobytes or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) // 1024
