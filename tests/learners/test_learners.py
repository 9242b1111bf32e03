"""Every learner passes the one suite, and all of them fit the same linear model."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")
import keras
from keras import layers
from tests.learners.tables import NOTHING, rows

from atoll import learners
from atoll.errors import LearnerError, PlanError
from atoll.learner import Data, Rows, summary
from atoll.learners.keras import export
from atoll.plan import Plan
from atoll.testing import check_learner


def keras_plan(*stack: Any, shape: tuple[int, ...] = (6,), loss: str = "binary_crossentropy", **training: Any) -> Plan:
    model = keras.Sequential([keras.Input(shape), *stack])
    return Plan.of(
        {
            "plan": {"name": "k", "rounds": 1},
            "model": {"keras": json.loads(model.to_json()), "loss": loss},
            "training": {"learning_rate": 0.1, **training},
        }
    )


def sklearn_plan(name: str, classes: tuple[int, ...] = (0, 1), training: Any = None, **options: Any) -> Plan:
    return Plan.of(
        {
            "plan": {"name": "s", "rounds": 1},
            "model": {"sklearn": name, "inputs": 6, "classes": classes, "options": options},
            "training": {"learning_rate": 0.05, **(training or {})},
        }
    )


LOGISTIC = Plan.of(
    {"plan": {"name": "l", "rounds": 1}, "model": {"logistic": True, "inputs": 6}, "training": {"learning_rate": 0.1}}
)


def out(units: int = 1, activation: str | None = "sigmoid") -> Any:
    return layers.Dense(units, activation=activation)


TABLE = {
    "logistic": (lambda: LOGISTIC, "binary"),
    "keras dense": (lambda: keras_plan(layers.Dense(8, "relu"), out()), "binary"),
    "keras batch norm, dropout": (
        lambda: keras_plan(layers.Dense(8), layers.BatchNormalization(), layers.ReLU(), layers.Dropout(0.2), out()),
        "binary",
    ),
    "keras three classes": (lambda: keras_plan(out(3, "softmax"), loss="sparse_categorical_crossentropy"), "three"),
    "keras regression": (lambda: keras_plan(out(1, None), loss="mean_squared_error"), "number"),
    "keras words": (lambda: keras_plan(layers.Embedding(20, 4), layers.Flatten(), out()), "words"),
    "keras pictures": (
        lambda: keras_plan(layers.Conv2D(4, 3), layers.Flatten(), out(), shape=(8, 8, 1)),
        "pictures",
    ),
    "SGDClassifier": (lambda: sklearn_plan("SGDClassifier", loss="log_loss"), "binary"),
    "SGDClassifier hinge, three classes": (lambda: sklearn_plan("SGDClassifier", (0, 1, 2)), "three"),
    "LogisticRegression": (lambda: sklearn_plan("LogisticRegression", training={"steps": 9}), "binary"),
    "MLPClassifier": (lambda: sklearn_plan("MLPClassifier", hidden_layer_sizes=[8]), "binary"),
    "MLPClassifier, plain steps": (lambda: sklearn_plan("MLPClassifier", hidden_layer_sizes=[8], momentum=0), "binary"),
    "MLPClassifier adam": (lambda: sklearn_plan("MLPClassifier", (0, 1, 2), {"optimizer": "adam"}), "three"),
    "SGDRegressor": (lambda: sklearn_plan("SGDRegressor"), "number"),
    "MLPRegressor": (lambda: sklearn_plan("MLPRegressor", hidden_layer_sizes=[8]), "number"),
}


@pytest.mark.parametrize("name", TABLE)
def test_every_learner_passes_the_suite(name):
    make, kind = TABLE[name]
    plan = make()
    check_learner(lambda: learners.build(plan), Data(rows(kind), NOTHING))


def test_all_train_the_same_linear_model():
    """To convergence, on rows that overlap: every learner ends at the same mean log loss, within 0.1 %."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 6))
    y = (x @ [1, -1, 0.5, 0, 0, 0] + rng.logistic(size=200) > 0).astype(float)
    table = Rows(x, y)
    plans = {
        "logistic": LOGISTIC,
        "keras": keras_plan(out()),
        "SGDClassifier": sklearn_plan("SGDClassifier", loss="log_loss", penalty=None, training={"learning_rate": 0.001}),
        "LogisticRegression": sklearn_plan("LogisticRegression", C=1e9, training={"steps": 200}),
    }
    losses = {}
    for name, plan in plans.items():
        learner = learners.build(plan)
        batch = 50 if name == "SGDClassifier" else 200
        fitted = learner.fit(learner.initial(0), table, 3000, batch, np.random.default_rng(0)).groups
        losses[name] = summary(learner.evaluate(fitted, table))["loss"]
    best = min(losses.values())
    assert all(loss <= best * 1.001 for loss in losses.values()), losses


def test_batch_norm_statistics_are_buffers_and_random_state_is_in_no_group():
    learner = learners.build(keras_plan(layers.Dense(8), layers.BatchNormalization(), layers.Dropout(0.5), out()))
    names = {name: [tensor.name for tensor in layout.tensors] for name, layout in learner.layouts.items()}
    assert all("moving_" in name for name in names["buffers"])
    assert len(names["buffers"]) == 2
    assert not any("seed" in name for group in names.values() for name in group)
    start = learner.initial(0)
    fitted = learner.fit(start, rows("binary"), 10, 16, np.random.default_rng(0)).groups
    assert not np.array_equal(fitted["buffers"].values, start["buffers"].values)


