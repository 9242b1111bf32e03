"""Trees as arrays say what XGBoost says, and what can't be one is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xgboost
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.learners.tables import NOTHING, rows

from atoll import trees
from atoll.errors import LayoutError, LearnerError, PlanError
from atoll.learner import Data, Rows
from atoll.learners import build
from atoll.learners.trees import export
from atoll.plan import Plan
from atoll.testing import check_learner


def plan(objective: str = "binary:logistic", rule: str = "bagging", rounds: int = 20, **options: Any) -> Plan:
    return Plan.of(
        {
            "plan": {"name": "t", "rounds": rounds},
            "model": {"trees": objective, "inputs": 6, "options": {"max_depth": 3, **options}},
            "training": {"learning_rate": 0.3},
            "aggregation": {"rule": rule},
        }
    )


@pytest.mark.parametrize(("objective", "kind"), [("binary:logistic", "binary"), ("reg:squarederror", "number")])
def test_the_learner_passes_the_suite(objective, kind):
    check_learner(lambda: build(plan(objective, base_score=0.2)), Data(rows(kind), NOTHING))


@pytest.mark.parametrize(("objective", "kind"), [("binary:logistic", "binary"), ("reg:squarederror", "number")])
@pytest.mark.parametrize(
    "options", [{}, {"max_depth": 5, "gamma": 0.5, "base_score": 0.3, "reg_alpha": 0.2, "min_child_weight": 3}]
)
def test_it_is_xgboost_and_xgboost_reads_it(objective, kind, options, tmp_path):
    made, table = plan(objective, **options), rows(kind)
    learner = build(made)
    model = learner.initial(0)
    for seed in (1, 2):  # in two fits, as in two rounds
        model = learner.fit(model, table, 5, 1, np.random.default_rng(seed)).groups
    known = {"objective": objective, "eta": 0.3, "max_depth": 3, "base_score": 0.0 if kind == "number" else 0.5, **options}
    central = xgboost.train({**known, "tree_method": "hist", "nthread": 1}, xgboost.DMatrix(table.x, label=table.y), 10)
    said = central.predict(xgboost.DMatrix(table.x))
    np.testing.assert_allclose(learner.predict(model, table.x), said, atol=1e-5)
    export(made, model, tmp_path / "model.json")
    back = xgboost.Booster(model_file=tmp_path / "model.json")
    np.testing.assert_allclose(back.predict(xgboost.DMatrix(table.x)), said, atol=1e-5)
    assert back.num_boosted_rounds() == 10
    assert {f"f{k}": n for k, n in enumerate(model["counts"].arrays["splits"]) if n} == back.get_score(importance_type="weight")


@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_rows_go_where_a_plain_walk_goes(depth, seed):
    rng = np.random.default_rng(seed)
    inner = (1 << depth) - 1
    feature, threshold = rng.integers(-1, 4, inner).astype(np.float32), rng.normal(size=inner).astype(np.float32)
    x = rng.normal(size=(9, 4)).astype(np.float32)
    for row, found in zip(x, trees.places(feature, threshold, x), strict=True):
        at = 0
        for _ in range(depth):
            split = int(feature[at])
            at = 2 * at + 1 + int(split >= 0 and row[split] >= threshold[at])
        assert found == at - inner


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("feature", 6, "splits feature 6 at"),
        ("feature", -2, "splits feature -2 at"),
        ("feature", 1.5, "splits feature 1.5 at"),
        ("feature", np.nan, "splits feature nan at"),
        ("feature", np.inf, "splits feature inf at"),
        ("threshold", np.nan, "at nan; there are features 0 to 5"),
        ("threshold", -np.inf, "at -inf"),
        ("leaf", np.inf, "a leaf is NaN or infinite"),
        ("trees", -1, "it says that it holds -1 trees; it has room for"),
        ("trees", 1 << 40, "it says that it holds 1099511627776 trees"),
    ],
)
def test_broken_trees_are_refused_by_whoever_reads_them(name, value, said, tmp_path):
    learner = build(plan())
    model = learner.fit(learner.initial(0), rows("binary"), 2, 1, np.random.default_rng(0)).groups
    group = next(group for group in model.values() if name in group.arrays)
    array = group.arrays[name]
    array[(1, 2)[: array.ndim] if array.ndim > 1 else 0] = value
    for act in (
        lambda: learner.evaluate(model, rows("binary")),
        lambda: learner.fit(model, rows("binary"), 1, 1, np.random.default_rng(0)),
        lambda: learner.predict(model, rows("binary").x),
        lambda: export(plan(), model, tmp_path / "model.json"),
    ):
        with pytest.raises((LayoutError, LearnerError)):
            act()
    with pytest.raises(LayoutError, match=said):
        trees.check(model, 6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"model": {"trees": "rank:pairwise"}},
            "model.trees: 'rank:pairwise' is not known; it is one of binary:logistic, reg:squared",
        ),
        ({"model": {"inputs": None}}, "model.inputs: is missing"),
        (
            {"model": {"options": {"max_dept": 3}}},
            "model.options.max_dept: trees have no such option with 'bagging'; known: base_score",
        ),
        ({"model": {"options": {"max_depth": 0}}}, "model.options.max_depth: it is a whole number from 1 to 12; it is 0"),
        ({"model": {"options": {"max_depth": 2.5}}}, "model.options.max_depth: it is a whole number from 1 to 12; it is 2.5"),
        ({"model": {"options": {"gamma": -1}}}, "model.options.gamma: it is a number, not negative; it is -1"),
        ({"model": {"options": {"gamma": "much"}}}, "model.options.gamma: it is a number"),
        ({"model": {"options": {"base_score": 1.0}}}, "model.options.base_score: it is a chance between 0 and 1; it is 1.0"),
        (
            {"model": {"options": {"capacity": 10}}},
            "capacity: 10 trees have room, but 20 rounds of 2 nodes give 40 or more",
        ),
        ({"training": {"epochs": 3}}, "training: trees know no epochs or steps"),
        ({"training": {"optimizer": "adam"}}, "training: trees have a learning_rate"),
        ({"aggregation": {"rule": "histograms"}, "plan": {"rounds": 3}}, "plan.rounds: .* for n trees take 4 . 3 n"),
        (
            {"aggregation": {"rule": "histograms"}, "model": {"options": {"subsample": 0.5}}},
            "model.options.subsample: trees have no such option with 'histograms'",
        ),
    ],
)
def test_a_plan_that_trees_cannot_follow_is_refused(change, said):
    with pytest.raises(PlanError, match=said):
        build(plan().with_(**change))


def test_rows_that_do_not_fit_are_refused():
    learner = build(plan())
    with pytest.raises(LearnerError, match=r"is 0 or 1 in every row; data.positive says"):
        learner.evaluate(learner.initial(0), Rows(rows("binary").x, rows("binary").y * 2))
    full = build(plan(rounds=1, capacity=2))
    with pytest.raises(LearnerError, match=r"has 0 trees and room for 2: raise model.options.capacity"):
        full.fit(full.initial(0), rows("binary"), 3, 1, np.random.default_rng(0))


def test_what_is_written_is_json_without_surprises():
    learner = build(plan())
    assert json.dumps(learner.written(learner.initial(0)), allow_nan=False)
