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
from sklearn.datasets import load_wine
from tests.federation import plan, run

from atoll import buckets, trees
from atoll.algorithms import find
from atoll.errors import DataError, PlanError
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
OBJECTIVES = {"binary:logistic": 1, "multi:softprob": 3, "reg:squarederror": 1}
"""How many trees a boosting step has."""
ROOM = {objective: outputs * (BINS + 1) << DEPTH for objective, outputs in OBJECTIVES.items()}
FIRST = buckets.passes(ROOM["binary:logistic"])
"""Rounds in which bins are agreed on."""


def sites(objective: str = "binary:logistic", *, gaps: bool = False) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Three nodes whose features lie elsewhere, on scales of their own: ages, amounts, yes and no; or wines of three kinds."""
    if objective == "multi:softprob":
        wine = load_wine()
        order = np.argsort(wine.data[:, 0])  # by alcohol
        found = {
            f"node-{k}": (wine.data[at].astype(np.float32), wine.target[at]) for k, at in enumerate(np.split(order, [70, 120]))
        }
    else:
        found = {}
        for k, size in enumerate(SIZES):
            rng = np.random.default_rng(k)
            age, amount = rng.integers(18 + 10 * k, 70, size), np.exp(rng.normal(6 + k, 1.5, size))
            x = np.column_stack([age, amount, rng.integers(0, 2, size), rng.normal(size=size)]).astype(np.float32)
            score = (age > 40) + x[:, 2] * (amount > 500) + x[:, 3] + rng.logistic(size=size) / 3
            found[f"node-{k}"] = x, (score > 1).astype(float) if objective == "binary:logistic" else score
    return {name: (_gappy(*rows), rows[1]) for name, rows in found.items()} if gaps else found


def _gappy(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Numbers that aren't there, more of them where the target is large: that they are missing says something."""
    often = np.where(y > np.median(y), 0.4, 0.1)[:, None] * np.linspace(0, 1, x.shape[1])
    return np.where(np.random.default_rng(len(x)).random(x.shape) < often, np.float32(np.nan), x)


def pooled(objective: str = "binary:logistic", *, gaps: bool = False) -> tuple[np.ndarray, np.ndarray]:
    parts = zip(*sites(objective, gaps=gaps).values(), strict=True)
    return tuple(np.concatenate(part) for part in parts)  # type: ignore[return-value]


def agreed(
    rule: str, rounds: int, objective: str = "binary:logistic", more: Mapping[str, Any] | None = None, **options: Any
) -> Plan:
    shape = {"inputs": 13, "classes": [0, 1, 2]} if objective == "multi:softprob" else {}
    return plan(
        plan={"rounds": rounds},
        model={"logistic": False, "trees": objective, "options": {"max_depth": DEPTH, **(more or {})}, **shape},
        data={"incomplete": "keep"},
        training={"epochs": None, "learning_rate": ETA},
        aggregation={"rule": rule, "options": options},
        cohort={"minimum": 3, "quorum": 1.0, "deadline": 20},
    )


def known(objective: str, **more: Any) -> dict[str, Any]:
    base = 0.0 if objective == "reg:squarederror" else 0.5
    options = {"objective": objective, "eta": ETA, "max_depth": DEPTH, "base_score": base, "tree_method": "hist", "nthread": 1}
    return {**options, **({"num_class": 3} if objective == "multi:softprob" else {}), **more}


