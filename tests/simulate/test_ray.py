"""Backend `ray`, on a cluster of two processes on this machine: the results of one process with the same strategy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.federation import clients, plan, rows
from tests.simulate.test_strategies import RAGGED, agreed

import atoll
from atoll.errors import AtollError, LayoutError
from atoll.learners.logistic import Logistic
from atoll.logs.broker import free_port


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[str]:
    """The address of a cluster with two processors, on loopback; it ends with the tests."""
    folder, port = tmp_path_factory.mktemp("ray"), free_port()
    code = "import sys, atoll.simulate.ray; from ray.scripts.scripts import main; main()"  # Ray's command, with Atoll's settings
    ports = [f"--port={port}", "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    words = ["start", "--head", "--block", "--include-dashboard=false", "--num-cpus=2", *ports]
    unguarded = {**os.environ, "RAY_AUTH_MODE": "disabled"}  # on loopback, and Ray reads its own mode once in a process
    with (folder / "out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdout=out, stderr=out, env=unguarded, cwd=Path(__file__).parents[2]
        )
    try:
        over = time.monotonic() + 120
        while "Ray runtime started" not in (folder / "out").read_text():
            assert process.poll() is None, (folder / "out").read_text()
            assert time.monotonic() < over, (folder / "out").read_text()
        yield f"ray:127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def test_strategies_give_the_bits_that_they_give_in_one_process(cluster):
    adam, scaffold = agreed("linear", optimizer="adam", epochs=2), plan(aggregation={"rule": "scaffold"})  # one compiled, one
    data = {f"node-{k}": rows(k, count) for k, count in enumerate(RAGGED)}  # in which clients have memories
    for how, what in (("map", scaffold), ("vmap", adam)):
        alone, there = (
            atoll.simulate(what, data, allow=what.model.functions, strategy=how, workers=2, backend=backend)
            for backend in (None, cluster)
        )
        assert there.digest == alone.digest, how
        assert there.strategy == how
        assert there.by_node == alone.by_node
        assert there.rounds == alone.rounds


def test_what_a_cluster_cannot_do_is_said_in_one_line(cluster):
    wild, data = plan(training={"learning_rate": 1e300}), clients()
    huge = {name: (x * 1e30, y) for name, (x, y) in data.items()}
    with pytest.raises(LayoutError, match="round 1, node-0: training gave NaN"):
        atoll.simulate(wild, huge, workers=1, backend=cluster)
    with pytest.raises(AtollError, match="'dask' is none; it is ray"):
        atoll.simulate(plan(), data, backend="dask")
    with pytest.raises(AtollError, match=r"ray:127\.0\.0\.1:1: nobody listens there"):
        atoll.simulate(plan(), data, backend="ray:127.0.0.1:1")
    with pytest.raises(AtollError, match="leave learner= out"):
        atoll.simulate(plan(), data, backend=cluster, learner=Logistic(4, 0.1))


def test_a_cluster_of_this_machine_is_started_and_ended(tmp_path):
    (tmp_path / "plan.json").write_text(plan().to_json())
    x, y = rows(0, 120)
    np.savez(tmp_path / "rows.npz", x=x, y=y)
    found = []
    for more in ((), ("--backend", "ray", "--workers", "1")):
        words = [
            "simulate",
            tmp_path / "plan.json",
            "--data",
            tmp_path / "rows.npz",
            "--clients",
            "3",
            "--strategy",
            "map",
            *more,
        ]
        command = [sys.executable, "-m", "atoll", *map(str, words), "--json"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1])["model"])
    assert found[0] == found[1]
