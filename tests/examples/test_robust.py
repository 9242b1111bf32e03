"""The example of rules and attacks: its learner is a learner, and a little of its table."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np

from atoll.learner import Data, Rows
from atoll.testing import check_learner

EXAMPLE = Path(__file__).parents[2] / "examples" / "robust"


def test_its_perceptron_is_a_learner():
    perceptron = runpy.run_path(str(EXAMPLE / "perceptron.py"))["Perceptron"]
    rng = np.random.default_rng(0)
    rows = Rows(rng.standard_normal((90, 5)).astype(np.float32), rng.integers(0, 3, 90))
    check_learner(lambda: perceptron(0.1, inputs=5, hidden=4, classes=3), Data(rows, rows), steps=200)


def test_noise_ruins_the_mean_and_not_the_median(data):
    words = ["--rounds", "4", "--rules", "fedavg,median", "--attacks", "none,gaussian,replacement", "--json"]
    done = subprocess.run(
        [sys.executable, EXAMPLE / "run.py", data / "mnist", *words], capture_output=True, text=True, check=False, timeout=110
    )
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout.splitlines()[-1])["table"]
    assert min(table[rule]["none"][0] for rule in table) > 0.6
    assert table["fedavg"]["gaussian"][0] < 0.5 < table["median"]["gaussian"][0]
    assert table["fedavg"]["replacement"][1] > 0.9 > 0.3 > table["median"]["replacement"][1]


def test_a_rule_it_does_not_know_is_said(data):
    done = subprocess.run(
        [sys.executable, EXAMPLE / "run.py", data / "mnist", "--rules", "medain"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "medain is not among fedavg, median" in done.stderr
