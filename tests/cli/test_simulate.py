"""`atoll simulate`: the deployed run's bits from files, and one table spread over clients."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.cli.test_commands import atoll, one_line
from tests.federation import clients, plan, rows, run_processes

from atoll.cli.swept import Swept


def table(path: Path, x: np.ndarray, y: np.ndarray) -> Path:
    np.savetxt(path, np.column_stack([x, y]), "%.17g", ",", header="a,b,c,d,y", comments="")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plan, a folder with a table for each client, and the holdout among them."""
    features = {"features": ["a", "b", "c", "d"], "target": "y", "standardise": "node"}
    agreed = plan(model={"inputs": None}, data=features)
    (tmp_path / "plan.json").write_text(agreed.to_json())
    (tmp_path / "data").mkdir()
    for name, data in {**clients(), "holdout": rows(9)}.items():
        table(tmp_path / "data" / f"{name}.csv", *data)
    return tmp_path


def test_a_folder_of_tables_gives_the_bits_of_the_deployed_run(folder):
    data = folder / "data"
    out = folder / "model.safetensors"
    done = atoll("simulate", folder / "plan.json", "--data", data, "--holdout", data / "holdout.csv", "--to", out, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [row["answered"] for row in found["rounds"]] == [list(clients())] * 3
    assert found["holdout"]["accuracy"] > 0.8
    assert found["reason"] == "all 3 rounds are done"
    assert hashlib.sha256(out.read_bytes()).hexdigest() == found["model"]
    deployed = run_processes(folder / "plan.json", {name: data / f"{name}.csv" for name in clients()}, folder)
    assert deployed["last"] == found["model"]


def test_one_table_is_spread_and_a_start_is_taken(folder):
    words = ("simulate", folder / "plan.json", "--data", folder / "data" / "holdout.csv", "--clients", "5")
    done = atoll(*words, "--partition", "dirichlet:0.3", "--to", folder / "one.safetensors")
    assert done.returncode == 0, done.stderr
    assert "5 of 5 answered" in done.stdout
    assert "on client-1: loss" in done.stdout
    assert "none is no folder; make it first" in one_line(atoll(*words, "--to", folder / "none" / "one.safetensors"))
    again = json.loads(atoll(*words, "--start", folder / "one.safetensors", "--json").stdout.splitlines()[-1])
    fresh = json.loads(atoll(*words, "--json").stdout.splitlines()[-1])
    assert again["rounds"][0]["nodes"]["loss"] < fresh["rounds"][0]["nodes"]["loss"]


def test_each_value_of_a_key_is_a_client(folder):
    table = folder / "keyed.csv"
    header, *lines = (folder / "data" / "holdout.csv").read_text().splitlines()
    whose = ["north", "south", "east, and west"]
    table.write_text("\n".join([f"{header},owner", *(f'{line},"{whose[k % 3]}"' for k, line in enumerate(lines))]) + "\n")
    words = ("--data", table, "--partition", "key:owner")
    found = json.loads(atoll("simulate", folder / "plan.json", *words, "--json").stdout.splitlines()[-1])
    assert found["by_node"].keys() == set(whose)
    shown = json.loads(atoll("partition", "show", folder / "plan.json", *words, "--json").stdout.splitlines()[-1])
    assert sorted(shown["rows"]) == sorted(len(lines[k::3]) for k in range(3))
    assert set(shown["clients"]) == set(whose)
    said = one_line(atoll("simulate", folder / "plan.json", "--data", table, "--partition", "key:ownr"))
    assert "has no column 'ownr'; did you mean 'owner'?" in said
    assert "follows from 'key:owner'; leave it out" in one_line(atoll("simulate", folder / "plan.json", *words, "--clients", "3"))


def test_mistakes_are_one_line(folder):
    words = ("simulate", folder / "plan.json", "--data")
    assert "is no folder of the clients' tables; --clients spreads" in one_line(atoll(*words, folder / "data" / "node-0.csv"))
    assert "holds no tables" in one_line(atoll(*words, folder))
    assert "it is iid, dirichlet:ALPHA" in one_line(
        atoll(*words, folder / "data" / "node-0.csv", "--clients", "4", "--partition", "even")
    )
    assert "use .safetensors" in one_line(atoll(*words, folder / "data", "--to", "model.keras"))
    assert "cohort.minimum is 3" in one_line(atoll(*words, folder / "data" / "node-0.csv", "--clients", "2"), code=3)


def test_what_each_client_would_hold_is_shown_and_drawn(folder):
    picture = folder / "partition.png"
    words = ("partition", "show", folder / "plan.json", "--data", folder / "data" / "holdout.csv", "--clients", "3")
    found = json.loads(atoll(*words, "--partition", "shards:1", "--plot", picture, "--json").stdout.splitlines()[-1])
    assert sum(found["rows"]) == 40
    assert found["classes"] == ["0", "1"]
    assert [sum(row) for row in found["counts"]] == found["rows"]
    assert max(found["distance"]) > 0.3
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "rows a client: 13 to 14" in atoll(*words).stdout
    shifted = json.loads(atoll(*words, "--partition", "shift:3", "--json").stdout.splitlines()[-1])
    assert shifted["noise"] == pytest.approx([1, 2**0.5, 3**0.5], abs=1e-4)
    assert "it is iid, dirichlet:ALPHA" in one_line(atoll(*words, "--partition", "even"))


def test_some_clients_are_there_in_a_round(folder):
    words = ("simulate", folder / "plan.json", "--data", folder / "data" / "holdout.csv", "--clients", "9")
    found = json.loads(atoll(*words, "--available", "4", "--json").stdout.splitlines()[-1])
    assert [len(row["answered"]) for row in found["rounds"]] == [4, 4, 4]
    assert len({name for row in found["rounds"] for name in row["answered"]}) > 4
    assert "--available: 2; it lies between" in one_line(atoll(*words, "--available", "2"))


def test_a_grid_is_swept_and_the_best_comes_first(folder):
    words = ("sweep", folder / "plan.json", "--data", folder / "data", "--holdout", folder / "data" / "holdout.csv")
    done = atoll(*words, "--grid", "training.learning_rate=0.001,0.5,1e308", "--target", "accuracy=0.8", "--json")
    found = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["with"]["training.learning_rate"] for row in found] == [0.5, 0.001, 1e308]
    assert "gives NaN or infinity" in found[-1]["why"]
    assert found[0]["reached"] is not None
    for wrong in ("rate", "training.learning_rate= "):
        assert "it looks like training.learning_rate" in one_line(atoll(*words, "--grid", wrong))
    assert "--grid training.rate: " in one_line(atoll(*words, "--grid", "training.rate=1"))
    assert "training.steps is there twice" in one_line(atoll(*words, "--grid", "training.steps=1", "--grid", "training.steps=2"))


