"""The benchmarks run, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def bench(*words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "atoll", "bench", *words, "--json"], check=False, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_idle_nodes_are_connected_asked_and_heard():
    found = bench("connect", "--nodes", "50", "--idle", "1")
    assert found["kb_per_node"] < 400, "with 50 nodes, what they don't take is shared by few"
    assert 0 < found["broadcast_s"] < 10
    assert 0 <= found["cpu"] < 1


def test_more_nodes_than_files_are_refused_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "atoll", "bench", "connect", "--nodes", "1000000000"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "open files" in done.stderr