def test_frozen_layers_are_buffers_that_stay():
    frozen = layers.Dense(8, name="frozen", trainable=False)
    learner = learners.build(keras_plan(frozen, out()))
    start = learner.initial(0)
    fitted = learner.fit(start, rows("binary"), 10, 16, np.random.default_rng(0)).groups
    assert learner.layouts["buffers"].size == 56
    assert fitted["buffers"] == start["buffers"]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_an_exported_model_predicts_as_the_learner_does(tmp_path):
    plan = keras_plan(layers.Dense(8, "relu"), layers.BatchNormalization(), out())
    learner = learners.build(plan)
    table = rows("binary")
    fitted = learner.fit(learner.initial(0), table, 20, 16, np.random.default_rng(0)).groups
    export(plan, fitted, tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    right = np.mean((loaded.predict(table.x, verbose=0)[:, 0] >= 0.5) == table.y)
    assert right == summary(learner.evaluate(fitted, table))["accuracy"]


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (lambda: keras_plan(out(), optimizer="sgdd"), "training.optimizer: 'sgdd' is not known; it is one of sgd, adam"),
        (lambda: keras_plan(out(), loss="binary"), "model.loss: 'binary' is not known"),
        (lambda: keras_plan(out(), options={"momentun": 0.9}), "momentun"),
        (lambda: sklearn_plan("LinearRegression"), "no partial_fit): use SGDRegressor"),
        (lambda: sklearn_plan("SGDClassifier", los="log_loss"), "has no such option; did you mean 'loss'?"),
        (lambda: sklearn_plan("MLPClassifier", hidden_layer_sizes=[4, "x"]), "hidden_layer_sizes: is a list of whole numbers"),
        (lambda: sklearn_plan("SGDClassifier", n_jobs=99), "model.options.n_jobs: SGDClassifier has no such option"),
        (lambda: sklearn_plan("SGDClassifier", eta0=1.0), "model.options.eta0: [training] says it already"),
        (lambda: sklearn_plan("SGDClassifier", training={"optimizer": "adam"}), "SGDClassifier knows sgd, not 'adam'"),
        (lambda: sklearn_plan("LogisticRegression", training={"epochs": 1}), "say training.steps"),
        (lambda: sklearn_plan("SGDClassifier", loss="log"), "loss"),
        (lambda: LOGISTIC.with_(model={"inputs": None}), "model.inputs: is missing"),
        (lambda: LOGISTIC.with_(training={"optimizer": "adam"}), "logistic knows 'sgd', not 'adam'"),
        (lambda: LOGISTIC.with_(training={"precision": "bfloat16"}), "training.precision: logistic trains in float32 only"),
    ],
)
def test_what_a_learner_cannot_do_is_said_by_the_plan(plan, said):
    with pytest.raises(PlanError) as caught:
        learners.build(plan())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_old_a_keras_is_refused(monkeypatch):
    monkeypatch.setattr(keras, "__version__", "3.13.1")
    with pytest.raises(LearnerError, match=r"upgrade to 3\.13\.2"):
        learners.build(keras_plan(out()))


def test_a_missing_framework_names_its_extra(monkeypatch):
    def missing(name: str) -> None:
        raise ModuleNotFoundError("no", name="keras")

    monkeypatch.setattr(learners, "import_module", missing)
    with pytest.raises(LearnerError, match=r"keras is not installed; pip install 'atoll-fl\[keras\]'"):
        learners.build(keras_plan(out()))


def test_another_learning_rate_compiles_nothing_anew():
    learner = learners.build(keras_plan(layers.Dense(4), out()))
    start, table = learner.initial(0), rows("binary")
    for rate in (1.0, 0.5, 0.25):
        learner.fit(start, table, 2, 16, np.random.default_rng(0), rate=rate)
    assert learner._engine._step._cache_size() == 1


def test_a_learner_without_a_learning_rate_says_so():
    learner = learners.build(sklearn_plan("LogisticRegression", training={"steps": 9}))
    with pytest.raises(LearnerError, match="LogisticRegression has no learning rate to change: use SGDClassifier"):
        learner.fit(learner.initial(0), rows("binary"), 9, 16, np.random.default_rng(0), rate=0.5)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"logistic": True, "inputs": 10**13}, "each of 10,000,000,000,000 inputs, and its gradient, take 160,000 GB"),
        ({"sklearn": "SGDClassifier", "inputs": 10**12}, "a weight for each of 1,000,000,000,000 inputs"),
        (
            {"sklearn": "MLPClassifier", "inputs": 6, "options": {"hidden_layer_sizes": [10**6, 10**6]}},
            "1,000,008,000,000 weights and their gradient take 16,000 GB",
        ),
    ],
)
def test_a_model_that_cannot_fit_into_memory_is_one_line(model, said):
    with pytest.raises(LearnerError) as caught:
        learners.build(Plan.of({"plan": {"name": "x", "rounds": 1}, "model": model}))
    assert said in str(caught.value)
    assert "this machine has" in str(caught.value)