@pytest.mark.parametrize("gaps", [False, True], ids=["whole", "gaps"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("more", [{}, {"reg_lambda": 3.0, "gamma": 1.0, "min_child_weight": 5}])
def test_histograms_are_training_on_the_pooled_table_with_the_same_bins(objective, more, gaps):
    """The same splits, the same directions for what is missing, and chances that are equal but for XGBoost's float32."""
    made = agreed("histograms", buckets.passes(ROOM[objective]) + 12 * DEPTH, objective, more, bins=BINS)
    found = simulate(made, sites(objective, gaps=gaps)).model
    x, y = pooled(objective, gaps=gaps)
    bins = [np.searchsorted(edges, column, side="right") for edges, column in zip(_edges(x, objective), x.T, strict=True)]
    data = xgboost.DMatrix(np.where(np.isnan(x), np.nan, np.column_stack(bins)), label=y)
    steps = int(found["counts"].values[0])
    central = xgboost.train(known(objective, **more, max_bin=256), data, steps)
    assert steps >= 12
    theirs, ours = trees.read(bytes(central.save_raw("json")), DEPTH, OBJECTIVES[objective]), found["splits"].arrays
    assert np.isnan(x).any() == gaps == ours["missing"].any()
    for name in ("feature", "missing"):
        np.testing.assert_array_equal(ours[name][:steps], theirs[name], name)
    size = max(1.0, float(np.abs(y).max())) if objective == "reg:squarederror" else 1.0
    np.testing.assert_allclose(build(made).predict(found, x), central.predict(data), atol=1e-6 * size)


def _edges(x: np.ndarray, objective: str) -> np.ndarray:
    fine = buckets.fineness(ROOM[objective])
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
@pytest.mark.parametrize(("objective", "gaps"), [("binary:logistic", False), ("binary:logistic", True), ("multi:softprob", True)])
def test_bagging_is_a_mean_of_xgboosts_own_boosters(objective, gaps, weighted):
    made, there = agreed("bagging", 3, objective, trees=2, weighted=weighted), sites(objective, gaps=gaps)
    found = simulate(made, there)
    many = [len(y) for _, y in there.values()]
    shares = np.array(many) / sum(many) if weighted else np.full(3, 1 / 3)
    x, _ = pooled(objective, gaps=gaps)
    shape = (3,) if objective == "multi:softprob" else ()
    whole = np.full((len(x), *shape), 0.5 if shape else 0.0)
    for _ in range(3):
        grown = []
        for (rows, y), before in zip(there.values(), np.split(whole, np.cumsum(many)[:-1]), strict=True):
            data = xgboost.DMatrix(rows, label=y)
            data.set_base_margin(before)
            grown.append(xgboost.train(known(objective), data, 2))
        said = [
            one.predict(xgboost.DMatrix(x), output_margin=True) - known(objective)["base_score"] * bool(shape) for one in grown
        ]
        whole = whole + sum(share * one for share, one in zip(shares, said, strict=True))
    chances = np.exp(whole) / np.exp(whole).sum(axis=1, keepdims=True) if shape else 1 / (1 + np.exp(-whole))
    np.testing.assert_allclose(build(made).predict(found.model, x), chances, atol=1e-6)
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


@pytest.mark.parametrize("objective", ["binary:logistic", "multi:softprob"])
@pytest.mark.parametrize("rule", RUNS)
def test_a_deployed_run_has_the_bits_of_a_simulated_one(rule, objective, tmp_path):
    rounds, options = RUNS[rule]
    made, there = agreed(rule, rounds, objective, **options), sites(objective, gaps=objective == "multi:softprob")
    simulated = simulate(made, there)
    assert simulate(made, dict(reversed(there.items()))).digest == simulated.digest
    history = run(made, there, tmp_path)
    assert history["last"] == simulated.digest
    assert history["rounds"][-1]["by_node"] == simulated.by_node
    assert simulated.rounds[-1]["nodes"]["loss"] < simulated.rounds[0]["nodes"]["loss"]


@pytest.mark.parametrize(("objective", "gaps"), [("binary:logistic", False), ("multi:softprob", True)])
def test_histograms_are_sums_that_nobody_sees_one_by_one(objective, gaps, tmp_path):
    """By one line of the plan the server learns nothing but what all nodes' rows say together."""
    made, there = agreed("histograms", FIRST + 3 * DEPTH, objective, bins=BINS), sites(objective, gaps=gaps)
    hidden = made.with_(privacy={"secure_aggregation": True})
    x, _ = pooled(objective, gaps=gaps)
    runs = [simulate(one, there) for one in (made, hidden)]
    plain, masked = (build(made).predict(found.model, x) for found in runs)
    np.testing.assert_allclose(masked, plain, atol=1e-6)
    if gaps:
        assert run(hidden, there, tmp_path)["last"] == runs[1].digest, "deployed too"


def test_a_table_with_gaps_is_read_as_the_plan_says(tmp_path):
    """Rows without a target are left out, a category that isn't there is NaN in all of its columns."""
    table = tmp_path / "rows.csv"
    table.write_text("age,kind,ill\n40,a,1\n?,b,0\n50,?,1\n60,b,?\n")
    columns = {"features": ["age", "kind"], "target": "ill", "categories": {"kind": ["a", "b", "c"]}, "missing": ["?"]}
    made = agreed("histograms", 40).with_(model={"inputs": None}, data=columns)
    found = prepare(table, made).train
    np.testing.assert_array_equal(found.x, [[40, 0, 0], [np.nan, 1, 0], [50, np.nan, np.nan]])
    assert prepare(table, made.with_(data={"incomplete": "drop"})).train.x.tolist() == [[40, 0, 0]]
    for change, said in (
        ({"model": {"trees": None, "logistic": True, "options": {}}}, "which trees alone can take, and no 'logistic' model"),
        ({"data": {"standardise": "node"}}, "trees need no scaling: leave standardise out"),
    ):
        with pytest.raises(PlanError, match=said):
            made.with_(**change)
    table.write_text("age,kind,ill\ninf,a,1\n")
    with pytest.raises(DataError, match="'age': inf is no finite number"):
        prepare(table, made)


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
            {"model": {"trees": None, "logistic": True, "options": {}}, "data": {"incomplete": "drop"}},
            r"'bagging' needs a learner that can boost trees on its rows",
        ),
        (
            {
                "model": {"trees": None, "logistic": True, "options": {}},
                "aggregation": {"rule": "histograms"},
                "data": {"incomplete": "drop"},
            },
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
    model = {"trees": None, "keras": network, "loss": "mean_squared_error", "options": {}}
    wrong = agreed("bagging", 3).with_(model=model, data={"incomplete": "drop"})
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
