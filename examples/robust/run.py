"""Which rule withstands which attack: MNIST on 20 simulated nodes, uneven by class, 4 of them hostile.

    python run.py MNIST-FOLDER [--rounds 30] [--rules median,krum] [--attacks none,alie] [--norm 10] [--json]

The folder holds MNIST's four IDX files (.gz). Each row of the table is a rule, each column an attack: accuracy of the final
model on the 10,000 test pictures; for backdoors also, after a slash, how often the trigger calls up the hostile nodes' label.
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
from perceptron import Perceptron, digits

import atoll
from atoll.learner import Data, Learner, Rows, summary
from atoll.simulate import attacks
from atoll.simulate.partition import partition

NODES, HOSTILE, TARGET, SEED = 20, 4, 0, 1
ROOT = 100
"""Pictures that the server of `fltrust` trains on, drawn from all nodes', as in its paper."""
RULES: Mapping[str, Mapping[str, Any]] = {
    "fedavg": {},
    "median": {},
    "trimmed_mean": {"trim": HOSTILE / NODES},
    "krum": {"f": HOSTILE},
    "multi_krum": {"f": HOSTILE},
    "bulyan": {"f": HOSTILE},
    "geometric_median": {},
    "norm_clipping": {},
    "centered_clipping": {},
    "fltrust": {},
}
ON_UPDATES: Mapping[str, attacks.Attack] = {
    "sign flip": attacks.sign_flip(scale=NODES / HOSTILE),
    "gaussian": attacks.gaussian(deviation=1.0),
    "alie": attacks.a_little_is_enough(NODES, HOSTILE),
    "inner product": attacks.inner_product(epsilon=0.1),
    "replacement": attacks.scaling(factor=NODES / HOSTILE),
}
BACKDOORS = ("backdoor", "replacement")
ATTACKS = ("none", "label flip", "sign flip", "gaussian", "alie", "inner product", *BACKDOORS)


def stamp(x: np.ndarray) -> np.ndarray:
    """The trigger: a white square of 4 × 4 in the lower right corner."""
    pictures = x.reshape(-1, 28, 28).copy()
    pictures[:, 23:27, 23:27] = 1.0
    return pictures.reshape(x.shape)


def spread(rows: Rows, seed: int) -> dict[str, Data]:
    """Give each node its part, by Dirichlet(0.5) over classes; ten of its rows judge."""
    parts = partition(rows.y, NODES, "dirichlet:0.5", seed)
    cut = [np.random.default_rng([seed, k]).permutation(part) for k, part in enumerate(parts)]
    return {
        f"node-{k:02}": Data(Rows(rows.x[p[10:]], rows.y[p[10:]]), Rows(rows.x[p[:10]], rows.y[p[:10]]))
        for k, p in enumerate(cut)
    }


def attacked(clients: dict[str, Data], attack: str) -> tuple[dict[str, Data], attacks.Tamper | None]:
    """What an attack makes of the last nodes' data, and of what they send."""
    names = list(clients)[-HOSTILE:]
    data = dict(clients)
    for name in names:
        if attack == "label flip":
            data[name] = attacks.flip_labels(data[name], classes=10)
        if attack in BACKDOORS:
            data[name] = attacks.backdoor(data[name], stamp, TARGET)
    return data, attacks.hostile(names, ON_UPDATES[attack]) if attack in ON_UPDATES else None


def planned(rule: str, rounds: int, norm: float) -> atoll.Plan:
    """The plan of a row; its model is put aside for the learner given to `simulate`."""
    return atoll.Plan.of(
        {
            "plan": {"name": "robust-digits", "rounds": rounds, "seed": SEED},
            "model": {"logistic": True, "inputs": 784},
            "training": {"steps": 10, "batch_size": 32, "learning_rate": 0.1},
            "aggregation": {"rule": rule, "options": RULES[rule]},
            "cohort": {"minimum": NODES - HOSTILE if norm else NODES, "quorum": 1.0},
            "checks": {"norm": norm},  # 0: what no rule sees is no merit of the rule's
        }
    )


def cell(plan: atoll.Plan, learner: Learner, clients: dict[str, Data], root: Rows, holdout: Rows, attack: str) -> list[float]:
    """Accuracy, and with a backdoor how often it opens."""
    data, tamper = attacked(clients, attack)
    done = atoll.simulate(plan, data, learner=learner, tamper=tamper, holdout=root)
    judged = [holdout]
    if attack in BACKDOORS:
        others = holdout.y != TARGET
        judged.append(Rows(stamp(holdout.x[others]), np.full(others.sum(), TARGET)))
    return [summary(learner.evaluate(done.model, rows))["accuracy"] for rows in judged]


def main() -> None:
    """Make the table, a line at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--attacks", default=",".join(ATTACKS))
    parser.add_argument("--norm", type=float, default=0.0, help="refuse updates so many times as long as is usual")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    said = parser.parse_args()
    chosen = said.attacks.split(",")
    for kind, names, known in (("--rules", said.rules.split(","), RULES), ("--attacks", chosen, ATTACKS)):
        if unknown := set(names) - set(known):
            parser.error(f"{kind}: {', '.join(sorted(unknown))} is not among {', '.join(known)}")
    began = time.monotonic()
    learner = Perceptron(learning_rate=0.1)
    train, holdout = digits(said.folder, "train"), digits(said.folder, "t10k")
    clients, drawn = spread(train, SEED), np.random.default_rng(SEED).choice(len(train), ROOT, replace=False)
    root = Rows(train.x[drawn], train.y[drawn])
    table: dict[str, dict[str, list[float]]] = {}
    print("| rule |", " | ".join(chosen), "|\n|---" + "|---" * len(chosen) + "|", flush=True)
    for rule in said.rules.split(","):
        plan = planned(rule, said.rounds, said.norm)
        table[rule] = {attack: cell(plan, learner, clients, root, holdout, attack) for attack in chosen}
        print(
            f"| `{rule}` |",
            " | ".join(" / ".join(f"{one:.3f}" for one in found) for found in table[rule].values()),
            "|",
            flush=True,
        )
    seconds = round(time.monotonic() - began)
    print(f"{said.rounds} rounds, {seconds} s", file=sys.stderr)
    if said.json:
        print(json.dumps({"rounds": said.rounds, "seconds": seconds, "table": table}))


if __name__ == "__main__":
    main()
