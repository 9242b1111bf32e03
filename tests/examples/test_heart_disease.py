"""The heart-disease example as its README tells it: split, one server process, four node processes, UCI's own files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.federation import run_processes

EXAMPLE = Path(__file__).parents[2] / "examples" / "heart-disease"


def split(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, EXAMPLE / "split.py", source, out], capture_output=True, text=True, check=False)


def test_the_example_runs(data, tmp_path):
    done = split(data / "heart_disease_uci", tmp_path / "rows")
    assert done.returncode == 0, done.stderr
    hospitals = {name: tmp_path / "rows" / f"{name}.csv" for name in ("cleveland", "hungarian", "switzerland", "va")}
    holdout = ["--holdout", tmp_path / "rows" / "holdout.csv"]
    history = run_processes(EXAMPLE / "plan.toml", hospitals, tmp_path, holdout)
    assert len(history["rounds"]) == 15
    assert all(row["answered"] == sorted(hospitals) for row in history["rounds"])
    first, last = history["initial_evaluation"]["holdout"], history["rounds"][-1]["holdout"]
    assert last["loss"] < first["loss"]
    assert last["accuracy"] > 0.7


def test_without_the_data_it_says_where_they_come_from(tmp_path):
    done = split(tmp_path, tmp_path / "rows")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("processed.cleveland.data is not there; README.md says where it comes from")


@pytest.mark.parametrize("words", [[], ["one"]])
def test_its_usage_is_told(words):
    done = subprocess.run([sys.executable, EXAMPLE / "split.py", *words], capture_output=True, text=True, check=False)
    assert "usage: python split.py" in done.stderr
