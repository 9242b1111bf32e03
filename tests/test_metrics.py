"""Global metrics: what nodes add up gives what scikit-learn gives on the pooled table, however the rows are spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve
from tests.federation import plan, rows, run
from tests.learners import tables
from tests.learners.pooling import check_judged, spreads
from tests.learners.test_jax import jax_plan
from tests.learners.test_learners import keras_plan, out

from atoll import learners
from atoll.errors import LearnerError, PlanError
from atoll.learner import Rows, classified, pooled, regressed, summary
from atoll.metrics import BINS, CHANCES, KNOWN, counting, figures, names, reliability
from atoll.plan import Plan
from atoll.simulate import simulate
from atoll.wire import METRICS_LIMIT

TWO = ("auc", "f1_macro", "precision_macro", "recall_macro", "brier", "ece")
MANY = TWO[1:]


def everywhere(parts: np.ndarray, sums: Any) -> dict[str, float]:
    """The figures of all nodes' sums, added."""
    return figures(pooled(sums(parts == node) for node in np.unique(parts)))


def ece(chances: np.ndarray, hits: np.ndarray) -> float:
    """Guo et al. 2017, eq. 3, over all rows at once."""
    bins = np.minimum((chances * CHANCES).astype(int), CHANCES - 1)
    return sum((bins == k).mean() * abs(hits[bins == k].mean() - chances[bins == k].mean()) for k in np.unique(bins))


def macro(y: np.ndarray, said: np.ndarray) -> dict[str, float]:
    found = reference.precision_recall_fscore_support(y, said, average="macro", zero_division=0)
    return dict(zip(("precision_macro", "recall_macro", "f1_macro"), map(float, found), strict=False))


@pytest.mark.parametrize("spread", [0.01, 0.3, 3.0])
def test_two_classes_are_judged_as_the_pooled_table(spread):
    rng = np.random.default_rng(1)
    y = (rng.random(600) < 0.3).astype(int)
    logits = spread * (rng.normal(size=600) + 1.5 * y - 0.7)
    chances, said = 1 / (1 + np.exp(-logits)), (logits >= 0).astype(int)
    count = counting(TWO, "binary", (0, 1))
    expected = {
        "accuracy": reference.accuracy_score(y, said),
        "precision": reference.precision_score(y, said),
        "recall": reference.recall_score(y, said),
        "f1": reference.f1_score(y, said),
        "brier": reference.brier_score_loss(y, chances),
        "ece": ece(chances, y),
        **macro(y, said),
    }
    for parts in spreads(y):
        found = everywhere(parts, lambda mine: {**classified(0.0, said[mine], y[mine], two=True), **count(logits[mine], y[mine])})
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
        assert abs(found["auc"] - reference.roc_auc_score(y, logits)) <= found["auc_within"] < 0.007


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.floats(-1e4, 1e4) | st.floats(-0.1, 0.1)), min_size=2, max_size=60).filter(
        lambda made: len({y for y, _ in made}) == 2
    )
)
def test_auc_is_never_further_off_than_it_says(made):
    y, logits = np.array([row[0] for row in made], int), np.array([row[1] for row in made])
    found = figures({"samples": float(len(y)), **counting(["auc"], "binary", (0, 1))(logits, y)})
    assert abs(found["auc"] - reference.roc_auc_score(y, logits)) <= found["auc_within"] + 1e-12


def test_how_far_off_auc_is_with_logits_as_models_give_them():
    """Logits of a standard deviation from 0.05 to 20: off by less than 0.0005, and sure to be within 0.003."""
    rng = np.random.default_rng(2)
    y = (rng.random(20_000) < 0.3).astype(int)
    for spread in (0.05, 0.2, 1.0, 5.0, 20.0):
        logits = spread * (rng.normal(size=len(y)) + y - 0.5)
        found = figures({"samples": float(len(y)), **counting(["auc"], "binary", (0, 1))(logits, y)})
        assert found["auc_within"] < 0.003
        assert abs(found["auc"] - reference.roc_auc_score(y, logits)) < 0.0005


