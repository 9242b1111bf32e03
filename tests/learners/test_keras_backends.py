"""Keras on whichever backend `KERAS_BACKEND` names: the same suite, the same linear model, rows that stay on disk.

`make test-tensorflow` runs this file on TensorFlow, in an environment of its own.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")
import keras
from keras import layers

from atoll import learners
from atoll.errors import LearnerError
from atoll.learner import Data, Rows, summary
from atoll.learners.keras import export
from atoll.plan import Plan
from atoll.testing import check_learner

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own
NOTHING = Rows(np.zeros((0, 6)), np.zeros(0))


def rows(kind: str = "binary", count: int = 120) -> Rows:
    rng = np.random.default_rng(0)
    if kind == "pictures":
        x = rng.normal(size=(count, 8, 8, 1)).astype(np.float32)
        return Rows(x, (x[:, :4].sum(axis=(1, 2, 3)) > 0).astype(float))
    x = rng.normal(size=(count, 6)).astype(np.float32)
    score = x[:, 0] - 2 * x[:, 1] + 0.5 * x[:, 2]
    return Rows(x, (score > 0).astype(float) if kind == "binary" else np.digitize(score, [-1, 1]).astype(float))


def keras_plan(*stack: Any, shape: tuple[int, ...] = (6,), loss: str = "binary_crossentropy", **training: Any) -> Plan:
    model = keras.Sequential([keras.Input(shape), *stack])
    return Plan.of(
        {
            "plan": {"name": "k", "rounds": 1},
            "model": {"keras": json.loads(model.to_json()), "loss": loss},
            "training": {"learning_rate": 0.1, **training},
        }
    )


def out(units: int = 1, activation: str | None = "sigmoid", **options: Any) -> Any:
    return layers.Dense(units, activation=activation, **options)


TABLE = {
    "normalised, regularised, mixed precision": (
        lambda: keras_plan(
            layers.Normalization(mean=[0.5] * 6, variance=[2.0] * 6),
            layers.Dense(8, "relu", kernel_regularizer="l2", dtype="mixed_bfloat16"),
            out(dtype="mixed_bfloat16"),
        ),
        "binary",
    ),
    "pictures, flipped": (
        lambda: keras_plan(layers.RandomFlip("horizontal"), layers.Flatten(), out(), shape=(8, 8, 1)),
        "pictures",
    ),
}
if keras.backend.backend() != "jax":  # test_learners.py has these on JAX
    TABLE |= {
        "batch norm, dropout": (
            lambda: keras_plan(layers.Dense(8), layers.BatchNormalization(), layers.ReLU(), layers.Dropout(0.2), out()),
            "binary",
        ),
        "three classes": (lambda: keras_plan(out(3, "softmax"), loss="sparse_categorical_crossentropy"), "three"),
        "pictures": (lambda: keras_plan(layers.Conv2D(4, 3), layers.Flatten(), out(), shape=(8, 8, 1)), "pictures"),
    }


@pytest.mark.parametrize("name", TABLE)
def test_keras_passes_the_suite_on_this_backend(name):
    make, kind = TABLE[name]
    plan = make()
    check_learner(lambda: learners.build(plan), Data(rows(kind), NOTHING))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_a_step_is_the_optimisers_step_of_the_mean_gradient(optimizer):
    """One dense layer by hand: the mean gradient of the cross-entropy, and what each optimiser makes of it at first."""
    learner = learners.build(keras_plan(out(), optimizer=optimizer, batch_size=120))
    table = rows()
    start = learner.initial(0)
    fitted = learner.fit(start, table, 1, 120, np.random.default_rng(0)).groups
    kernel, bias = start["parameters"].arrays.values()
    missed = 1 / (1 + np.exp(-(table.x @ kernel + bias)))[:, 0] - table.y
    gradient = np.append(table.x.T @ missed, missed.sum()) / len(table)
    moved = fitted["parameters"].values - start["parameters"].values
    decay = 0.1 * 0.004 * start["parameters"].values if optimizer == "adamw" else 0.0
    step = {"sgd": gradient, "rmsprop": gradient / np.sqrt(0.1 * gradient**2 + 1e-7)}.get(optimizer, np.sign(gradient))
    np.testing.assert_allclose(moved, -0.1 * step - decay, rtol=2e-3, atol=2e-6)


def test_a_regulariser_pulls_on_the_weights():
    """0.5 · w² added to the loss: its gradient, w, is added to the gradient."""
    plain = learners.build(keras_plan(out(use_bias=False)))
    pulled = learners.build(keras_plan(out(use_bias=False, kernel_regularizer=keras.regularizers.L2(0.5))))
    start = plain.initial(0)
    moved = [
        one.fit(start, rows(), 1, 120, np.random.default_rng(0)).groups["parameters"].values - start["parameters"].values
        for one in (plain, pulled)
    ]
    np.testing.assert_allclose(moved[1] - moved[0], -0.1 * start["parameters"].values, rtol=1e-3, atol=1e-6)


def test_rows_that_are_mapped_from_a_file_are_read_by_batches_and_give_the_same_bits(tmp_path):
    table, asked = rows(), []

    class Mapped(np.memmap):
        def __getitem__(self, which: Any) -> Any:
            part = np.asarray(super().__getitem__(which))
            asked.append(len(part))
            return part

    np.save(tmp_path / "x.npy", table.x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r").view(Mapped)
    learner = learners.build(keras_plan(layers.Dense(4, "relu"), out()))
    start = learner.initial(0)
    fitted = [
        learner.fit(start, Rows(x, table.y), 20, 16, np.random.default_rng(0)).groups["parameters"] for x in (table.x, mapped)
    ]
    assert fitted[0] == fitted[1]
    assert max(asked) == 16


def test_a_model_is_exported_and_read_again(tmp_path):
    plan = keras_plan(layers.Dense(4, "relu"), layers.BatchNormalization(), out())
    learner = learners.build(plan)
    fitted = learner.fit(learner.initial(0), rows(), 20, 16, np.random.default_rng(0)).groups
    export(plan, fitted, tmp_path / "model.keras")
    back = learners.first(plan, learner, tmp_path / "model.keras")
    assert all(back[name] == fitted[name] for name in fitted)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    right = np.mean((loaded.predict(rows().x, verbose=0)[:, 0] >= 0.5) == rows().y)
    assert right == summary(learner.evaluate(fitted, rows()))["accuracy"]


@pytest.mark.parametrize(
    ("stack", "said"),
    [
        ([out(dtype="bfloat16")], "is bfloat16; weights travel as float32: for mixed precision use the dtype policy mixed_bf"),
        ([layers.Flatten()], "the model has no weights to train"),
    ],
)
def test_weights_that_cannot_travel_are_said_in_one_line(stack, said):
    with pytest.raises(LearnerError) as caught:
        learners.build(keras_plan(*stack))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
