"""Trees over tables: bagging against XGBoost's own boosters, histograms against XGBoost on the pooled rows."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import xgboost
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.federation import plan, run

from atoll import buckets
from atoll.algorithms import find
from atoll.errors import PlanError
from atoll.learner import Fit, Rows
from atoll.learners import build
from atoll.learners.trees import Trees
from atoll.node.runtime import Node
from atoll.plan import Plan
from atoll.preprocess import prepare
from atoll.server.close import step
from atoll.server.runtime import Server
from atoll.simulate import simulate
from atoll.testing import check_algorithm
from atoll.vector import Group, Update

ETA, DEPTH, BINS = 0.3, 3, 16
SIZES = (300, 200, 100)
FIRST = buckets.passes(BINS << DEPTH)
"""Rounds in which bins are agreed on."""


def sites(objective: str = "binary:logistic") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Three nodes whose features lie elsewhere, on scales of their own: ages, amounts, yes and no."""
    found = {}
    for k, size in enumerate(SIZES):
        rng = np.random.default_rng(k)
        age, amount = rng.integers(18 + 10 * k, 70, size), np.exp(rng.normal(6 + k, 1.5, size))
        x = np.column_stack([age, amount, rng.integers(0, 2, size), rng.normal(size=size)]).astype(np.float32)
        score = (age > 40) + x[:, 2] * (amount > 500) + x[:, 3] + rng.logistic(size=size) / 3
        found[f"node-{k}"] = x, (score > 1).astype(float) if objective == "binary:logistic" else score
    return found


def pooled(objective: str = "binary:logistic") -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.concatenate(parts) for parts in zip(*sites(objective).values(), strict=True))  # type: ignore[return-value]


def agreed(
    rule: str, rounds: int, objective: str = "binary:logistic", more: Mapping[str, Any] | None = None, **options: Any
) -> Plan:
    return plan(
        plan={"rounds": rounds},
        model={"logistic": False, "trees": objective, "options": {"max_depth": DEPTH, **(more or {})}},
        training={"epochs": None, "learning_rate": ETA},
        aggregation={"rule": rule, "options": options},
        cohort={"minimum": 3, "quorum": 1.0, "deadline": 20},
    )


def known(objective: str, **more: Any) -> dict[str, Any]:
    base = 0.5 if objective == "binary:logistic" else 0.0
    options = {"objective": objective, "eta": ETA, "max_depth": DEPTH, "base_score": base, "tree_method": "hist", "nthread": 1}
    return {**options, **more}


@pytest.mark.parametrize("objective", ["binary:logistic", "reg:squarederror"])
@pytest.mark.parametrize("more", [{}, {"reg_lambda": 3.0, "gamma": 1.0, "min_child_weight": 5}])
def test_histograms_are_training_on_the_pooled_table_with_the_same_bins(objective, more):
    made = agreed("histograms", FIRST + 12 * DEPTH, objective, more, bins=BINS)
    found = simulate(made, sites(objective))
    x, y = pooled(objective)
    binned = np.column_stack([np.searchsorted(e, c, side="right") for e, c in zip(_edges(x), x.T, strict=True)])
    data = xgboost.DMatrix(binned, label=y)
    central = xgboost.train(known(objective, **more, max_bin=256), data, int(found.model["counts"].values[0])).predict(data)
    assert found.model["counts"].values[0] >= 12
    np.testing.assert_allclose(build(made).predict(found.model, x), central, atol=1e-5)


def _edges(x: np.ndarray) -> np.ndarray:
    fine = buckets.fineness(BINS << DEPTH)
    sums = np.zeros((x.shape[1], buckets.count(fine)))
    buckets.add(x, sums, fine)
    return buckets.edges(sums, BINS, fine)


def test_their_bins_cost_next_to_nothing():
    """Against XGBoost with its own 256 quantile bins on the pooled table."""
    found = simulate(agreed("histograms", 2 + 30 * DEPTH, bins=32), sites())
    x, y = pooled()
    central = xgboost.train(known("binary:logistic"), xgboost.DMatrix(x, label=y), 30).predict(xgboost.DMatrix(x))
    ours = build(agreed("histograms", 2 + 30 * DEPTH, bins=32)).predict(found.model, x)
    losses = [float(-np.mean(np.log(np.where(y == 1, p, 1 - p)))) for p in (ours, central)]
    assert abs(losses[0] - losses[1]) < 0.02, losses