def test_many_classes_are_judged_as_the_pooled_table():
    rng = np.random.default_rng(3)
    labels = (2, 3, 5, 7, 9)  # of which one never occurs
    y = rng.choice(labels[:4], 500)
    logits = rng.normal(size=(500, 5)) + 1.5 * (y[:, None] == labels)
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    said = np.array(labels)[logits.argmax(axis=1)]
    count = counting(MANY, "classes", labels)
    expected = {
        "brier": float(np.mean(((chances - (y[:, None] == labels)) ** 2).sum(axis=1))),
        "ece": ece(chances.max(axis=1), said == y),
        "accuracy": reference.accuracy_score(y, said),
        **macro(y, said),
    }
    for parts in spreads(y):
        found = everywhere(
            parts, lambda mine: {**classified(0.0, said[mine], y[mine], two=False), **count(logits[mine], y[mine])}
        )
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_nodes_that_hold_two_classes_of_many_make_no_precision_of_their_own():
    learner = learners.build(Plan.of({**SKLEARN, "model": {"sklearn": "SGDClassifier", "inputs": 6, "classes": [0, 1, 2]}}))
    x, y = tables.rows("three")
    sums = [learner.evaluate(learner.initial(0), Rows(x[mine], y[mine])) for mine in (y < 2, y == 2)]
    assert "precision" not in summary(pooled(sums))
    assert "accuracy" in summary(pooled(sums))


def test_numbers_are_judged_as_the_pooled_table_also_far_from_zero():
    rng = np.random.default_rng(4)
    y = (2000 + rng.normal(size=400)).astype(np.float32)
    predicted = (y + rng.normal(size=400)).astype(np.float32)
    expected = {
        "r2": reference.r2_score(y.astype(float), predicted.astype(float)),
        "root_mean_squared_error": reference.root_mean_squared_error(y.astype(float), predicted.astype(float)),
        "mean_squared_error": reference.mean_squared_error(y.astype(float), predicted.astype(float)),
        "mean_absolute_error": reference.mean_absolute_error(y.astype(float), predicted.astype(float)),
    }
    for parts in spreads(np.arange(400) % 4):
        found = everywhere(parts, lambda mine: regressed(0.0, predicted[mine], y[mine]))
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-7)


def c_index(y: np.ndarray, predicted: np.ndarray) -> float:
    """Harrell et al. 1982, pair by pair."""
    earlier = y[:, None] < y
    ahead = predicted - predicted[:, None]
    return float(((ahead > 0) + (ahead == 0) / 2)[earlier].mean())


def test_the_c_index_is_that_of_the_pooled_table_within_what_it_says():
    rng = np.random.default_rng(6)
    count = counting(["c_index"], "numbers", (0, 1), (-3.0, 3.0))
    for noise in (0.1, 1.0, 5.0):
        y = rng.uniform(-3, 3, 2000)
        predicted = y + noise * rng.normal(size=len(y))
        expected = c_index(y, predicted)
        for parts in spreads(np.arange(2000) % 3):
            found = everywhere(parts, lambda mine: {"samples": float(mine.sum()), **count(predicted[mine], y[mine])})  # noqa: B023
            assert abs(found["c_index"] - expected) < 0.01
            assert abs(found["c_index"] - expected) <= found["c_index_within"] < 0.15


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.floats(-5, 50)), min_size=2, max_size=40).filter(
        lambda made: len({y for y, _ in made}) > 1
    )
)
def test_the_c_index_is_never_further_off_than_it_says(made):
    y, predicted = np.array([row[0] for row in made], float), np.array([row[1] for row in made])
    found = figures({"samples": float(len(y)), **counting(["c_index"], "numbers", (0, 1), (0.0, 64.0))(predicted, y)})
    assert abs(found["c_index"] - c_index(y, predicted)) <= found["c_index_within"] + 1e-12


