"""Every method on a model that is more than parameters: statistics meet the mean, counts the sum, however the rest moves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import numpy as np
import pytest
from tests.algorithms.test_methods import TABLE
from tests.federation import plan

os.environ.setdefault("KERAS_BACKEND", "jax")

from atoll.algorithms import find, known
from atoll.errors import PlanError
from atoll.learner import Correct, Data, Fit, Rows, batches
from atoll.learners import build
from atoll.plan import Plan
from atoll.simulate import simulate
from atoll.testing import check_algorithm
from atoll.vector import Group, Groups, Layout, Metrics, Tensor

RATE = 0.05
LAYOUTS = {
    "parameters": Layout((Tensor("kernel", (3, 1)), Tensor("bias", (1,)))),
    "buffers": Layout((Tensor("bn1/mean", (3,)),)),
    "counts": Layout((Tensor("bn1/seen", ()),), "int64", "plain"),
}


class Linear:
    """Least squares in float32, that follows the mean of its inputs and counts its steps."""

    layouts = LAYOUTS
    can = frozenset({"correct", "sgd"})

    def initial(self, seed: int) -> Groups:
        drawn = np.random.default_rng(seed).normal(size=4).astype(np.float32)
        values = (drawn, np.zeros(3, np.float32), np.zeros(1, np.int64))
        return {name: Group(layout, one) for (name, layout), one in zip(LAYOUTS.items(), values, strict=True)}

    def fit(
        self, groups: Groups, rows: Rows, steps: int, batch_size: int, rng: np.random.Generator, correct: Correct | None = None,
        *, rate: float = 1.0,
    ) -> Fit:  # fmt: skip
        w, mean = groups["parameters"].values.copy(), groups["buffers"].values.copy()
        loss = samples = 0.0
        for batch in batches(rng, len(rows), batch_size, steps):
            x = np.column_stack([rows.x[batch], np.ones(len(batch))]).astype(np.float32)
            away = x @ w - rows.y[batch].astype(np.float32)
            down = x.T @ away / np.float32(len(batch))
            w -= np.float32(RATE * rate) * (down if correct is None else correct(down, w))
            mean += np.float32(0.1) * (x[:, :3].mean(axis=0) - mean)
            loss, samples = loss + float(np.sum(away**2)) / 2, samples + len(batch)
        values = (w, mean, groups["counts"].values + steps)
        fitted = {name: group.with_values(one) for (name, group), one in zip(groups.items(), values, strict=True)}
        return Fit(fitted, {"samples": samples, "loss": loss})

    def evaluate(self, groups: Groups, rows: Rows) -> Metrics:
        away = np.column_stack([rows.x, np.ones(len(rows))]) @ groups["parameters"].values - rows.y
        return {"samples": float(len(rows)), "loss": float(np.sum(away**2)) / 2}


def nodes() -> dict[str, Data]:
    found = {}
    for k, size in enumerate((20, 12, 32)):
        rng = np.random.default_rng(k)
        x = rng.normal(k, 1, (size, 3))
        rows = Rows(x, x @ [1.0, -2.0, k] + rng.normal(size=size))
        found[f"node-{k}"] = Data(rows, Rows(x[:0], rows.y[:0]))
    return found


def agreed(name: str) -> Plan:
    row = TABLE[name]
    options = {**row.options, **({"personal": ["*bn1*", "bias"]} if row.rule in ("fedper", "fedbn") else {})}
    return plan(
        plan={"rounds": 3},
        training={"epochs": None, "steps": 4, "batch_size": 8, "learning_rate": RATE},
        aggregation={"rule": row.rule, "options": options},
    )


WITH_STATE = [name for name, row in TABLE.items() if row.rule not in ("ifca", "newton")]
"""IFCA refuses such models, below; Newton's method needs the Hessian, which no learner with a state gives."""


@pytest.mark.parametrize("name", WITH_STATE)
def test_a_method_passes_the_suite(name):
    check_algorithm(lambda: find(agreed(name), Linear()), Linear(), list(nodes().values()), training=agreed(name).training)


@pytest.mark.parametrize("name", WITH_STATE)
def test_counts_add_up_and_statistics_are_averaged(name):
    first, last = Linear().initial(1), simulate(agreed(name).with_(plan={"rounds": 1}), nodes(), learner=Linear())
    passes = {"fedsgd": 3 + 2 + 4}.get(name, 4 * 3)  # in mini-batches: fedsgd goes once through 20, 12 and 32 rows
    personal = TABLE[name].rule in ("fedper", "fedbn")
    assert last.model["counts"].values.tolist() == [0 if personal else passes]
    moved = last.model["buffers"].values - first["buffers"].values
    assert moved.any() != personal
    if not personal:
        assert 0 < moved.mean() < 2, "a mean of the nodes' means, which are 0, 1 and 2 at most"


def test_clusters_take_parameters_alone():
    wrong = agreed("ifca")
    with pytest.raises(PlanError, match=r"'ifca' takes a model of parameters alone; this one has buffers, counts"):
        find(wrong, Linear())


@pytest.fixture(scope="module")
def normalised() -> tuple[Plan, object]:
    import keras

    stack = [keras.Input((3,)), keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    made = Plan.of(
        {
            "plan": {"name": "bn", "rounds": 2},
            "model": {"keras": json.loads(keras.Sequential(stack).to_json()), "loss": "mean_squared_error"},
            "training": {"steps": 3, "batch_size": 8, "learning_rate": 0.01},
            "aggregation": {"rule": "fedbn"},
        }
    )
    return made, build(made)


@pytest.mark.parametrize("rule", ["fedbn", "scaffold"])
def test_a_keras_model_with_batch_norm(normalised, rule):
    plan, learner = normalised
    method = find(plan.with_(aggregation={"rule": rule}), learner)
    check_algorithm(lambda: method, learner, list(nodes().values()), rounds=2, training=plan.training)


def test_batch_norm_is_found_by_its_keras_names_and_stays_at_home(normalised):
    plan, learner = normalised
    sent = find(plan, learner).updates(learner.layouts)
    names = [tensor.name for layout in sent.values() for tensor in layout.tensors]
    assert names
    assert not any("batch_norm" in name for name in names)
    run = simulate(plan, nodes(), learner=learner)
    plain = simulate(plan.with_(aggregation={"rule": "fedavg"}), nodes(), learner=learner)
    assert run.model["buffers"] == learner.initial(0)["buffers"], "the server never saw any statistics"
    better = [run.by_node[name]["loss"] < plain.by_node[name]["loss"] for name in nodes()]
    assert any(better), "nodes whose features lie elsewhere are served better by their own"


@pytest.mark.parametrize(
    ("name", "matches"),
    [("bn1.weight", True), ("layer1.0.bn2.running_var", True), ("conv1.weight", False), ("fc.bias", False), ("abnormal", False)],
)
def test_the_usual_names_of_pytorch(name, matches):
    layouts = {"parameters": Layout((Tensor(name, (1,)), Tensor("last", (1,))))}
    act: Callable[[], object] = lambda: known()["fedbn"]().updates(layouts)  # noqa: E731
    if matches:
        assert act() == {"parameters": Layout((Tensor("last", (1,)),))}
    else:
        with pytest.raises(PlanError, match="fits no array"):
            act()
