"""The commands as a person types them: what they print, and the exit codes others script against."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.federation import clients, plan, run

from atoll.cli import demo_data


def atoll(*words: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "atoll", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=cwd, env={**os.environ, **env}, check=False)


def one_line(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The single line on stderr that a person's mistake ends in."""
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(plan().to_json())
    return path


def test_import_is_light_and_the_core_needs_no_framework():
    code = "import sys, atoll, atoll.cli; print([m for m in ('numpy','keras','jax','sklearn','aiohttp') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_command():
    said = atoll("--help").stdout
    for command in ("demo", "new", "serve", "join", "status", "history", "export", "kafka", "bench"):
        assert command in said


def test_a_mistyped_command_or_option_is_one_line():
    assert "No such command 'sevre'" in one_line(atoll("sevre"))
    assert "--colour" in one_line(atoll("history", "--colour", "red"))
    assert "--log-level: 'loud' is none" in one_line(atoll("--log-level", "loud", "status"))


def test_a_plan_with_a_mistake_is_one_line_with_the_nearest_name(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text('[plan]\nname = "x"\nrounds = 2\n[model]\nlogistic = true\n[training]\nlearning_rte = 0.1\n')
    assert "training.learning_rte: unknown key; did you mean 'learning_rate'?" in one_line(atoll("serve", path))
    assert "can't be read" in one_line(atoll("serve", tmp_path / "none.toml"))


def test_a_port_in_use_a_bad_store_and_a_broker_that_is_down(plan_file, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = one_line(atoll("serve", plan_file, "--port", str(port), "--store", tmp_path / "store"))
        assert f"can't listen on 127.0.0.1 port {port}" in said
    (tmp_path / "file").write_text("")
    assert "can't be a store" in one_line(atoll("serve", plan_file, "--port", "0", "--store", tmp_path / "file"))
    plan_file.write_text(plan(log={"kafka": "127.0.0.1:1"}).to_json())
    said = one_line(atoll("serve", plan_file, "--port", "0", "--store", tmp_path / "store"))
    assert "Kafka at 127.0.0.1:1 doesn't answer" in said


def test_a_node_with_a_wrong_table_ends_in_one_line(tmp_path):
    from tests.federation import atoll as process
    from tests.federation import events

    path = tmp_path / "plan.json"
    path.write_text(plan(model={"inputs": None}, data={"features": ["a", "b"], "target": "y"}).to_json())
    table = tmp_path / "rows.csv"
    table.write_text("a,b,z\n1,2,0\n")
    with process("serve", path, "--port", "0", "--store", tmp_path / "store", "--json", log=tmp_path / "log") as server:
        url = next(event["url"] for event in events(server) if event["what"] == "listening")
        said = one_line(atoll("join", url, "--data", table, "--dir", tmp_path / "node"))
        assert f"{table}: has no column 'y'" in said
        status = atoll("status", url)
        assert "0 of at least 3 nodes are here" in status.stdout
        assert json.loads(atoll("status", url, "--json").stdout)["phase"] == "waiting for nodes"


def test_status_of_nothing_is_one_line():
    assert "no server answers there" in one_line(atoll("status", "http://127.0.0.1:1"))
    assert "is no address" in one_line(atoll("status", "somewhere"))


def test_history_and_export(tmp_path):
    history = run(plan(), clients(), tmp_path)
    store = tmp_path / "store"
    shown = atoll("history", "--store", store).stdout
    assert "completed" in shown
    assert "3 of 3: node-0" in shown
    found = json.loads(atoll("history", history["run"][:-1], "--store", store, "--json").stdout)
    assert found["last"] == history["last"]
    picture = tmp_path / "plot.png"
    assert atoll("history", "--store", store, "--plot", picture).returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")

    out = tmp_path / "model.safetensors"
    assert atoll("export", "--store", store, "--to", out, "--which", "1").returncode == 0
    assert out.read_bytes() == (store / "models" / f"{history['rounds'][0]['model']}.safetensors").read_bytes()
    assert "is no Keras model but logistic" in one_line(atoll("export", "--store", store, "--to", tmp_path / "m.keras"))
    assert "the ending says the kind" in one_line(atoll("export", "--store", store, "--to", tmp_path / "m.pt"))
    assert "--which: '9'" in one_line(atoll("export", "--store", store, "--to", out, "--which", "9"))
    assert "no run starts with 'zzz'" in one_line(atoll("history", "zzz", "--store", store))
    assert "no store is there" in one_line(atoll("history", "--store", tmp_path / "none"))


def test_settings_from_the_environment_lose_to_flags(tmp_path):
    run(plan(), clients(), tmp_path)
    place = str(tmp_path / "store")
    assert "completed" in atoll("history", ATOLL_HISTORY_STORE=place).stdout
    assert "no store is there" in one_line(atoll("history", "--store", tmp_path / "none", ATOLL_HISTORY_STORE=place))


def test_new_writes_what_serve_takes_and_overwrites_nothing(tmp_path):
    place = tmp_path / "mine"
    done = atoll("new", place)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in place.iterdir()} == {"plan.toml", "model.json", "README.md", "data"}
    assert "is not empty" in one_line(atoll("new", place))


def test_the_demo_end_to_end(tmp_path):
    done = atoll("demo", "--dir", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"run", "rounds", "nodes", "log", "holdout", "local", "centralized", "seconds"}
    federated, centralized = result["holdout"]["accuracy"], result["centralized"]["accuracy"]
    alone = [one["accuracy"] for one in result["local"]]
    assert abs(federated - centralized) <= 0.02
    assert federated > sum(alone) / len(alone)
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")
    exported = tmp_path / "model.keras"
    assert atoll("export", "--store", tmp_path / "store", "--to", exported).returncode == 0
    import keras

    assert keras.saving.load_model(exported).count_params() == 513


def test_the_demo_through_kafka_gives_the_same_model(tmp_path, kafka):
    from atoll.cli.demo import _federate, template

    data = demo_data.write(tmp_path / "data", 3, 7)
    from rich.console import Console

    models = []
    for address in (None, kafka):
        place = tmp_path / ("kafka" if address else "embedded")
        place.mkdir()
        agreed = template().with_(plan={"rounds": 2, "seed": 7}, log={"kafka": address})
        (place / "plan.json").write_text(agreed.to_json())
        models.append(_federate(agreed, data, place, Console(quiet=True))["last"])
    assert models[0] == models[1]


def test_federated_is_as_good_as_centralized_on_the_mean_of_five_seeds():
    from atoll import learners
    from atoll.cli.demo import compare, template
    from atoll.preprocess import prepare
    from atoll.simulate import simulate

    federated, centralized, alone = [], [], []
    for seed in range(7, 12):
        agreed = template().with_(plan={"seed": seed})
        _, tables = demo_data.tables(3, seed)
        arrays = {name: (table[:, :-1], table[:, -1]) for name, table in tables.items()}
        holdout = prepare(arrays.pop("holdout"), agreed).judge
        learner = learners.build(agreed)
        federated.append(simulate(agreed, arrays, holdout=holdout, learner=learner).holdout["accuracy"])
        local, everybody = compare(agreed, 3, seed)
        centralized.append(everybody["accuracy"])
        alone += [one["accuracy"] for one in local.values()]
    assert abs(sum(federated) - sum(centralized)) / 5 <= 0.01
    assert sum(federated) / 5 > sum(alone) / 15


def test_interrupting_a_server_leaves_a_stored_run(tmp_path, plan_file):
    import signal

    from tests.federation import atoll as process
    from tests.federation import events

    with process("serve", plan_file, "--port", "0", "--store", tmp_path / "store", "--json", log=tmp_path / "log") as server:
        seen = events(server)
        assert next(seen)["what"] == "listening"
        server.send_signal(signal.SIGINT)
        assert [event["what"] for event in seen][-1] == "history"
        assert server.wait(10) == 0
    found = json.loads(atoll("history", "--store", tmp_path / "store", "--json").stdout)
    assert found["outcome"] == "stopped"
    assert re.search("operator", found["reason"])