def test_the_reliability_curve_is_that_of_the_pooled_table():
    rng = np.random.default_rng(5)
    logits = rng.normal(size=900) * 2
    y = (rng.random(900) < 1 / (1 + np.exp(-logits / 2))).astype(int)  # twice as sure as it should be
    count = counting(["ece"], "binary", (0, 1))
    curve = reliability(pooled(count(logits[mine], y[mine]) for mine in (y == 0, y == 1)))
    seen, said = calibration_curve(y, 1 / (1 + np.exp(-logits)), n_bins=CHANCES)
    assert [one["chance"] for one in curve] == pytest.approx(said)
    assert [one["seen"] for one in curve] == pytest.approx(seen)
    assert sum(one["rows"] for one in curve) == 900


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4))
def test_no_node_has_a_sum_that_was_not_announced(seed, many):
    rng = np.random.default_rng(seed)
    labels, task = tuple(range(many)), "classes"
    y, logits = rng.integers(0, many, 30), rng.normal(size=(30, many)) * 10.0 ** rng.integers(-3, 3)
    asked = TWO if many == 2 else MANY
    announced = names(asked, labels)
    assert counting(asked, task, labels)(logits, y).keys() <= set(announced)
    assert len(announced) == len(set(announced)) < METRICS_LIMIT
    assert len(announced) == 1 + 3 * many + 3 * CHANCES + (2 * BINS if many == 2 else 0)


SKLEARN: dict[str, Any] = {"plan": {"name": "s", "rounds": 1}, "training": {"batch_size": 16, "learning_rate": 0.1}}
LEARNERS = {
    "logistic": lambda: plan(model={"inputs": 6}),
    "sklearn log loss": lambda: Plan.of({**SKLEARN, "model": sgd("log_loss")}),
    "sklearn perceptron": lambda: Plan.of({**SKLEARN, "model": {"sklearn": "MLPClassifier", "inputs": 6}}),
    "keras chances": lambda: keras_plan(out()),
    "keras two chances": lambda: keras_plan(out(2, "softmax"), loss="sparse_categorical_crossentropy"),
    "jax": lambda: jax_plan("linear"),
    "jax two classes": lambda: jax_plan("linear", "softmax_cross_entropy_with_integer_labels", outputs=2),
}


def sgd(loss: str) -> dict[str, Any]:
    return {"sklearn": "SGDClassifier", "inputs": 6, "options": {"loss": loss}}


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_is_judged_as_scikit_learn_judges_its_outputs(name):
    check_judged(LEARNERS[name](), logits=name.startswith("jax"))


def test_scores_without_chances_have_an_auc_and_no_calibration():
    agreed = Plan.of({**SKLEARN, "model": sgd("hinge")})
    learner = learners.build(agreed.with_(model={"metrics": ["auc", "f1"]}))
    x, y = tables.rows("binary")
    sums = learner.evaluate(learner.fit(learner.initial(0), Rows(x, y), 20, 16, np.random.default_rng(0)).groups, Rows(x, y))
    assert figures(sums)["auc"] > 0.9
    with pytest.raises(PlanError, match="'brier' needs chances, and this loss gives scores alone"):
        learners.build(agreed.with_(model={"metrics": ["brier"]}))


