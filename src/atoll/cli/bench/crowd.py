"""Crowds: how fast the clients of a linear model train, and how a round's time and a simulation's memory grow with them.

    python -m atoll.cli.bench.crowd FOLDER REGISTERED COHORT INPUTS ROWS ROUNDS

runs one; the rest are how many clients there are and are asked in a round, and numbers a row and rows a client.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atoll.cli.bench.processes import peak, run
from atoll.learner import Data, Rows
from atoll.plan import Plan

REGISTERED, COHORTS = (10_000, 100_000, 1_000_000), (10, 100, 1000)
_TABLE, _CLASSES, _BATCH = 100_000, 10, 10
"""Clients' rows are drawn from a table of so many, mapped from a file."""
_MODEL = "atoll.learners.networks:perceptron"


def registered(folder: Path) -> Iterator[dict[str, Any]]:
    """1,000 clients a round of ever more that are registered: 10 rows of 32 numbers each, one mini-batch."""
    for clients in REGISTERED:
        yield {"registered": clients, **_once(folder, clients, 1000, 32, 10)}


def cohorts(folder: Path) -> Iterator[dict[str, Any]]:
    """Ever more clients a round of 1,000: 7,850 parameters, 40 rows of 784 numbers each, four mini-batches."""
    for cohort in COHORTS:
        yield {"cohort": cohort, **_once(folder, 1000, cohort, 784, 40)}


def _once(folder: Path, *sizes: int) -> dict[str, Any]:
    """Return medians over the rounds after the first two."""
    path = folder / f"{sizes[2]}.npy"
    if not path.exists():
        np.save(path, np.random.default_rng(0).standard_normal((_TABLE, sizes[2]), dtype=np.float32))
    done = run("-m", "atoll.cli.bench.crowd", str(folder), *map(str, (*sizes, 8)))
    seconds, cpu = (statistics.median(done.told[key][2:]) for key in ("seconds", "cpu"))
    return {
        "clients_per_s": round(sizes[1] / seconds),
        "s_per_round": round(seconds, 4),
        "cpu_s_per_round": round(cpu, 4),
        "wall_s": round(done.wall_s, 2),
        "peak_rss_mb": done.told["peak_rss_mb"],
    }


def main(folder: Path, clients: int, cohort: int, inputs: int, rows: int, rounds: int) -> None:
    """Run the rounds; print what each took as one JSON object."""
    from atoll.simulate import simulate
    from atoll.simulate.clients import Spread, drawn

    x = np.load(folder / f"{inputs}.npy", mmap_mode="r")
    y = x[:, :_CLASSES].argmax(axis=1).astype(np.int32)
    plan = Plan.of(
        {
            "plan": {"name": "crowd", "rounds": rounds},
            "model": {
                "jax": _MODEL,
                "loss": "softmax_cross_entropy_with_integer_labels",
                "options": {"sizes": [inputs, _CLASSES]},
                "classes": list(range(_CLASSES)),
            },
            "training": {"batch_size": _BATCH, "learning_rate": 0.1},
            "cohort": {"minimum": cohort},
        }
    )
    parts: Any = np.random.default_rng(1).integers(len(x), size=(clients, rows), dtype=np.intp)
    there = Spread(Data(Rows(x, y), Rows(x[:0], y[:0])), parts, [], plan)
    ticks = [(time.perf_counter(), time.process_time())]

    def watch(event: Mapping[str, Any]) -> None:
        if event["what"] == "round":
            ticks.append((time.perf_counter(), time.process_time()))

    simulate(
        plan, there, allow=[_MODEL], strategy="vmap", there=drawn(there, cohort, 0), watch=watch, judge_every=rounds
    )  # fmt: skip
    seconds, cpu = np.diff(ticks, axis=0).T.tolist()
    sys.stdout.write(json.dumps({"seconds": seconds, "cpu": cpu, "peak_rss_mb": peak()}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
