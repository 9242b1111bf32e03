"""What a plan names is data: nothing of it is imported unless the owner of this machine agreed."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from rich.console import Console
from tests.federation import atoll, clients, plan, rows, run_processes

from atoll import learners
from atoll.cli.show import round_line, rounds_table
from atoll.errors import AtollError, PlanError
from atoll.learner import Rows, summary
from atoll.plan import Plan
from atoll.simulate import simulate

TRAP = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
def model(**options): raise OSError("never")
def halves(predictions, y): return {"half": 0.5 * len(y)}
def nan(predictions, y): return {"odd": float("nan")}
def taken(predictions, y): return {"accuracy": 1.0}
def no_dict(predictions, y): return 3.0
"""


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that leaves a mark where it is imported."""
    (tmp_path / "atoll_trap.py").write_text(TRAP)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "ran"
    sys.modules.pop("atoll_trap", None)


def test_a_name_that_nobody_allowed_is_not_even_imported(trap):
    for changed in (
        {"logistic": False, "jax": "atoll_trap:model"},
        {"logistic": False, "torch": "atoll_trap:model"},
        {"metrics": ["atoll_trap:halves"]},
    ):
        asked = plan(model=changed)
        with pytest.raises(PlanError) as caught:
            learners.build(asked, allow=["atoll_trap", "atoll_trap:other", "atoll_trap:"])
        assert "asks to run 'atoll_trap:" in str(caught.value)
        assert "`--allow atoll_trap:" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not trap.exists()
    with pytest.raises(PlanError, match=r"asks to run 'os:system'"):
        learners.build(plan(model={"logistic": False, "jax": "os:system", "options": {"command": "true"}}))


def test_what_an_installed_package_registers_is_allowed(trap):
    installed = trap.with_name("atoll_trap-1.dist-info")
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: atoll-trap\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[atoll.models]\nhalves = atoll_trap:halves\n[other]\nnan = atoll_trap:nan\n")
    learner = learners.build(plan(model={"metrics": ["atoll_trap:halves"]}))
    assert trap.exists()
    table = Rows(*rows(1))
    sums = learner.evaluate(learner.initial(0), table)
    assert sums["metric.half"] == 20.0
    assert summary(sums)["half"] == 0.5
    with pytest.raises(PlanError, match="asks to run 'atoll_trap:nan'"):
        learners.build(plan(model={"metrics": ["atoll_trap:nan"]}))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("atoll_trap:nan", "'atoll_trap:nan': the sum 'odd' is nan"),
        ("atoll_trap:taken", "'atoll_trap:taken': the name 'accuracy' is taken: give it another"),
        ("atoll_trap:no_dict", "'atoll_trap:no_dict' failed: AttributeError"),
        ("atoll_trap:missing", "'atoll_trap:missing' can't be imported"),
        ("atoll_no_such:thing", "put its folder on PYTHONPATH"),
    ],
)
def test_a_metric_that_fails_is_named(trap, name, said):
    with pytest.raises(AtollError) as caught:
        simulate(plan(model={"metrics": [name]}), clients(), holdout=Rows(*rows(9)), allow=[name])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["os.system", "a:b:c", "a b:c", "../evil:run", ":f", "m:"])
def test_what_is_no_name_is_no_plan(name):
    with pytest.raises(PlanError, match="names no function; it looks like"):
        Plan.of({"plan": {"name": "x", "rounds": 1}, "model": {"jax": name}})


def test_every_learner_measures_what_a_plan_names(trap):
    from tests.learners.test_learners import keras_plan, layers, sklearn_plan

    x = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)
    table = Rows(x, (x[:, 0] > 0).astype(float))
    for own in (
        keras_plan(layers.Dense(1, "sigmoid")),
        sklearn_plan("SGDClassifier", loss="log_loss"),
        sklearn_plan("SGDRegressor"),
    ):
        learner = learners.build(own.with_(model={"metrics": ["atoll_trap:halves"]}), allow=["atoll_trap:halves"])
        assert learner.evaluate(learner.initial(0), table)["metric.half"] == 15.0


def test_all_that_is_missing_is_said_at_once():
    asked = plan(model={"logistic": False, "jax": "one:model", "metrics": ["two:a", "two:b"]})
    with pytest.raises(PlanError, match=r"run 'one:model' and 'two:b', .*`--allow one:model --allow two:b`"):
        learners.build(asked, allow=["two:a"])


def test_own_metrics_have_a_column():
    judged = {"loss": 0.5, "accuracy": 0.75, "precision": 1.0, "brier": 0.125}
    row = {"round": 1, "answered": ["a"], "cohort": 1, "judged": judged, "bytes": 10, "seconds": 1.0}
    console = Console(width=200, file=io.StringIO())
    console.print(rounds_table([row], 3, ""))
    assert "brier" in console.file.getvalue()
    assert "0.1250" in console.file.getvalue()
    assert "precision" not in console.file.getvalue()
    assert "loss 0.5000, accuracy 0.7500, brier 0.1250" in round_line(row, 3)


def test_the_commands_say_how_to_allow(tmp_path):
    agreed = plan(model={"logistic": False, "jax": "tests.learners.jax_models:linear", "inputs": None, "loss": "squared_error"})
    (tmp_path / "plan.json").write_text(agreed.to_json())
    with atoll("serve", tmp_path / "plan.json", "--port", "0", "--store", tmp_path / "store", log=tmp_path / "log") as server:
        assert server.wait(60) == 2
    said = (tmp_path / "log").read_text()
    assert "`--allow tests.learners.jax_models:linear`" in said
    assert len(said.strip().splitlines()) == 1


def test_real_processes_that_were_allowed_to(tmp_path, monkeypatch):
    """A server by its flag, nodes by their variable; history shows the figure, and replay needs the same word."""
    name = "tests.learners.tables:wrong"
    agreed = plan(model={"inputs": None, "metrics": [name]}, data={"features": [*"abcd"], "target": "y"}, plan={"rounds": 2})
    (tmp_path / "plan.json").write_text(agreed.to_json())
    files = {}
    for one, (x, y) in clients().items():
        files[one] = tmp_path / f"{one}.csv"
        np.savetxt(files[one], np.column_stack([x, y]), delimiter=",", header="a,b,c,d,y", comments="")
    monkeypatch.setenv("ATOLL_JOIN_ALLOW", name)
    history = run_processes(tmp_path / "plan.json", files, tmp_path, ["--allow", name])
    judged = history["rounds"][-1]["nodes"]
    assert judged["wrong"] == pytest.approx(1 - judged["accuracy"])
    store = ["--store", tmp_path / "store"]
    with atoll("history", *store, log=tmp_path / "log") as shown:
        assert "wrong" in shown.stdout.read()
    for allow, code in (([], 2), (["--allow", name], 0)):
        with atoll("replay", *store, *allow, log=tmp_path / "log") as again:
            assert again.wait(60) == code
    assert not (tmp_path / "log").read_text()
