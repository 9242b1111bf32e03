"""A node's directory is one process's at a time: the second says whose it is, and a killed one leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from atoll.errors import StoreError
from atoll.node.hold import Hold

HOLDS = """
import pathlib, sys
from atoll.node.hold import Hold
hold = Hold(pathlib.Path(sys.argv[1]))
hold.take()
print("held", flush=True)
sys.stdin.read()
"""


def test_two_nodes_in_one_directory(tmp_path):
    mine = Hold(tmp_path)
    mine.take()
    words = ["join", "http://127.0.0.1:9", "--data", "rows.csv", "--dir", str(tmp_path)]
    second = subprocess.run([sys.executable, "-m", "atoll", *words], check=False, capture_output=True, text=True)
    assert second.returncode == 2
    said = " ".join(second.stderr.split())
    assert f"{tmp_path}: the node of process {os.getpid()} is at work there; stop it, or choose another --dir" in said
    mine.leave()
    mine.take()
    mine.leave()


def test_a_killed_node_holds_nothing(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(StoreError, match=f"process {other.pid} is at work there"):
            Hold(tmp_path).take()
        other.kill()
    mine = Hold(tmp_path)
    mine.take()
    mine.leave()


def test_a_directory_that_cannot_be_locked(tmp_path):
    (tmp_path / "node.pid").mkdir()
    with pytest.raises(StoreError, match=r"can't be locked .*; choose another --dir"):
        Hold(tmp_path).take()
