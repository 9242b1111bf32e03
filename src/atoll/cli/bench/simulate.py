"""`atoll bench simulate`: Atoll's simulator at workload S, beside JAX by hand, and at linear models of many clients.

    python -m atoll.cli.bench.simulate FOLDER

runs workload S once, on rows that are there. Each run is a process of its own.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atoll.cli.bench import crowd, workload
from atoll.cli.bench.processes import peak, run
from atoll.errors import AtollError
from atoll.learner import Data, Rows
from atoll.plan import Plan

WORKLOADS = ("s", "lr", "million", "growth")
_MODEL = "atoll.learners.networks:perceptron"


def measure(repeat: int, *, floor: bool, only: Collection[str] = ()) -> dict[str, Any]:
    """Run the workloads, or `only` some of `WORKLOADS`; of S both programs in turn, medians over the repeats.

    Raises:
        AtollError: JAX isn't installed, or there is no such workload.
    """
    if unknown := set(only) - set(WORKLOADS):
        raise AtollError(f"--only: '{min(unknown)}' is none; it is {', '.join(WORKLOADS)}")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for workload_ in only or WORKLOADS:
            if workload_ == "s":
                found |= _fixed(folder, repeat, floor=floor)
            elif workload_ == "lr":
                found["lr"] = _linear(folder)
            else:
                found[workload_] = list((crowd.registered if workload_ == "million" else crowd.cohorts)(folder))
    return found


def _fixed(folder: Path, repeat: int, *, floor: bool) -> dict[str, Any]:
    """Workload S: Atoll's figures, the floor's, and how the two compare."""
    workload.write(folder)
    programs = ["simulate", *(["floor_simulate"] if floor else [])]
    runs: dict[str, list[Mapping[str, Any]]] = {program: [] for program in programs}
    for _ in range(repeat):
        for program in programs:
            runs[program].append(_once(program, folder))
    found = {**_median(runs["simulate"]), "accuracy": runs["simulate"][0]["accuracy"]}
    if floor:
        found |= {f"floor_{key}": value for key, value in _median(runs["floor_simulate"]).items()}
        pairs = zip(runs["simulate"], runs["floor_simulate"], strict=True)
        found["ratio"] = round(statistics.median(ours["rounds_per_s"] / other["rounds_per_s"] for ours, other in pairs), 3)
        found["floor_accuracy"] = runs["floor_simulate"][0]["accuracy"]
    return found


def _median(runs: list[Mapping[str, Any]]) -> dict[str, float]:
    keys = ("rounds_per_s", "wall_s", "cpu_s", "peak_rss_mb")
    return {key: round(statistics.median(run[key] for run in runs), 2) for key in keys}


def _once(program: str, folder: Path) -> dict[str, Any]:
    """Run a program: from its start to its end, and the seconds of its rounds after the first."""
    told, wall, cpu = run("-m", f"atoll.cli.bench.{program}", str(folder))
    later = told["seconds"][1:]
    return {**told, "rounds_per_s": len(later) / sum(later), "wall_s": wall, "cpu_s": cpu}


def _linear(folder: Path) -> dict[str, float]:
    """Logistic regression over rows of MNIST's shape, 1,000 clients, 10 a round, 100 rounds: the command, from its start."""
    rng = np.random.default_rng(0)
    means = rng.standard_normal((10, 784), dtype=np.float32)
    for name, rows in (("train", 60_000), ("test", 10_000)):
        y = rng.integers(10, size=rows)
        np.savez(folder / f"{name}.npz", x=means[y] + 3 * rng.standard_normal((rows, 784), dtype=np.float32), y=y)
    made = _plan("lr", 100, [784, 10], {"batch_size": 10, "learning_rate": 0.03})
    (folder / "plan.json").write_text(made.to_json())
    words = ["--clients", "1000", "--available", "10", "--strategy", "scan", "--judge-every", "20", "--allow", _MODEL, "--json"]
    files = ["--data", str(folder / "train.npz"), "--holdout", str(folder / "test.npz")]
    done = run("-m", "atoll", "simulate", str(folder / "plan.json"), *files, *words)
    return {"rounds": 100, "wall_s": round(done.wall_s, 2), "cpu_s": round(done.cpu_s, 2)}


def _plan(name: str, rounds: int, sizes: Sequence[int], training: Mapping[str, Any]) -> Plan:
    model = {
        "jax": _MODEL,
        "loss": "softmax_cross_entropy_with_integer_labels",
        "options": {"sizes": list(sizes)},
        "classes": list(range(sizes[-1])),
    }
    cohort = {"minimum": workload.COHORT}
    return Plan.of({"plan": {"name": name, "rounds": rounds}, "model": model, "training": training, "cohort": cohort})


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
            return Drawn.of(name, asked, self._learner.own(asked.rng, asked.rate), list(order))

    rows, schedule = workload.read(folder), workload.schedule()
    training = {"batch_size": workload.BATCH, "learning_rate": workload.RATE}
    plan = _plan("workload-s", workload.ROUNDS, workload.SIZES, training)
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
