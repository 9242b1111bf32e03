"""The talk's own run, for some seeds: a server and two nodes as processes, their updates through a real Kafka.

    python run.py heart.csv [--seeds 5] [--kafka HOST:PORT] [--dir talk-run] [--json]
    python run.py heart.csv --simulate [--seeds 20]

Without --kafka a broker is started for the time of the runs (Java 17 and Maven). A seed decides which fifth of the rows the
server tests on, which half of the others each node has, the first model, and the draws of training. --simulate runs the same
plan in this process, and compares with all rows in one place and with each node alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import atoll
from atoll import learners
from atoll.preprocess import prepare

PLAN = Path(__file__).with_name("plan.toml")
ATOLL = [sys.executable, "-m", "atoll"]


def split(table: Path, seed: int, place: Path) -> dict[str, Path]:
    """Write the server's fifth of the rows, and half of the others for each node."""
    with table.open(newline="") as file:
        header, *rows = csv.reader(file)
    random.Random(seed).shuffle(rows)
    fifth, half = len(rows) // 5, (len(rows) - len(rows) // 5) // 2
    parts = {"holdout": rows[:fifth], "node-1": rows[fifth : fifth + half], "node-2": rows[fifth + half :], "all": rows[fifth:]}
    place.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        with (place / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *part])
    return {name: place / f"{name}.csv" for name in parts}


def federate(plan: atoll.Plan, tables: dict[str, Path], place: Path) -> dict[str, Any]:
    """Run the server and both nodes to the end; return the history."""
    (place / "plan.json").write_text(plan.to_json())
    serve = ["serve", place / "plan.json", "--holdout", tables["holdout"], "--port", "0", "--store", place / "store"]
    with ExitStack() as stack:
        server = stack.enter_context(process(*serve, log=place / "server.log"))
        for line in server.stdout or ():
            event = json.loads(line)
            if event["what"] == "history":
                return dict(event)
            if event["what"] == "round":
                print(".", end="", flush=True)
            if event["what"] == "listening":
                for name in ("node-1", "node-2"):
                    join = ["join", event["url"], "--data", tables[name], "--name", name, "--dir", place / name]
                    stack.enter_context(process(*join, log=place / f"{name}.log"))
    sys.exit(f"the server ended early: {(place / 'server.log').read_text().strip()}")


def compare(plan: atoll.Plan, table: Path, seeds: int, place: Path) -> None:
    """Say how the plan does on the server's rows: federated, over all rows in one place, and each node alone."""
    learner, figures = learners.build(plan), []
    for seed in range(seeds):
        tables, agreed = split(table, seed, place / f"seed-{seed}"), plan.with_(plan={"seed": seed})
        holdout = prepare(tables.pop("holdout"), agreed).judge
        alone, everything = agreed.with_(cohort={"minimum": 1}), tables.pop("all")
        whole = atoll.simulate(alone, {"all": everything}, holdout=holdout, learner=learner)
        ones = [atoll.simulate(alone, {name: rows}, holdout=holdout, learner=learner) for name, rows in tables.items()]
        federated = atoll.simulate(agreed, tables, holdout=holdout, learner=learner)
        each = statistics.mean(one.holdout["accuracy"] for one in ones)
        zeros = 1 - float(holdout.y.mean())
        figures.append((federated.holdout["accuracy"], whole.holdout["accuracy"], each, zeros))
        print("seed {}: federated {:.4f}, one place {:.4f}, alone {:.4f}, always 0 {:.4f}".format(seed, *figures[-1]), flush=True)
    for name, column in zip(("federated", "one place", "alone", "always 0"), zip(*figures, strict=True), strict=True):
        print(f"{name}: {mean(column)}")


def mean(accuracy: Sequence[float]) -> str:
    """Say mean and deviation.

    >>> mean([0.5, 0.75])
    '0.6250 ± 0.1768'
    """
    return f"{statistics.mean(accuracy):.4f} ± {statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0:.4f}"


@contextmanager
def process(*words: str | Path, log: Path) -> Iterator[subprocess.Popen[str]]:
    """An `atoll` process; what it says as JSON can be read, what goes wrong is in `log`."""
    with log.open("w") as errors:
        command = [*ATOLL, *map(str, words), "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as running:
            try:
                yield running
                running.wait(timeout=20)
            finally:
                running.terminate()


@contextmanager
def broker(place: Path) -> Iterator[str]:
    """A Kafka for as long as this block runs."""
    print("starting Kafka", flush=True)
    start = [*ATOLL, "kafka", "start", "--dir", str(place), "--json"]
    started = subprocess.run(start, stdout=subprocess.PIPE, text=True, check=False)
    if started.returncode:
        sys.exit(started.returncode)  # it said why
    try:
        yield json.loads(started.stdout)["address"]
    finally:
        subprocess.run([*ATOLL, "kafka", "stop", "--dir", str(place)], stdout=subprocess.DEVNULL, check=False)


def main() -> None:
    """Run all seeds, and say what came of them."""
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("table", type=Path, help="heart.csv: 14 columns with a header")
    words.add_argument("--seeds", type=int, default=5, help="how many runs, seeds 0, 1, …")
    words.add_argument("--kafka", help="the address of a broker that runs already")
    words.add_argument("--dir", type=Path, default=Path("talk-run"), help="where rows, stores and logs go")
    words.add_argument("--simulate", action="store_true", help="in this process, compared with other ways to train")
    words.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    given = words.parse_args()
    if not given.table.is_file():
        sys.exit(f"{given.table}: is not there; README.md says where it comes from")
    plan, runs = atoll.Plan.load(PLAN), []
    if given.simulate:
        compare(plan, given.table, given.seeds, given.dir)
        return
    with ExitStack() as stack:
        address = given.kafka or stack.enter_context(broker(given.dir / "kafka"))
        for seed in range(given.seeds):
            place = given.dir / f"seed-{seed}"
            agreed = plan.with_(plan={"seed": seed}, log={"kafka": address})
            print(f"seed {seed} ", end="", flush=True)
            runs.append(federate(agreed, split(given.table, seed, place), place))
            last = runs[-1]["rounds"][-1]["holdout"]
            print(f" accuracy {last['accuracy']:.4f}, loss {last['loss']:.4f} on the server's rows", flush=True)
    accuracy = [run["rounds"][-1]["holdout"]["accuracy"] for run in runs]
    print(f"accuracy over {given.seeds} seeds: {mean(accuracy)}")
    if given.json:
        print(json.dumps({"accuracy": accuracy, "runs": runs}))


if __name__ == "__main__":
    main()
