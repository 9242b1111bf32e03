"""The benchmarks run, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from atoll.errors import AtollError


def bench(*words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "atoll", "bench", *words, "--json"], check=False, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_compress_has_a_row_for_each_chain():
    rows = bench("compress", "--parameters", "20000")["rows"]
    assert rows[0].keys() == {"method", "copy_gb_per_s"}
    found = {row["method"]: row for row in rows[1:]}
    assert {"bfloat16", "8bit", "4bit", "rotate", "topk:0.01", "randomk:0.01", "powersgd:4", "rotate+4bit"} < found.keys()
    assert all(row["encode_gb_per_s"] > 0 < row["decode_gb_per_s"] for row in found.values())
    assert found["4bit"]["bytes_per_float"] < 0.52


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


def test_a_secure_sum_is_timed_and_its_bytes_are_counted(tmp_path):
    peer = tmp_path / "peer.py"
    peer.write_text(
        "import json, sys; print(json.dumps({'args': sys.argv[1:], 'seconds': 9, 'mask_seconds': 9, 'server_seconds': 9}))"
    )
    found = bench("privacy", "--nodes", "10", "--nodes", "5", "--parameters", "20000", "--beside", f"{sys.executable} {peer}")
    noisy = [row for row in found["rows"] if "noise" in row.get("guard", "")]
    assert [row["guard"] for row in noisy[:3]] == ["central noise", "distributed noise, to secagg", "local noise"]
    assert all(row["seconds"] > 0 for row in noisy)
    plain, secure, other, encrypted, *smaller = (row for row in found["rows"] if row not in noisy)
    assert (plain["guard"], secure["guard"]) == ("plain, 32 bits", "secagg, 32 bits")
    assert plain["bytes_per_float"] == 4
    assert 4 < secure["bytes_per_float"] < 4.4
    assert secure["traffic_ratio"] == round(secure["bytes_per_float"] / 4, 4)
    assert (secure["lost"], secure["holders"]) == (1, 9)
    assert 0 < secure["mask_seconds"] < secure["seconds"]
    assert other["args"] == ["10", "20000", "1", "6", "wall"]
    assert other["times_longer"]["seconds"] == round(9 / secure["seconds"], 1)
    assert encrypted["guard"] == "ckks"
    assert encrypted["seconds"] > secure["seconds"]
    assert encrypted["open_seconds"] > 0 < encrypted["server_seconds"]
    assert 32 < encrypted["bytes_per_float"] < encrypted["open_bytes_per_float"] < 45
    assert encrypted["error"] < 1e-7
    assert [row.get("nodes") for row in smaller] == [5, 5, None, 5]


def test_what_is_checked_of_an_update_is_timed():
    found = bench("verify", "--parameters", "1000000")
    assert found["mb"] == 4.0
    assert 0.05 < found["gb_per_s"] < found["sha256_gb_per_s"]
    assert found["gb_per_s"] < found["numbers_gb_per_s"]


def test_workload_s_follows_the_fixed_draws_to_the_accuracies_that_all_programs_reach():
    found = bench("simulate", "--no-floor", "--only", "s")
    assert found["accuracy"]["10"] == 0.6705
    assert abs(found["accuracy"]["50"] - 0.865) <= 0.001
    assert found["rounds_per_s"] > 0
    assert found["peak_rss_mb"] < 500


def test_a_crowd_is_measured_and_an_unknown_workload_named(tmp_path):
    from atoll.cli.bench import crowd
    from atoll.cli.bench.simulate import measure

    found = crowd._once(tmp_path, 40, 5, 32, 10)
    assert found["clients_per_s"] == pytest.approx(5 / found["s_per_round"], rel=0.3)
    assert 50 < found["peak_rss_mb"] < 1000
    with pytest.raises(AtollError, match="--only: 'big' is none; it is s, lr, million, growth"):
        measure(1, floor=False, only=["big"])


def test_what_checks_cost_is_measured_in_turns():
    found = bench("rounds", "--without-checks", "--no-floor", "--nodes", "2", "--parameters", "1000", "--rounds", "7")
    assert found["checked_s"] > 0 < found["unchecked_s"]
    assert found["checks_share"] < 1
