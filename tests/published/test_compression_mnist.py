"""Compression on MNIST as FedLab reports it: 100 clients, Dirichlet(.5), 200 rounds; accuracy lost, and bytes that went up.

FedLab's table: float32 93.14 % at 302 MB; 8 bits 93.27 % at 85 MB; 4 bits 93.03 % at 46 MB. Its model isn't named; a perceptron
with 47 hidden units sends as much. `pytest -s -m slow tests/published/test_compression_mnist.py` runs all 200 rounds.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from tests.federation import say

from atoll.learner import Data, Rows
from atoll.plan import Plan
from atoll.simulate import simulate
from atoll.simulate.clients import spread

SPLIT = Path(__file__).parents[2] / "examples" / "mnist" / "split.py"
MODEL = "atoll.learners.networks:perceptron"
PUBLISHED = {"float32": (93.14, 302.0), "8bit": (93.27, 85.0), "4bit": (93.03, 46.0)}


@pytest.fixture
def rows(data: Path) -> tuple[Rows, Rows]:
    """Training and test pictures."""
    read = runpy.run_path(str(SPLIT))["pictures"]
    return Rows(*read(data / "mnist", "train")), Rows(*read(data / "mnist", "t10k"))


def ran(rows: tuple[Rows, Rows], up: list[str], rounds: int) -> tuple[float, float]:
    """Accuracy in percent on the 10,000 test digits, the mean of the last ten rounds, and megabytes from nodes to server."""
    train, test = rows
    plan = Plan.of(
        {
            "plan": {"name": "mnist", "rounds": rounds},
            "model": {
                "jax": MODEL,
                "options": {"sizes": [784, 47, 10]},
                "loss": "softmax_cross_entropy_with_integer_labels",
                "classes": list(range(10)),
            },
            "training": {"batch_size": 100, "learning_rate": 0.1},
            "cohort": {"minimum": 10, "fraction": 0.1},
            "compression": {"up": up},
        }
    )
    clients = spread(Data(train, Rows(train.x[:0], train.y[:0])), 100, "dirichlet:0.5", plan)
    found = simulate(plan, clients, holdout=test, strategy="scan", allow=[MODEL])
    last = [100 * row["holdout"]["accuracy"] for row in found.rounds[-10:]]
    return sum(last) / len(last), sum(row["bytes"] for row in found.rounds) / 1e6


@pytest.mark.parametrize(
    ("rounds", "within"), [pytest.param(15, 0.5, id="begun"), pytest.param(200, 0.3, id="whole", marks=[pytest.mark.slow])]
)
@pytest.mark.timeout(900)
def test_eight_and_four_bits_lose_next_to_nothing(rows, rounds, within):
    chains = {"float32": [], "8bit": ["8bit"], "4bit": ["rotate", "4bit"]}
    found = {name: ran(rows, up, rounds) for name, up in chains.items()}
    for name, (accuracy, megabytes) in found.items():
        say(f"{name}: {accuracy:.2f} % at {megabytes:.1f} MB")
        published, limit = PUBLISHED[name]
        assert megabytes <= limit * rounds / 200
        assert accuracy >= found["float32"][0] - within
        if rounds == 200:
            assert accuracy >= published - 0.3
