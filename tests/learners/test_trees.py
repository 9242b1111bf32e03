"""Trees as arrays say what XGBoost says, and what can't be one is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xgboost
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from tests.learners.tables import NOTHING, rows

from atoll import trees
from atoll.errors import LayoutError, LearnerError, PlanError
from atoll.learner import Data, Rows, summary
from atoll.learners import build
from atoll.learners.trees import export
from atoll.plan import Plan
from atoll.testing import check_learner


def plan(objective: str = "binary:logistic", rule: str = "bagging", rounds: int = 20, **options: Any) -> Plan:
    return Plan.of(
        {
            "plan": {"name": "t", "rounds": rounds},
            "model": {"trees": objective, "inputs": 6, "classes": [0, 1, 2], "options": {"max_depth": 3, **options}},
            "training": {"learning_rate": 0.3},
            "aggregation": {"rule": rule},
        }
    )


KINDS = {"binary:logistic": "binary", "multi:softprob": "three", "reg:squarederror": "number"}


@pytest.mark.parametrize(("objective", "kind"), KINDS.items())
def test_the_learner_passes_the_suite(objective, kind):
    more = {} if kind == "three" else {"base_score": 0.2}
    check_learner(lambda: build(plan(objective, **more)), Data(rows(kind), NOTHING))


def gappy(table: Rows) -> Rows:
    """Rows of which every fifth number isn't there, the more so of a class."""
    x = table.x.copy()
    x[np.random.default_rng(1).random(x.shape) < 0.1 + 0.3 * (table.y[:, None] > 0.5)] = np.nan
    return Rows(x, table.y)


@pytest.mark.parametrize("gaps", [False, True], ids=["whole", "gaps"])
@pytest.mark.parametrize(("objective", "kind"), KINDS.items())
@pytest.mark.parametrize("options", [{}, {"max_depth": 5, "gamma": 0.5, "reg_alpha": 0.2, "min_child_weight": 3}])
def test_it_is_xgboost_and_xgboost_reads_it(objective, kind, options, gaps, tmp_path):
    base = {"base_score": 0.5 if kind == "three" else 0.3}
    if kind != "three":
        options = {**options, **base}
    made, table = plan(objective, **options), gappy(rows(kind)) if gaps else rows(kind)
    learner = build(made)
    model = learner.initial(0)
    for seed in (1, 2):  # in two fits, as in two rounds
        model = learner.fit(model, table, 5, 1, np.random.default_rng(seed)).groups
    known = {"objective": objective, "eta": 0.3, "max_depth": 3, "tree_method": "hist", "nthread": 1, **base, **options}
    known |= {"num_class": 3} if kind == "three" else {}
    central = xgboost.train(known, xgboost.DMatrix(table.x, label=table.y), 10)
    said = central.predict(xgboost.DMatrix(table.x))
    np.testing.assert_allclose(learner.predict(model, table.x), said, atol=1e-5)
    assert model["splits"].arrays["missing"].any() == gaps
    export(made, model, tmp_path / "model.json")
    back = xgboost.Booster(model_file=tmp_path / "model.json")
    np.testing.assert_allclose(back.predict(xgboost.DMatrix(table.x)), said, atol=1e-5)
    assert back.num_boosted_rounds() == 10
    assert {f"f{k}": n for k, n in enumerate(model["counts"].arrays["splits"]) if n} == back.get_score(importance_type="weight")


def test_classes_are_judged_as_scikit_learn_judges_them():
    table = rows("three")
    made = plan("multi:softprob").with_(model={"metrics": ["f1_macro", "brier", "ece"], "classes": [3, 5, 9]})
    learner, table = build(made), Rows(table.x, np.array([3, 5, 9])[table.y.astype(int)])
    model = learner.fit(learner.initial(0), table, 3, 1, np.random.default_rng(0)).groups
    found, said = summary(learner.evaluate(model, table)), learner.predict(model, table.x)
    decided = np.array([3, 5, 9])[said.argmax(axis=1)]
    assert found["loss"] == pytest.approx(metrics.log_loss(table.y, said))
    assert found["accuracy"] == metrics.accuracy_score(table.y, decided)
    assert found["f1_macro"] == pytest.approx(metrics.f1_score(table.y, decided, average="macro"))
    with pytest.raises(LearnerError, match=r"the target 4 is none of the plan's classes 3, 5, 9: see model.classes"):
        learner.evaluate(model, Rows(table.x, np.full(len(table), 4.0)))


@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_rows_go_where_a_plain_walk_goes(depth, seed):
    rng = np.random.default_rng(seed)
    inner = (1 << depth) - 1
    feature, threshold = rng.integers(-1, 4, inner).astype(np.float32), rng.normal(size=inner).astype(np.float32)
    missing = rng.integers(0, 2, inner).astype(np.float32)
    x = rng.normal(size=(9, 4)).astype(np.float32)
    x[rng.random(x.shape) < 0.2] = np.nan
    for row, found in zip(x, trees.places(x, feature, threshold, missing), strict=True):
        at = 0
        for _ in range(depth):
            split = int(feature[at])
            right = not missing[at] if np.isnan(row[split]) else row[split] >= threshold[at]
            at = 2 * at + 1 + int(split >= 0 and right)
        assert found == at - inner


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("feature", 6, "splits feature 6 at"),
        ("feature", -2, "splits feature -2 at"),
        ("feature", 1.5, "splits feature 1.5 at"),
        ("feature", np.nan, "splits feature nan at"),
        ("feature", np.inf, "splits feature inf at"),
        ("threshold", np.nan, "at nan, missing to 0; there are features 0 to 5"),
        ("threshold", -np.inf, "at -inf"),
        ("missing", 2, "missing to 2; "),
        ("missing", np.nan, "missing to nan; "),
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
    array[(1, 0, 2) if array.ndim > 1 else 0] = value
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
            "model.trees: 'rank:pairwise' is not known; it is one of binary:logistic, multi:softprob, reg:sq",
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
        (
            {"model": {"trees": "multi:softprob", "options": {"base_score": 0.5}}},
            "model.options.base_score: trees have no such option with",
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
