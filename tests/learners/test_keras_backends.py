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
from atoll.errors import LearnerError, PlanError
from atoll.learner import Data, PerExample, Rows, summary
from atoll.learners.keras import export
from atoll.method import find
from atoll.plan import Plan
from atoll.privacy.dp.clip import STEPS
from atoll.simulate import simulate
from atoll.testing import check_learner

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own
NOTHING = Rows(np.zeros((0, 6)), np.zeros(0))


def rows(kind: str = "binary", count: int = 120) -> Rows:
    rng = np.random.default_rng(0)
    if kind == "pictures":
        x = rng.normal(size=(count, 8, 8, 1)).astype(np.float32)
        return Rows(x, (x[:, :4].sum(axis=(1, 2, 3)) > 0).astype(float))
    if kind == "words":
        words = rng.integers(0, 20, (count, 6))
        return Rows(words, (words[:, 0] > 9).astype(float))
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


BY_ROW = {
    "three classes": (lambda: [layers.Dense(5, "tanh"), out(3, "softmax")], "three", {"loss": "sparse_categorical_crossentropy"}),
    "regularised, dropout of nothing": (lambda: [layers.Dense(5, "relu", kernel_regularizer="l2"), layers.Dropout(0.0), out()],
                                        "binary", {}),
    "convolutions": (
        lambda: [layers.Conv2D(4, 3), layers.GroupNormalization(2), layers.MaxPooling2D(), layers.Flatten(), out()],
        "pictures", {"shape": (8, 8, 1)},
    ),
    "an embedding": (lambda: [layers.Embedding(20, 4), layers.Flatten(), out()], "words", {}),
    "a recurrent layer": (lambda: [layers.Embedding(20, 4), layers.GRU(4), out()], "words", {}),
    "a last layer alone": (lambda: [frozen(layers.Dense(5, "tanh")), frozen(layers.BatchNormalization()), out()], "binary", {}),
    "neighbours in a batch": (lambda: [layers.Dense(5), layers.UnitNormalization(axis=0), out()], "binary", {}),
}  # fmt: skip
"""The last one mixes the rows of a batch: of one row there is nothing to mix."""


def frozen(layer: Any) -> Any:
    layer.trainable = False
    return layer


@pytest.mark.parametrize("name", BY_ROW)
def test_gradients_of_single_rows_are_bounded_and_added_up(name):
    stack, kind, options = BY_ROW[name]
    learner, table = learners.build(keras_plan(*stack(), **options)), rows(kind, 8)
    assert isinstance(learner, PerExample)
    assert learner.moving == ()
    groups = learner.initial(0)
    before = groups["parameters"].values.astype(float)
    alone = [Rows(table.x[k : k + 1], table.y[k : k + 1]) for k in range(len(table))]
    moved = [learner.fit(groups, one, 1, 1, np.random.default_rng(0)).groups["parameters"].values for one in alone]
    single = (before - np.array(moved)) / 0.1
    lengths = np.linalg.norm(single, axis=1, keepdims=True)
    bound = float(np.median(lengths))
    expected = (single * np.minimum(1, bound / lengths)).sum(axis=0)
    found = learner.clipped(groups, table, bound, STEPS) * bound / STEPS
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 + 1e-4 * bound * len(table))
    some = [learner.clipped(groups, Rows(table.x[:many], table.y[:many]), bound / 1e3, STEPS) for many in (8, 7)]
    assert np.linalg.norm(some[0] - some[1]) <= STEPS
    if kind != "words":
        huge = table.x.copy()
        huge[3] *= 1e6
        with_it = learner.clipped(groups, Rows(huge, table.y), bound / 1e3, STEPS)
        without = learner.clipped(groups, Rows(np.delete(huge, 3, 0), np.delete(table.y, 3)), bound / 1e3, STEPS)
        assert np.linalg.norm(with_it - without) <= STEPS


def test_each_row_drops_out_other_units():
    learner = learners.build(keras_plan(layers.Dense(40, "relu"), layers.Dropout(0.5), out()))
    table = rows(count=1)
    twice = Rows(np.repeat(table.x, 2, axis=0), np.repeat(table.y, 2))
    sums = [learner.clipped(learner.initial(0), twice, 1e-3, STEPS) for _ in range(2)]
    assert not np.array_equal(*sums), "from call to call"
    assert any(one % 2 for one in sums[0]), "and from row to row: not twice the same"


def test_training_with_noise_for_each_row():
    noise = {"example_noise": {"multiplier": 0.5, "delta": 1e-3, "clip": 1.0}}
    plan = keras_plan(frozen(layers.Dense(6, "tanh")), out(), epochs=5, batch_size=40, learning_rate=0.5).with_(privacy=noise)
    table = rows(count=400)
    data = {name: (table.x[k::2], table.y[k::2]) for k, name in enumerate("ab")}
    runs = [simulate(one, data, holdout=table) for one in (plan, plan)]
    assert runs[0].digest != runs[1].digest
    assert min(run.holdout["accuracy"] for run in runs) > 0.6
    kept = learners.build(plan).initial(plan.plan.seed)["buffers"]
    assert runs[0].model["buffers"] == kept, "a frozen layer is the server's"


@pytest.mark.parametrize(
    ("stack", "said"),
    [
        ([layers.BatchNormalization(), out()], "training changes 'sequential[^']*/batch_normalization[^']*/moving_mean'"),
        ([layers.SpectralNormalization(layers.Dense(3)), out()], "training changes '.*vector_u'"),
    ],
)
def test_what_training_changes_beside_weights_is_refused_under_noise(stack, said):
    noise = {"example_noise": {"multiplier": 0.5, "delta": 1e-3, "clip": 1.0}}
    plan = keras_plan(*stack).with_(privacy=noise)
    with pytest.raises(PlanError, match=said):
        find(plan, learners.build(plan))


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
