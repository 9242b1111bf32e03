"""The one-shot example: one round, and what it is worth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "one-shot" / "run.py"


def test_an_ensemble_of_one_round_beats_fedavgs_one_round():
    done = subprocess.run([sys.executable, EXAMPLE, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    once = found["fedavg, 1 round of 20 epochs"]
    assert found["one_shot, the ensemble"] > once + 0.05
    assert found["one_shot, distilled"] > once + 0.05
    assert found["fedavg, 10 rounds of 2 epochs"] > once
