"""The example of methods and differences: a little of its table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "methods"


def table(data: Path, *words: str) -> dict[str, dict[str, list[float]]]:
    command = [sys.executable, EXAMPLE / "run.py", data / "mnist", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["table"]


def test_clusters_part_nodes_that_disagree_and_control_variates_help_where_labels_differ(data):
    found = table(data, "--rounds", "9", "--rows", "6000", "--methods", "fedavg,scaffold,ifca", "--differences", "labels,answers")
    assert found["ifca"]["answers"][1] > 0.8 > 0.5 > found["fedavg"]["answers"][1]
    assert found["scaffold"]["labels"][0] > found["fedavg"]["labels"][0] + 0.01


def test_a_method_it_does_not_know_is_said(data):
    done = subprocess.run(
        [sys.executable, EXAMPLE / "run.py", data / "mnist", "--methods", "scafold"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "scafold is not among fedavg, fedsgd" in done.stderr
