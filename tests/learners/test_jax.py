"""Models of plain JAX functions: they pass the suite, and what is special in them is handled rightly in a real federation."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tests import federation
from tests.learners.tables import NOTHING, rows

from atoll import learners
from atoll.errors import LearnerError, PlanError
from atoll.learner import Data, Rows
from atoll.plan import Plan
from atoll.simulate import simulate
from atoll.store.sql import SqlStore
from atoll.testing import check_learner
from atoll.wire import unpack

MODELS = "tests.learners.jax_models:"
BINARY, CLASSES, NUMBERS = "sigmoid_binary_cross_entropy", "softmax_cross_entropy_with_integer_labels", "squared_error"


def jax_plan(name: str, loss: str | None = BINARY, training: dict | None = None, **options) -> Plan:
    return Plan.of(
        {
            "plan": {"name": "j", "rounds": 2},
            "model": {"jax": MODELS + name, "loss": loss, "options": options},
            "training": {"learning_rate": 0.1, "batch_size": 8, **(training or {})},
            "cohort": {"minimum": 3, "deadline": 20, "grace": 1},
        }
    )


def build(plan: Plan):
    return learners.build(plan, allow=[name for name in (plan.model.jax, *plan.model.metrics) if name])


TABLE = {
    "three classes, bfloat16": (jax_plan("deep", CLASSES, {"precision": "bfloat16"}, outputs=3), "three"),
    "regression": (jax_plan("linear", NUMBERS), "number"),
    "batch norm, dropout, frozen": (jax_plan("normed"), "binary"),
    "words, tied": (jax_plan("words"), "words"),
    "own loss": (jax_plan("own_loss", None), "binary"),
}


@pytest.mark.parametrize("name", TABLE)
def test_every_model_passes_the_suite(name):
    plan, kind = TABLE[name]
    x, y = rows(kind)
    check_learner(lambda: build(plan), Data(Rows(x[:112], y[:112]), NOTHING), steps=40)


@pytest.mark.parametrize("optimizer", ["adam", "lion"])
def test_every_optimizer_learns(optimizer):
    learner = build(jax_plan("linear", training={"optimizer": optimizer, "learning_rate": 0.02}))
    start = learner.initial(0)
    fitted = learner.fit(start, rows("binary"), 40, 30, np.random.default_rng(0)).groups
    assert learner.evaluate(fitted, rows("binary"))["loss"] < learner.evaluate(start, rows("binary"))["loss"]


def test_momentum_and_rate_are_those_of_the_field():
    """Two steps on all rows at once: v ← 0.9 v + g, w ← w − 0.5 · rate · v, by hand."""
    learner = build(jax_plan("linear", NUMBERS, training={"learning_rate": 0.5, "options": {"momentum": 0.9}}))
    table = rows("number")
    start = learner.initial(0)
    fitted = learner.fit(start, table, 2, 120, np.random.default_rng(0), rate=0.1).groups["parameters"].arrays
    kernel, bias = (start["parameters"].arrays[name].astype(float) for name in ("kernel", "bias"))
    pushes = [np.zeros_like(kernel), np.zeros_like(bias)]
    for _ in range(2):
        error = table.x @ kernel + bias - table.y[:, None]
        gradients = [2 * table.x.T @ error / 120, 2 * error.mean(axis=0)]
        pushes = [0.9 * push + gradient for push, gradient in zip(pushes, gradients, strict=True)]
        kernel, bias = kernel - 0.05 * pushes[0], bias - 0.05 * pushes[1]
    np.testing.assert_allclose(fitted["kernel"], kernel, rtol=1e-4)
    np.testing.assert_allclose(fitted["bias"], bias, rtol=1e-4)


def test_names_are_the_paths_in_the_pytree():
    layouts = build(jax_plan("deep")).layouts
    assert [tensor.name for tensor in layouts["parameters"].tensors] == ["0/bias", "0/kernel", "1/bias", "1/kernel"]
    tied = build(jax_plan("words")).layouts["parameters"]
    assert [tuple(tensor) for tensor in tied.tensors] == [("embedding", (20, 4)), ("places", (6,))]


@pytest.mark.parametrize("name", ["batch norm, dropout, frozen", "words, tied"])
def test_a_deployed_run_gives_the_simulated_runs_bits(tmp_path, name):
    plan, kind = TABLE[name]
    allow = [plan.model.jax]
    whole = rows(kind)
    data = {f"node-{k}": (whole.x[k::3][:32], whole.y[k::3][:32]) for k in range(3)}
    simulated = simulate(plan, data, allow=allow)
    history = federation.run(plan, data, tmp_path, allow=allow)
    assert [row["model"] for row in history["rounds"]] == [row["model"] for row in simulated.rounds]
    _states(plan, simulated, history, tmp_path)


def _states(plan, simulated, history, place):
    learner = build(plan)
    if "counts" not in learner.layouts:
        return
    body = (place / "store" / "models" / f"{history['last']}.safetensors").read_bytes()
    model, start = unpack(body, learner.layouts)[0], learner.initial(plan.plan.seed)
    # 32 rows in batches of 8 are 4 steps a node and round: the model has seen every batch of every node.
    assert model["counts"].values.dtype == np.int64
    assert model["counts"].arrays["batches"] == 2 * 3 * 4
    for name in ("frozen/kernel", "frozen/bias"):
        assert model["buffers"].arrays[name].tobytes() == start["buffers"].arrays[name].tobytes(), "to the bit"
    assert not np.array_equal(model["buffers"].arrays["mean"], start["buffers"].arrays["mean"])


def test_buffers_are_averaged_by_rows():
    plan = jax_plan("normed").with_(plan={"rounds": 1}, cohort={"minimum": 2})
    table = rows("binary")
    data = {"a": (table.x[:40], table.y[:40]), "b": (table.x[40:56], table.y[40:56])}
    learner = build(plan)
    together = simulate(plan, data, learner=learner).model["buffers"].arrays["mean"]
    one = plan.with_(cohort={"minimum": 1})
    alone = [simulate(one, {name: data[name]}, learner=learner).model["buffers"].arrays["mean"] for name in data]
    np.testing.assert_allclose(together, (40 * alone[0] + 16 * alone[1]) / 56, rtol=1e-5)


def test_low_precision_is_of_the_arithmetic_only():
    exact, rough = (
        build(jax_plan("deep", training={"precision": precision, "learning_rate": 1e-4})) for precision in ("float32", "bfloat16")
    )
    start = exact.initial(0)
    moved = [
        learner.fit(start, rows("binary"), 30, 30, np.random.default_rng(0)).groups["parameters"].values
        for learner in (exact, rough)
    ]
    assert not np.array_equal(*moved), "something was computed at low precision"
    # Steps this small would be lost if the weights were bfloat16 themselves (8 bits: steps of 0.4 %).
    np.testing.assert_allclose(moved[1] - start["parameters"].values, moved[0] - start["parameters"].values, atol=3e-5)
    assert np.mean(moved[1] != start["parameters"].values) > 0.95
    assert rough.evaluate(start, rows("binary")) == exact.evaluate(start, rows("binary")), "judging is exact"


def test_own_metrics_are_added_up_over_nodes_and_shown(tmp_path):
    watched = {"metric": "brier", "better": "lower", "patience": 9}
    plan = jax_plan("linear").with_(model={"metrics": [MODELS + "brier"]}, stopping=watched)
    whole = rows("binary")
    data = {f"node-{k}": (whole.x[k::3], whole.y[k::3]) for k in range(3)}
    history = federation.run(plan, data, tmp_path, allow=[plan.model.jax, MODELS + "brier"])
    store = SqlStore(tmp_path / "store")
    last = {row.place: row.metrics for row in store.evaluations(history["run"]) if row.round == 2}
    everywhere = last.pop("nodes")
    store.close()
    assert everywhere["metric.brier"] == pytest.approx(sum(one["metric.brier"] for one in last.values()), rel=1e-15)
    assert history["rounds"][-1]["nodes"]["brier"] == everywhere["metric.brier"] / 120
    assert history["best"] == min(history["rounds"], key=lambda row: row["nodes"]["brier"])["model"]
    learner = build(plan)
    model = simulate(plan, data, learner=learner).model
    assert everywhere["metric.brier"] == pytest.approx(learner.evaluate(model, whole)["metric.brier"], rel=1e-5)


def test_the_how_to_is_true(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "jax.md").read_text()
    code, plan = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL).group(1) for kind in ("python", "toml"))
    (tmp_path / "models.py").write_text(code)
    (tmp_path / "plan.toml").write_text(plan)
    monkeypatch.syspath_prepend(tmp_path)
    data = {"a": federation.rows(1), "b": federation.rows(2)}
    run = simulate(Plan.load(tmp_path / "plan.toml"), data, allow=["models:network", "models:brier"])
    assert run.rounds[-1]["nodes"]["brier"] < run.rounds[0]["nodes"]["brier"]


@pytest.mark.parametrize(
    ("plan", "kind", "said"),
    [
        (jax_plan("no_model"), PlanError, "returned a str: it returns atoll.learners.jax.Model"),
        (jax_plan("linear", None), PlanError, "model.loss: name one in the plan"),
        (jax_plan("own_loss"), PlanError, "the model brings its own: leave it out of the plan"),
        (jax_plan("linear", "cross_entropy"), PlanError, "'cross_entropy' is not known; it is one of softmax_cross"),
        (jax_plan("linear", training={"optimizer": "sgdd"}), PlanError, "training.optimizer: 'sgdd' is not known"),
        (jax_plan("linear", training={"options": {"momentun": 1}}), PlanError, "momentun"),
        (jax_plan("linear", width=3), PlanError, "linear(width=3) failed: TypeError"),
        (jax_plan("half"), LearnerError, "'value' is float16; weights travel as float32"),
        (jax_plan("nowhere"), LearnerError, "can't be imported"),
    ],
)
def test_what_it_cannot_do_is_said_by_the_plan(plan, kind, said):
    with pytest.raises(kind) as caught:
        build(plan)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_judging_clients_of_many_sizes_compiles_a_few_and_changes_nothing():
    learner, (x, y) = build(jax_plan("deep")), rows("binary")
    model = learner.initial(0)
    each = [learner.evaluate(model, Rows(x[lo : lo + 1], y[lo : lo + 1])) for lo in range(60)]
    for count in range(1, 60):
        sums = learner.evaluate(model, Rows(x[:count], y[:count]))
        assert sums["samples"] == count
        assert sums["loss"] == pytest.approx(sum(one["loss"] for one in each[:count]), rel=1e-5)
        assert sums["correct"] == sum(one["correct"] for one in each[:count])
    assert learner._judge._cache_size() <= 7  # 1, 2, 4, … 64
