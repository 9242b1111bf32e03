"""Next-character prediction over the speakers of Shakespeare's plays: FedAvg comes within 2 points of one place with all lines.

The eight speakers of tinyshakespeare.txt who say most, each a client; the last fifth of what each says is judged;
`examples/typing/plan.toml`, an LSTM of 64. `pytest -s -m slow tests/published/test_shakespeare.py` prints the figures.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from tests.federation import say

from atoll.learner import Data, Rows
from atoll.plan import Plan
from atoll.preprocess import prepare
from atoll.simulate import Simulated, simulate

EXAMPLE = Path(__file__).parents[2] / "examples" / "typing"
PLAN = Plan.load(EXAMPLE / "plan.toml")
ALLOW = ["atoll.learners.networks:lstm"]
ONE_PLACE = 0.005
"""The learning rate of all lines in one place; that of the plan is the federation's."""


def speakers(data: Path, out: Path, count: int) -> tuple[dict[str, Data], Rows]:
    """What each speaker says, and what is judged."""
    runpy.run_path(str(EXAMPLE / "split.py"))["main"](data / "shakespeare" / "tinyshakespeare.txt", out, count)
    rows = {path.stem: prepare(path, PLAN) for path in sorted(out.iterdir())}
    judged = rows.pop("holdout").train
    return rows, judged


def run(plan: Plan, clients: dict[str, Data], judged: Rows) -> Simulated:
    return simulate(plan, clients, holdout=judged, allow=ALLOW, strategy="scan", judge_every=2)


def best(done: Simulated) -> float:
    return max(row["holdout"]["accuracy"] for row in done.rounds if row["holdout"])


def test_three_speakers_learn_together(data, tmp_path):
    """A short form: a third of the characters after two rounds; a space, the most frequent one, would be a sixth."""
    clients, judged = speakers(data, tmp_path, 3)
    done = run(PLAN.with_(plan={"rounds": 2}), clients, judged)
    say(f"after 2 rounds: {best(done):.4f}")
    assert np.mean(judged.y[judged.y >= 0] == 1) < 0.2
    assert best(done) > 0.33


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_speakers_together_are_as_good_as_one_place(data, tmp_path):
    clients, judged = speakers(data, tmp_path, 8)
    lines = Rows(*(np.concatenate(column) for column in zip(*(one.train for one in clients.values()), strict=True)))
    whole = PLAN.with_(training={"learning_rate": ONE_PLACE}, cohort={"minimum": 1})
    federated = best(run(PLAN, clients, judged))
    one_place = best(run(whole, {"everybody": Data(lines, Rows(lines.x[:0], lines.y[:0]))}, judged))
    say(f"federated {federated:.4f}, one place {one_place:.4f}")
    assert federated > one_place - 0.02
    assert one_place > 0.46
