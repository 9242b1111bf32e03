"""McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", tables 1 and 2: MNIST.

100 clients, alike or with two pieces each of the digits sorted by class; rounds until 97 % (2NN, one epoch) or 99 % (CNN, five
epochs) of the 10,000 test digits are right, as the paper counts them. The learning rates are the best of `atoll sweep`, see
docs/results.md. `pytest -s -m slow tests/published/test_mnist.py` runs the long cells and prints the rounds.
"""

from __future__ import annotations

import resource
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.federation import say

from atoll.learner import Data, Rows
from atoll.plan import Plan
from atoll.simulate import simulate
from atoll.simulate.clients import spread

EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist"
ALLOW = ["atoll.learners.networks:perceptron", "atoll.learners.networks:convolutional"]


class Cell(NamedTuple):
    """A cell of table 1 or 2: which part of the clients is asked, rows a batch (600 are all), what rate; the paper's rounds."""

    plan: str
    partition: str
    fraction: float
    batch_size: int
    learning_rate: float
    published: int
    target: float = 0.97


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Path:
    """MNIST as the example writes it."""
    subprocess.run([sys.executable, EXAMPLE / "split.py", data / "mnist", tmp_path], check=True)
    return tmp_path


@pytest.fixture
def rows(data: Path) -> dict[str, Rows]:
    """The same in memory."""
    read = runpy.run_path(str(EXAMPLE / "split.py"))["pictures"]
    return {name: Rows(*read(data / "mnist", kind)) for name, kind in (("train", "train"), ("test", "t10k"))}


def rounds_to(cell: Cell, rows: Mapping[str, Rows], **options: Any) -> float:
    """Simulate until the target is there, or for 1.15 times the published rounds."""
    plan = Plan.load(EXAMPLE / cell.plan).with_(
        plan={"rounds": int(1.15 * cell.published)},
        training={"batch_size": cell.batch_size, "learning_rate": cell.learning_rate},
        cohort={"fraction": cell.fraction},
        stopping={"metric": "accuracy", "target": cell.target},
    )
    nothing = Rows(rows["train"].x[:0], rows["train"].y[:0])
    clients = spread(Data(rows["train"], nothing), 100, cell.partition, plan)
    done = simulate(plan, clients, holdout=rows["test"], allow=ALLOW, strategy="scan", **options)
    found = plan.stopping.rounds_to_target((row["round"], row["holdout"]) for row in done.rounds)
    assert found is not None
    say(f"{cell}: {found:.1f} rounds")
    return found


def test_2nn_of_clients_that_are_alike(rows):
    """A whole cell: C = .1, B = 10."""
    cell = Cell("2nn.toml", "iid", 0.1, 10, 0.215, 87)
    assert rounds_to(cell, rows) < 45


def test_2nn_of_clients_with_two_digits_is_on_its_way(rows):
    """C = .1, B = 10: the paper has 97 % after 664 rounds, here it is there after 206; 90 % in this short run."""
    assert rounds_to(Cell("2nn.toml", "shards:2", 0.1, 10, 0.1, 664, 0.9), rows, judge_every=5) < 60


LONG = (
    Cell("2nn.toml", "iid", 1.0, 10, 0.215, 70),
    Cell("2nn.toml", "iid", 0.1, 600, 0.7, 1474),
    Cell("2nn.toml", "shards:2", 0.1, 10, 0.1, 664),
    Cell("2nn.toml", "shards:2", 0.1, 600, 0.3, 1796),
    Cell("2nn.toml", "shards:2", 1.0, 10, 0.1, 380),
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cell", LONG, ids=lambda cell: f"{cell.partition}-C{cell.fraction}-B{cell.batch_size}")
def test_2nn(rows, cell):
    assert rounds_to(cell, rows, judge_every=4 if cell.batch_size == 600 else 1) < 1.15 * cell.published


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_cnn(rows):
    assert rounds_to(Cell("cnn.toml", "iid", 0.1, 10, 0.215, 22, 0.99), rows) <= 25


def test_logistic_regression_of_a_thousand_clients_takes_seconds(folder):
    """msrflute's comparison: Flower 1.0 took 30 minutes, FLUTE 3:20; ten clients a round, 100 rounds, both about 80 %."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [
        *("simulate", EXAMPLE / "lr.toml", "--data", folder / "train.npz", "--holdout", folder / "test.npz"),
        *("--clients", "1000", "--strategy", "scan", "--judge-every", "20", "--allow", ALLOW[0]),
    ]
    done = subprocess.run([sys.executable, "-m", "atoll", *command], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    say(f"{took:.1f} s of processor time; {done.stdout.splitlines()[-1].strip()}")
    assert float(done.stdout.rpartition("accuracy ")[2].split(",")[0]) > 0.86
    assert took < 10, "of both cores together; beside other work an instruction takes up to twice as long"
