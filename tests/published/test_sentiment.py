"""Sentiment over two silos, UCI's Amazon and Yelp sentences: FedAvg reaches what one place with all sentences does.

Five cuts: each fifth of the lines is judged once, so that the mean is over all 2,000 sentences; `examples/sentiment/plan.toml`.
`pytest -s tests/published/test_sentiment.py` prints the figures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tests.federation import say

from atoll.learner import Data, Rows
from atoll.plan import Plan
from atoll.preprocess import prepare
from atoll.simulate import simulate

PLAN = Plan.load(Path(__file__).parents[2] / "examples" / "sentiment" / "plan.toml")
SILOS = ("amazon_cells", "yelp")


def sentences(path: Path) -> Rows:
    """One source's rows, made by the plan of `sentence TAB 0|1`."""
    lines = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").split("\n") if line]
    columns = {"sentence": [line[0] for line in lines], "kind": [int(line[1]) for line in lines]}
    return prepare(lambda: iter([columns]), PLAN).train


def test_federated_is_as_good_as_one_place(data):
    silos = {name: sentences(data / "uci_sentiment" / f"{name}_labelled.txt") for name in SILOS}
    assert [len(rows) for rows in silos.values()] == [1000, 1000]
    figures = []
    for cut in range(5):
        judged = np.arange(1000) % 5 == cut
        parts = {name: Data(Rows(x[~judged], y[~judged]), Rows(x[judged], y[judged])) for name, (x, y) in silos.items()}
        train, test = (
            Rows(*(np.concatenate(column) for column in zip(*(getattr(part, side) for part in parts.values()), strict=True)))
            for side in ("train", "test")
        )
        federated = simulate(PLAN, parts, holdout=test, judge_every=PLAN.plan.rounds)
        whole = simulate(PLAN.with_(cohort={"minimum": 1}), {"all": Data(train, test)}, judge_every=PLAN.plan.rounds)
        figures.append([one["accuracy"] for one in (federated.holdout, whole.by_node["all"])])
    federated_, whole_ = np.mean(figures, axis=0)
    say(f"federated {federated_:.4f}, one place {whole_:.4f}; by cut {np.round(figures, 4).tolist()}")
    assert federated_ > whole_ - 0.02
    assert whole_ > 0.78