@pytest.mark.parametrize("weighted", [True, False])
def test_bagging_is_a_mean_of_xgboosts_own_boosters(weighted):
    made = agreed("bagging", 3, trees=2, weighted=weighted)
    found = simulate(made, sites())
    shares = np.array(SIZES) / sum(SIZES) if weighted else np.full(3, 1 / 3)
    x, _ = pooled()
    whole, margins = np.zeros(len(x)), [np.zeros(size) for size in SIZES]
    for _ in range(3):
        grown = []
        for (rows, y), before in zip(sites().values(), margins, strict=True):
            data = xgboost.DMatrix(rows, label=y)
            data.set_base_margin(before)
            grown.append(xgboost.train(known("binary:logistic"), data, 2))
        said = [one.predict(xgboost.DMatrix(x), output_margin=True) for one in grown]
        whole = whole + sum(share * one for share, one in zip(shares, said, strict=True))
        margins = np.split(whole, np.cumsum(SIZES)[:-1])
    np.testing.assert_allclose(build(made).predict(found.model, x), 1 / (1 + np.exp(-whole)), atol=1e-5)
    assert found.model["counts"].values[0] == 3 * 3 * 2


def test_a_full_ensemble_stays_as_it_is():
    made = agreed("bagging", 2, more={"capacity": 7})
    learner = build(made)
    method = find(made, learner)
    state, sizes = method.init(learner.initial(0)), []
    for _ in range(4):
        sent = {
            name: method.local(
                learner, method.brief(state), {}, Rows(*site), made.training.pace(1, 1, 2), np.random.default_rng(0)
            )[1]
            for name, site in sites().items()
        }
        state = step(method, state, method.updates(learner.layouts), sent, 3)
        sizes.append(int(state["counts"].values[0]))
    assert sizes == [3, 6, 7, 7]
    assert state["counts"].arrays["splits"].sum() > 7


RUNS = {"bagging": (4, {"trees": 2}), "histograms": (FIRST + 2 * DEPTH, {"bins": BINS})}


@pytest.mark.parametrize("rule", RUNS)
def test_a_method_passes_the_suite(rule):
    made = agreed(rule, RUNS[rule][0], **RUNS[rule][1])
    learner = build(made)
    check_algorithm(lambda: find(made, learner), learner, [prepare(one, made) for one in sites().values()], rounds=6)


@pytest.mark.parametrize("rule", RUNS)
def test_a_deployed_run_has_the_bits_of_a_simulated_one(rule, tmp_path):
    rounds, options = RUNS[rule]
    simulated = simulate(agreed(rule, rounds, **options), sites())
    assert simulate(agreed(rule, rounds, **options), dict(reversed(sites().items()))).digest == simulated.digest
    history = run(agreed(rule, rounds, **options), sites(), tmp_path)
    assert history["last"] == simulated.digest
    assert history["rounds"][-1]["by_node"] == simulated.by_node
    assert simulated.rounds[-1]["nodes"]["loss"] < simulated.rounds[0]["nodes"]["loss"]


def test_histograms_are_sums_that_nobody_sees_one_by_one():
    """By one line of the plan the server learns nothing but what all nodes' rows say together."""
    made = agreed("histograms", FIRST + 3 * DEPTH, bins=BINS)
    hidden = made.with_(privacy={"secure_aggregation": True})
    x, _ = pooled()
    plain, masked = (build(one).predict(simulate(one, sites()).model, x) for one in (made, hidden))
    np.testing.assert_allclose(masked, plain, atol=1e-6)


@pytest.mark.parametrize("stages", [["8bit"], ["bfloat16"]])
def test_compression_touches_no_splits(stages):
    made = agreed("bagging", 4).with_(compression={"up": stages})
    found, plain = simulate(made, sites()), simulate(agreed("bagging", 4), sites())
    assert found.model["counts"].values[0] == 12
    assert abs(found.rounds[-1]["nodes"]["loss"] - plain.rounds[-1]["nodes"]["loss"]) < 0.01


class Broken(Trees):
    """A node whose trees lead out of the table."""

    def fit(self, *args: Any, **options: Any) -> Fit:
        fitted = super().fit(*args, **options)
        fitted.groups["splits"].arrays["feature"][...] = 99
        return fitted


def test_a_hostile_tree_is_refused_and_the_run_goes_on(tmp_path):
    made = agreed("bagging", 2).with_(cohort={"minimum": 2, "quorum": 0.5, "grace": 0})

    async def together() -> dict[str, Any]:
        server = Server(made, store=tmp_path / "store", port=0)
        hostile = build(made)
        hostile.__class__ = Broken
        nodes = [Node(server.url, one, name=name, directory=tmp_path / name) for name, one in sites().items()]
        nodes[0] = Node(server.url, sites()["node-0"], name="node-0", directory=tmp_path / "node-0", learner=hostile)
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    assert [row["answered"] for row in history["rounds"]] == [["node-1", "node-2"]] * 2
    refused = [said["reason"] for row in history["rounds"] for said in row["refused"] if said["name"] == "node-0"]
    assert any("tree 1, node 0: it splits feature 99" in said for said in refused)


