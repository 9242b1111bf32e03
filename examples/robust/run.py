"""Which rule withstands which attack: MNIST on 20 simulated nodes, uneven by class, 4 of them hostile.

    python run.py MNIST-FOLDER [--rounds 30] [--rules median,krum] [--attacks none,alie] [--norm 10] [--json]
    python run.py MNIST-FOLDER --nodes 12 --hostile 1 --secure 4 --rules fedavg,median

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
from typing import Any, NamedTuple

import numpy as np
from perceptron import Perceptron, digits

import atoll
from atoll.learner import Data, Learner, Rows, summary
from atoll.simulate import attacks
from atoll.simulate.partition import partition

TARGET, SEED = 0, 1
ROOT = 100
"""Pictures that the server of `fltrust` trains on, drawn from all nodes', as in its paper."""
RULES = (
    *("fedavg", "median", "trimmed_mean", "krum", "multi_krum", "bulyan"),
    *("geometric_median", "norm_clipping", "centered_clipping", "fltrust"),
)
BACKDOORS = ("backdoor", "replacement")
ATTACKS = ("none", "label flip", "sign flip", "gaussian", "alie", "inner product", *BACKDOORS)


class Setting(NamedTuple):
    """How many nodes there are and how many of them are hostile; with `secure`, their updates are summed in so many buckets.

    With 1 they are all in one sum. Of a bucket's sum a rule sees the mean, and bears as many hostile ones as there are nodes.
    """

    nodes: int
    hostile: int
    secure: int = 0

    def options(self, rule: str) -> Mapping[str, Any]:
        """What a rule has to know."""
        if rule in ("krum", "multi_krum", "bulyan"):
            return {"f": self.hostile}
        return {"trim": self.hostile / (self.secure or self.nodes)} if rule == "trimmed_mean" else {}

    def attack(self, name: str) -> attacks.Attack | None:
        """What hostile nodes make of their updates, if they do."""
        known: Mapping[str, attacks.Attack] = {
            "sign flip": attacks.sign_flip(scale=self.nodes / self.hostile),
            "gaussian": attacks.gaussian(deviation=1.0),
            "alie": attacks.a_little_is_enough(self.nodes, self.hostile),
            "inner product": attacks.inner_product(epsilon=0.1),
            "replacement": attacks.scaling(factor=self.nodes / self.hostile),
        }
        return known.get(name)

    def privacy(self, rule: str) -> Mapping[str, Any]:
        """What hides single updates: a mean is of one sum, whatever the others have."""
        buckets = {"buckets": self.secure} if self.secure > 1 and rule != "fedavg" else {}
        return {"secure_aggregation": True, **buckets} if self.secure else {}


def stamp(x: np.ndarray) -> np.ndarray:
    """The trigger: a white square of 4 × 4 in the lower right corner."""
    pictures = x.reshape(-1, 28, 28).copy()
    pictures[:, 23:27, 23:27] = 1.0
    return pictures.reshape(x.shape)


def spread(rows: Rows, nodes: int, seed: int) -> dict[str, Data]:
    """Give each node its part, by Dirichlet(0.5) over classes; ten of its rows judge."""
    parts = partition(rows.y, nodes, "dirichlet:0.5", seed)
    cut = [np.random.default_rng([seed, k]).permutation(part) for k, part in enumerate(parts)]
    return {
        f"node-{k:02}": Data(Rows(rows.x[p[10:]], rows.y[p[10:]]), Rows(rows.x[p[:10]], rows.y[p[:10]]))
        for k, p in enumerate(cut)
    }


def attacked(clients: dict[str, Data], setting: Setting, attack: str) -> tuple[dict[str, Data], attacks.Tamper | None]:
    """What an attack makes of the last nodes' data, and of what they send."""
    names = list(clients)[-setting.hostile :]
    data = dict(clients)
    for name in names:
        if attack == "label flip":
            data[name] = attacks.flip_labels(data[name], classes=10)
        if attack in BACKDOORS:
            data[name] = attacks.backdoor(data[name], stamp, TARGET)
    sent = setting.attack(attack)
    return data, attacks.hostile(names, sent) if sent else None


def planned(setting: Setting, rule: str, rounds: int, norm: float) -> atoll.Plan:
    """The plan of a row; its model is put aside for the learner given to `simulate`."""
    return atoll.Plan.of(
        {
            "plan": {"name": "robust-digits", "rounds": rounds, "seed": SEED},
            "model": {"logistic": True, "inputs": 784},
            "training": {"steps": 10, "batch_size": 32, "learning_rate": 0.1},
            "aggregation": {"rule": rule, "options": setting.options(rule)},
            "cohort": {"minimum": setting.nodes - setting.hostile if norm else setting.nodes, "quorum": 1.0},
            "privacy": setting.privacy(rule),
            "checks": {"norm": norm},  # 0: what no rule sees is no merit of the rule's
        }
    )


def cell(
    plan: atoll.Plan,
    learner: Learner,
    sent: tuple[dict[str, Data], attacks.Tamper | None],
    root: Rows,
    holdout: Rows,
    attack: str,
) -> list[float]:
    """Accuracy, and with a backdoor how often it opens."""
    data, tamper = sent
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
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--hostile", type=int, default=4, help="how many of them are")
    parser.add_argument(
        "--secure", type=int, default=0, metavar="K", help="secure sums: of K buckets for a robust rule, or of all"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    said = parser.parse_args()
    chosen = said.attacks.split(",")
    for kind, names, known in (("--rules", said.rules.split(","), RULES), ("--attacks", chosen, ATTACKS)):
        if unknown := set(names) - set(known):
            parser.error(f"{kind}: {', '.join(sorted(unknown))} is not among {', '.join(known)}")
    began = time.monotonic()
    learner = Perceptron(learning_rate=0.1)
    train, holdout = digits(said.folder, "train"), digits(said.folder, "t10k")
    setting = Setting(said.nodes, said.hostile, said.secure)
    clients, drawn = spread(train, setting.nodes, SEED), np.random.default_rng(SEED).choice(len(train), ROOT, replace=False)
    root = Rows(train.x[drawn], train.y[drawn])
    table: dict[str, dict[str, list[float]]] = {}
    print("| rule |", " | ".join(chosen), "|\n|---" + "|---" * len(chosen) + "|", flush=True)
    for rule in said.rules.split(","):
        plan = planned(setting, rule, said.rounds, said.norm)
        table[rule] = {
            attack: cell(plan, learner, attacked(clients, setting, attack), root, holdout, attack) for attack in chosen
        }
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