def test_a_grid_takes_lists_and_single_keys_of_a_table(folder):
    agreed = json.loads((folder / "plan.json").read_text())
    agreed["privacy"] = {"clip": 1.0, "largest_weight": 40, "central_noise": {"multiplier": 1.0, "delta": 1e-5}}
    agreed["cohort"] |= {"draw": "poisson", "fraction": 0.9}
    (folder / "plan.json").write_text(json.dumps(agreed))
    words = ("sweep", folder / "plan.json", "--data", folder / "data", "--holdout", folder / "data" / "holdout.csv")
    grid = ("--grid", 'compression.up=["rotate","4bit"],[]', "--grid", "privacy.central_noise.multiplier=2")
    done = atoll(*words, *grid, "--plot", folder / "runs.nothing")
    assert done.returncode == 2
    assert "up ['rotate', '4bit'], multiplier 2 │" in done.stdout, "figures are shown though the picture can't be"
    assert "the ending says the kind of picture" in done.stderr
    assert "Traceback" not in done.stderr
    none = atoll(*words, "--grid", "privacy.largest_weight=null")
    assert none.returncode == 2
    assert none.stderr.startswith("atoll: no run came to its end: ")


def test_a_run_that_could_not_be_is_tried_again_where_a_sweep_goes_on(tmp_path):
    swept = Swept.opened(tmp_path / "sweep", {"data": "x"}, resume=False)
    assert swept.row(plan(), lambda **_: {"why": "the function isn't allowed"})["why"]
    assert not swept.row(plan(), lambda **_: {"why": "", "seconds": 1})["why"]
    assert swept.row(plan(), lambda **_: {"why": "never asked"})["seconds"] == 1