def test_the_simulator_refuses_it_too():
    def tamper(round_: int, updates: dict[str, Update]) -> dict[str, Update]:
        bad = updates["node-0"].groups["splits"]
        broken = Group(bad.layout, np.where(np.arange(bad.values.size) == 0, 99, bad.values).astype(np.float32))
        return {**updates, "node-0": Update({**updates["node-0"].groups, "splits": broken}, 1.0)}

    made = agreed("bagging", 2).with_(cohort={"minimum": 2, "quorum": 0.5})
    found = simulate(made, sites(), tamper=tamper)
    assert all(row["answered"] == ["node-1", "node-2"] for row in found.rounds)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"aggregation": {"rule": "fedavg", "options": {}}},
            "rule: 'fedavg' takes a mean of models, and trees have none: take 'bagging'",
        ),
        ({"aggregation": {"options": {"trees": 0}}}, "options.trees: it is a whole number from 1 up; it is 0"),
        (
            {"aggregation": {"rule": "histograms", "options": {"bins": 1}}},
            "options.bins: it is a whole number from 2 to 1024; it is 1",
        ),
        ({"privacy": {"clip": 1.0}}, "privacy.clip: it makes whole updates shorter, and of trees or sums nothing would be left"),
        (
            {"privacy": {"secure_aggregation": True}},
            "'bagging' looks at single updates, and privacy.secure_aggregation hides them",
        ),
        ({"cohort": {"buffer": 3}, "aggregation": {"rule": "histograms", "options": {}}}, "'histograms' can fold no late update"),
        (
            {"model": {"trees": None, "logistic": True, "options": {}}},
            r"'bagging' needs a learner that can boost trees on its rows",
        ),
        (
            {"model": {"trees": None, "logistic": True, "options": {}}, "aggregation": {"rule": "histograms"}},
            "'histograms' needs a learner that can grow trees from sums; .* can't .trees = .binary:logistic. can",
        ),
    ],
)
def test_what_does_not_fit_is_named_when_the_plan_is_read(change, said):
    wrong = agreed("bagging", 40).with_(**change)
    learner = build(wrong)
    with pytest.raises(PlanError, match=said):
        find(wrong, learner)


def test_a_keras_model_is_no_tree():
    import json

    keras = pytest.importorskip("keras")
    network = json.loads(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]).to_json())
    wrong = agreed("bagging", 3).with_(model={"trees": None, "keras": network, "loss": "mean_squared_error", "options": {}})
    with pytest.raises(PlanError, match=r"'bagging' needs .* 'keras' as planned can't .trees = .binary:logistic. can"):
        find(wrong, build(wrong))


def test_without_xgboost_bagging_says_what_to_install(monkeypatch):
    monkeypatch.setattr("atoll.learners.trees.find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"once XGBoost is installed: pip install 'atoll-fl\[xgboost\]'"):
        find(agreed("bagging", 3), build(agreed("bagging", 3)))
    sums = agreed("histograms", 11)
    assert find(sums, build(sums)), "the other needs none"


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2), st.integers(2, 40), st.integers(4, 8))
@settings(max_examples=60, deadline=None)
@example([0.0, -7.810626884857496e-38], 2, 4)
def test_buckets_rise_with_values_and_edges_part_them(values, bins, fine):
    x = np.sort(np.array(values, np.float32))
    places = buckets.buckets(x, fine)
    assert (np.diff(places) >= 0).all()
    assert 0 <= places[0] <= places[-1] < buckets.count(fine)
    sums = np.zeros((1, buckets.count(fine)))
    buckets.add(x[:, None], sums, fine)
    assert sums.sum() == len(x)
    edges = buckets.edges(sums, bins, fine)[0]
    assert (np.diff(edges) >= 0).all()
    binned = np.searchsorted(edges, x, side="right")
    for one in np.unique(places):
        assert len(set(binned[places == one])) == 1, "a bucket lies in one bin"
    if len(np.unique(places)) <= bins:
        assert len(set(binned)) == len(set(places)), "and each has its own, where there are enough"


def test_bins_hold_alike_many_rows():
    x = np.random.default_rng(0).normal(50, 10, (20_000, 1)).astype(np.float32)
    sums = np.zeros((1, buckets.count(7)))
    buckets.add(x, sums, 7)
    counts = np.bincount(np.searchsorted(buckets.edges(sums, 16, 7)[0], x[:, 0], side="right"), minlength=16)
    np.testing.assert_allclose(counts, 1250, rtol=0.25)
