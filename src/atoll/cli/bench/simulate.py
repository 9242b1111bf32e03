"""`atoll bench simulate`: workload S by Atoll's simulator, beside JAX by hand, each in a process of its own.

    python -m atoll.cli.bench.simulate FOLDER

runs Atoll's once, on rows that are there.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atoll.cli.bench import workload
from atoll.errors import AtollError
from atoll.learner import Data, Rows
from atoll.plan import Plan

_MODEL = "atoll.learners.networks:perceptron"


def measure(repeat: int, *, floor: bool) -> dict[str, Any]:
    """Run both in turn, and return Atoll's figures, the floor's, and how the two compare: medians over the repeats.

    Raises:
        AtollError: JAX isn't installed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload.write(folder)
        programs = ["simulate", *(["floor_simulate"] if floor else [])]
        runs: dict[str, list[Mapping[str, Any]]] = {program: [] for program in programs}
        for _ in range(repeat):
            for program in programs:
                runs[program].append(_once(program, folder))
    atoll = _median(runs["simulate"])
    found = {**atoll, "accuracy": runs["simulate"][0]["accuracy"]}
    if floor:
        base = _median(runs["floor_simulate"])
        found |= {f"floor_{key}": value for key, value in base.items()}
        found["ratio"] = round(atoll["rounds_per_s"] / base["rounds_per_s"], 3)
        found["floor_accuracy"] = runs["floor_simulate"][0]["accuracy"]
    return found


def _median(runs: list[Mapping[str, Any]]) -> dict[str, float]:
    keys = ("rounds_per_s", "wall_s", "cpu_s", "peak_rss_mb")
    return {key: round(statistics.median(run[key] for run in runs), 2) for key in keys}


def _once(program: str, folder: Path) -> dict[str, Any]:
    """Run a program: from its start to its end, and the seconds of its rounds after the first."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", f"atoll.cli.bench.{program}", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise AtollError(f"workload S can't run ({last}); it needs JAX: pip install 'atoll-fl[jax]'")
    told = json.loads(done.stdout.splitlines()[-1])
    later = told["seconds"][1:]
    return {
        "rounds_per_s": len(later) / sum(later),
        "wall_s": wall,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_rss_mb": told["peak_rss_mb"],
        "accuracy": told["accuracy"],
    }


def peak() -> int:
    """Return the most memory that this process took, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main(folder: Path) -> None:
    """Run the rounds; print their times and accuracies as one JSON object."""
    from atoll import learners
    from atoll.simulate import simulate
    from atoll.simulate.map import Work
    from atoll.simulate.tape import Asked
    from atoll.simulate.vectorised import Drawn, Vectorised
    from atoll.vector import Group

    class Fixed(Vectorised):
        """Draws what the workload says."""

        def drawn(self, round_: int, name: str, asked: Asked) -> Drawn:
            order = workload.order(round_ - 1, int(name[1:])).reshape(-1, workload.BATCH)
            return Drawn.of(name, asked, self._pure.own(asked.rng, asked.rate), list(order))

    rows, schedule = workload.read(folder), workload.schedule()
    plan = Plan.of(
        {
            "plan": {"name": "workload-s", "rounds": workload.ROUNDS},
            "model": {
                "jax": _MODEL,
                "loss": "softmax_cross_entropy_with_integer_labels",
                "options": {"sizes": workload.SIZES},
                "classes": list(range(workload.SIZES[-1])),
            },
            "training": {"batch_size": workload.BATCH, "learning_rate": workload.RATE},
            "cohort": {"minimum": workload.COHORT},
        }
    )
    learner = learners.build(plan, [_MODEL])
    layout = learner.layouts["parameters"]
    arrays = {f"{at}/{name}": array for at, both in enumerate(workload.first()) for name, array in zip(("kernel", "bias"), both)}
    nothing = Rows(rows.x[0, :0], rows.y[0, :0])
    clients = {f"c{k:02}": Data(Rows(rows.x[k], rows.y[k]), nothing) for k in range(workload.CLIENTS)}
    ticks, accuracy = [0.0], {}

    def watch(event: Mapping[str, Any]) -> None:
        ticks.append(time.perf_counter())
        if event["holdout"]:
            accuracy[event["round"]] = round(event["holdout"]["accuracy"], 4)

    def strategy(work: Work) -> Vectorised:
        return Fixed(work, "scan", 2, workload.ROWS)

    ticks[0] = time.perf_counter()
    simulate(
        plan,
        clients,
        learner=learner,
        holdout=Rows(rows.x_test, rows.y_test),
        start={"parameters": Group(layout, layout.flatten(arrays))},
        strategy=strategy,
        judge_every=workload.JUDGED,
        there=lambda number: [f"c{k:02}" for k in schedule[number - 1]],
        watch=watch,
    )
    told = {"seconds": np.diff(ticks).tolist(), "accuracy": accuracy, "peak_rss_mb": peak()}
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