def test_a_run_of_a_sweep_ends_at_its_target_and_the_soonest_comes_first(folder):
    words = ("sweep", folder / "plan.json", "--data", folder / "data", "--holdout", folder / "data" / "holdout.csv")
    grid = ("--grid", "plan.rounds=30", "--grid", "training.learning_rate=0.001,0.02,0.5")
    found = json.loads(atoll(*words, *grid, "--target", "loss=0.5", "--json").stdout.splitlines()[-1])["rows"]
    assert [row["with"]["training.learning_rate"] for row in found] == [0.5, 0.02, 0.001]
    rounds = [len(row["curve"]) for row in found]
    assert [row["reached"] for row in found] == [*rounds[:2], None]
    assert rounds[0] < rounds[1] < rounds[2] == 30
    assert rounds[1] - 1 < found[1]["rounds_to_target"] <= rounds[1]
    for row in found[:2]:
        assert row["figures"]["loss"] <= 0.5
        assert all(figures["loss"] > 0.5 for _, figures in row["curve"][:-1])
    for target, said in (
        ("acuracy=1", "did you mean 'accuracy'"),
        ("auc=0.9", """add metrics = ["auc"] to [model]"""),
        ("accuracy", "it looks like accuracy=0.97"),
    ):
        assert said in one_line(atoll(*words, *grid, "--target", target))


def test_a_sweep_that_was_stopped_shows_what_is_done_and_goes_on(folder, tmp_path):
    store = tmp_path / "sweep"
    words = ("sweep", folder / "plan.json", "--data", folder / "data", "--store", store, "--grid", "training.learning_rate=0.5")
    endless = ("--grid", "plan.rounds=2,100000")
    command = [sys.executable, "-m", "atoll", *map(str, (*words, *endless))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert "rounds 2" in process.stdout.readline()
        while not list(store.glob("*/run.json")):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "learning_rate 0.5, rounds 2 │" in said
    assert "the same command with --resume goes on" in errors
    assert "Traceback" not in errors
    assert "a sweep is there already" in one_line(atoll(*words, *endless))
    more = atoll(*words, "--grid", "plan.rounds=2,3", "--resume", "--json")
    rows = json.loads(more.stdout.splitlines()[-1])["rows"]
    kept = json.loads(next(store.glob("*[0-9a-f].json")).read_text())
    assert kept["seconds"] in [row["seconds"] for row in rows], "what was done isn't done again"
    assert sorted(len(row["curve"]) for row in rows) == [2, 3]
    assert "has --strategy auto, not pool" in one_line(atoll(*words, "--resume", "--strategy", "pool"))
    assert "name the folder of the sweep" in one_line(atoll(*words[:4], *words[6:], "--resume"))


def test_a_plan_is_compared_with_other_methods_one_place_and_each_alone(folder):
    words = ("compare", folder / "plan.json", "--data", folder / "data", "--holdout", folder / "data" / "holdout.csv")
    picture = folder / "methods.png"
    found = json.loads(atoll(*words, "--rules", "scaffold", "--plot", picture, "--json").stdout.splitlines()[-1])["rows"]
    names = ["federated, fedavg", "federated, scaffold", "all rows in one place", *(f"{name} alone" for name in clients())]
    assert [row["name"] for row in found] == names
    assert all(row["figures"]["accuracy"] > 0.5 for row in found)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "--rules: 'scafold' is not known; did you mean 'scaffold'?" in one_line(atoll(*words, "--rules", "fedprox, scafold"))
    missing = one_line(atoll(*words[:-1], folder / "none.csv"))
    assert "none.csv: can't be read (No such file or directory); name a file of rows that is there" in missing


def test_a_request_to_terminate_leaves_nothing_in_shared_memory(folder):
    name = f"stopped-{os.getpid()}"
    agreed = json.loads((folder / "plan.json").read_text())
    agreed["plan"] |= {"rounds": 1_000_000, "name": name}
    (folder / "plan.json").write_text(json.dumps(agreed))
    words = ("simulate", folder / "plan.json", "--data", folder / "data", "--strategy", "pool", "--workers", "1")

    def ours() -> list[Path]:
        return [one for one in Path("/dev/shm").glob("atoll-*/about.json") if name in one.read_text()]

    command = [sys.executable, "-m", "atoll", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert "answered" in process.stdout.readline()
        assert len(ours()) == 1
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said == "atoll: stopped\n"
    assert not ours()
