"""One round of local models against many rounds of FedAvg: handwritten digits at ten places that each know some of them.

    python run.py [--alpha 0.5] [--json]

The digits come with scikit-learn, nothing is downloaded. The server has 300 pictures without labels; 497 others judge.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # matrices this small gain nothing by more

import argparse
import json
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

import atoll
from atoll import learners
from atoll.algorithms.one_shot import guess, members
from atoll.learner import Rows, summary
from atoll.simulate.partition import partition

NODES, SEED = 10, 1
PLAN: dict[str, Any] = {
    "plan": {"name": "digits", "rounds": 1, "seed": SEED},
    "model": {"sklearn": "MLPClassifier", "inputs": 64, "classes": list(range(10)), "options": {"hidden_layer_sizes": [64]}},
    "training": {"epochs": 20, "batch_size": 32, "learning_rate": 0.2},
    "cohort": {"minimum": NODES},
}


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--alpha", type=float, default=0.5, help="how unlike the places are: the smaller, the more (Dirichlet)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(SEED).permutation(len(x))
    x, y = x[order] / 16, y[order].astype(float)
    public, test, rest = Rows(x[:300], y[:300]), Rows(x[300:797], y[300:797]), Rows(x[797:], y[797:])
    clients = {
        f"place-{k}": (rest.x[part], rest.y[part])
        for k, part in enumerate(partition(rest.y, NODES, f"dirichlet:{given.alpha}", SEED))
    }
    plan = atoll.Plan.of(PLAN)
    learner = learners.build(plan)

    def accuracy(model: Any) -> float:
        return summary(learner.evaluate(model, test))["accuracy"]

    size = sum(layout.nbytes for layout in learner.layouts.values())
    shot = plan.with_(aggregation={"rule": "one_shot", "options": {"models": NODES, "distil": True, "epochs": 40}})
    found = atoll.simulate(shot, clients, holdout=public)
    alone = [accuracy(model) for model in members(found.state)]
    table = {
        "a place alone, mean": (float(np.mean(alone)), 0, 0),
        "fedavg, 1 round of 20 epochs": (accuracy(atoll.simulate(plan, clients).model), 1, size),
        "one_shot, the ensemble": (float(np.mean(guess(learner, found.state, test) == test.y)), 1, size),
        "one_shot, distilled": (accuracy(found.model), 1, size),
    }
    for rounds in (5, 10):
        many = plan.with_(plan={"rounds": rounds}, training={"epochs": 2})
        table[f"fedavg, {rounds} rounds of 2 epochs"] = (accuracy(atoll.simulate(many, clients).model), rounds, rounds * size)
    if given.json:
        print(json.dumps({name: row[0] for name, row in table.items()}))
        return
    print(f"{'':32} accuracy  rounds  bytes up a place")
    for name, (figure, rounds, up) in table.items():
        print(f"{name:32} {figure:8.3f}  {rounds:6}  {up:16,}")


if __name__ == "__main__":
    main()
