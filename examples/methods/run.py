"""Which method for which difference between nodes: MNIST on 20 simulated nodes that differ in one way at a time.

    python run.py MNIST-FOLDER [--rounds 40] [--methods fedavg,scaffold] [--differences labels,answers] [--json]

The folder holds MNIST's four IDX files (.gz). Each row of the table is a method, each column a difference: accuracy of the
federation's model on the 10,000 test pictures; after a slash of the models that nodes use, on their own test rows, the mean
over nodes and the worst node.

`labels`: nodes have pictures of two digits each. `amounts`: alike pictures, but from 30 to some thousand of them, and each
node goes through all of its own in a round. `both`: two digits each, from 60 to 600 pictures, and all of them in a round.
`answers`: half of the nodes call each digit d by 9 − d.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # matrices this small gain nothing by more, and lose where cores are busy

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "robust"))
from perceptron import Perceptron, digits

import atoll
from atoll.learner import Data, Rows
from atoll.simulate.partition import partition

NODES, SEED, RATE, JUDGED = 20, 1, 0.1, 30
METHODS: Mapping[str, Mapping[str, Any]] = {
    "fedavg": {},
    "fedsgd": {},
    "fedavgm": {"momentum": 0.7},
    "fedadam": {"learning_rate": 0.01, "tau": 0.001},
    "fedprox": {"mu": 0.1},
    "scaffold": {},
    "fednova": {},
    "feddyn": {"alpha": 0.1},
    "mime_lite": {"momentum": 0.7},
    "qffl": {"q": 0.5},
    "finetune": {},
    "ditto": {"pull": 0.1},
    "apfl": {"alpha": 0.5},
    "fedper": {"personal": ["out*"]},
    "ifca": {"clusters": 2},
}
DIFFERENCES = ("labels", "amounts", "both", "answers")


def spread(rows: Rows, difference: str) -> dict[str, Data]:
    """Give each node its part; some of its rows judge."""
    rng = np.random.default_rng(SEED)
    if difference == "amounts":
        shares = rng.lognormal(0, 1.2, NODES)
        sizes = np.maximum((shares / shares.sum() * len(rows)).astype(int), 2 * JUDGED)
        parts = np.split(rng.permutation(len(rows)), np.cumsum(sizes)[:-1])
    else:
        parts = partition(rows.y, NODES, "iid" if difference == "answers" else "shards:2", SEED)
    found = {}
    for k, part in enumerate(parts):
        mine = rng.permutation(part)
        if difference == "both":
            mine = mine[: max(2 * JUDGED, int(len(mine) * rng.random() ** 3))]
        y = 9 - rows.y[mine] if difference == "answers" and k % 2 else rows.y[mine]
        x = rows.x[mine]
        found[f"node-{k:02}"] = Data(Rows(x[JUDGED:], y[JUDGED:]), Rows(x[:JUDGED], y[:JUDGED]))
    return found


def planned(method: str, difference: str, rounds: int) -> atoll.Plan:
    """The plan of a cell; its model is put aside for the learner given to `simulate`."""
    length: Mapping[str, Any] = {"epochs": 1} if difference in ("amounts", "both") else {"steps": 20}
    return atoll.Plan.of(
        {
            "plan": {"name": "methods", "rounds": rounds, "seed": SEED},
            "model": {"logistic": True, "inputs": 784},
            "training": {**length, "batch_size": 16, "learning_rate": RATE},
            "aggregation": {"rule": method, "options": METHODS[method]},
            "cohort": {"minimum": NODES, "quorum": 1.0},
        }
    )


def cell(method: str, difference: str, rounds: int, train: Rows, holdout: Rows) -> list[float]:
    """Accuracy of the federation's model, and of the nodes' own: mean and worst."""
    done = atoll.simulate(
        planned(method, difference, rounds), spread(train, difference), learner=Perceptron(RATE), holdout=holdout
    )
    own = [judged["accuracy"] for judged in done.by_node.values()]
    return [done.holdout["accuracy"], float(np.mean(own)), min(own)]


def main() -> None:
    """Make the table, a line at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--rows", type=int, default=12000, help="so many of the training pictures are spread over the nodes")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--differences", default=",".join(DIFFERENCES))
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    said = parser.parse_args()
    methods, columns = said.methods.split(","), said.differences.split(",")
    for kind, names, known in (("--methods", methods, METHODS), ("--differences", columns, DIFFERENCES)):
        if unknown := set(names) - set(known):
            parser.error(f"{kind}: {', '.join(sorted(unknown))} is not among {', '.join(known)}")
    began = time.monotonic()
    train, holdout = digits(said.folder, "train"), digits(said.folder, "t10k")
    train = Rows(train.x[: said.rows], train.y[: said.rows])
    table: dict[str, dict[str, list[float]]] = {}
    print("| method |", " | ".join(columns), "|\n|---" + "|---" * len(columns) + "|", flush=True)
    for method in methods:
        table[method] = {one: cell(method, one, said.rounds, train, holdout) for one in columns}
        shown = (f"{whole:.3f} / {own:.3f}, {worst:.2f}" for whole, own, worst in table[method].values())
        print(f"| `{method}` |", " | ".join(shown), "|", flush=True)
    if said.json:
        print(json.dumps({"table": table, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