@pytest.mark.parametrize(
    ("agreed", "metric", "said"),
    [
        (lambda: jax_plan("linear", "squared_error"), "auc", r"'auc' is of no model of numbers; such a one knows loss, mean_sq"),
        (lambda: keras_plan(out(1, "linear"), loss="mean_squared_error"), "accuracy", "'accuracy' is of no model of numbers"),
        (plan, "r2", "'r2' is of no model of two classes; such a one knows loss, accuracy"),
        (lambda: jax_plan("linear", "squared_error"), "c_index", r"say between what they lie, model.range = \[low, high\]"),
        (lambda: jax_plan("own_loss", None), "auc", "the model brings a loss of its own"),
        (
            lambda: keras_plan(out(3, "softmax"), loss="sparse_categorical_crossentropy").with_(model={"classes": [0, 1, 2]}),
            "f1",
            "'f1' is of no model of 3 classes; such a one knows loss, accuracy, f1_macro",
        ),
        (plan, "acuracy", r"'acuracy' is not known; did you mean 'accuracy'\?"),
        (plan, "rmse", r"did you mean 'root_mean_squared_error'\?"),
        (plan, "zzz", "known: loss, accuracy, precision"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused_by_name_before_anything_runs(agreed, metric, said):
    def build():
        made = agreed().with_(model={"metrics": [metric]})
        learners.build(made, allow=made.model.functions)

    with pytest.raises(PlanError, match=said) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_outputs_that_are_no_numbers_and_targets_that_are_no_classes_are_named():
    count = counting(TWO, "binary", (0, 1))
    with pytest.raises(LearnerError, match="the model's outputs are NaN for 1 of 3 rows"):
        count(np.array([0.0, np.nan, 1.0]), np.array([0, 1, 1]))
    with pytest.raises(LearnerError, match="the target 2 is none of the plan's classes"):
        count(np.array([0.0, 1.0]), np.array([0, 2]))
    with pytest.raises(LearnerError, match=r"gives 3 scores a row.*say model.classes = \[0, 1, 2\]"):
        counting(MANY, "classes", (0, 1))(np.zeros((2, 3)), np.array([0, 1]))
    sure = figures({"samples": 2.0, **count(np.array([-np.inf, np.inf]), np.array([0, 1]))})
    assert sure["auc"] == 1
    assert sure["brier"] == sure["ece"] == 0


def test_of_one_class_there_is_no_auc_and_of_no_rows_there_is_nothing():
    assert "auc" not in figures({"samples": 3.0, **counting(["auc"], "binary", (0, 1))(np.zeros(3), np.ones(3))})
    assert figures({}) == {}
    assert figures({"samples": 0.0, "loss": 0.0}) == {}


def lopsided() -> dict[str, Any]:
    """Three nodes: one of ten rows of both classes, two of one class each; one of them tests on its training rows."""
    x, y = rows(1, 200)
    mixed, test = rows(2, 10), rows(3, 30)
    return {
        "node-0": (*mixed, *test),
        "node-1": (x[y == 1], y[y == 1], *(part[:7] for part in (x[y == 1], y[y == 1]))),
        "node-2": (x[y == 0], y[y == 0]),
    }


@pytest.mark.parametrize("how", ["map", "pool", "deployed", "scan", "vmap"])
def test_a_run_is_judged_as_the_pooled_table_and_stops_by_it(how, tmp_path):
    asked = ["auc", "f1", "ece", "brier"]
    watched = {"metric": "auc", "patience": 2, "min_delta": 1.0}
    agreed = plan(plan={"rounds": 4}, model={"metrics": asked}, stopping=watched)
    if how in ("scan", "vmap"):
        values = agreed.model_dump(mode="json")
        model = jax_plan("linear", inputs=4).model.model_dump(mode="json")
        agreed = Plan.of({**values, "model": {**model, "metrics": asked}})
    data = lopsided()
    if how == "deployed":
        history = run(agreed, data, tmp_path)
        seen_, reason, count = history["rounds"][1]["nodes"], history["reason"], len(history["rounds"])
        assert history["metrics"] == asked
        assert sum(one["rows"] for one in history["reliability"]) == 30 + 7 + len(data["node-2"][0])
    else:
        done = simulate(agreed, data, strategy=how, allow=agreed.model.functions)
        seen_, reason, count = done.rounds[2]["nodes"], done.reason, len(done.rounds)
    assert "no better auc" in reason
    assert count == 3
    # The third round's nodes judged the model of the second.
    learner = learners.build(agreed, allow=agreed.model.functions)
    model = simulate(agreed.with_(plan={"rounds": 2}), data, allow=agreed.model.functions).model
    judged = [Rows(*one[2:]) if len(one) > 2 else Rows(*one) for one in data.values()]
    whole = Rows(np.concatenate([one.x for one in judged]), np.concatenate([one.y for one in judged]))
    expected = summary(learner.evaluate(model, whole))
    assert {name: seen_[name] for name in asked} == pytest.approx({name: expected[name] for name in asked}, abs=1e-4)


def test_every_known_metric_is_in_the_docs():
    pages = [(Path(__file__).parents[1] / "docs" / page).read_text() for page in ("how-to/metrics.md", "plan.md")]
    assert [name for name in KNOWN for page in pages if f"`{name}`" not in page] == []
