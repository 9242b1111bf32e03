"""What a Keras model's JSON may hold: everything harmless passes and builds, everything else is refused by name."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

os.environ.setdefault("KERAS_BACKEND", "jax")
import keras
from keras import layers

from atoll.errors import PlanError
from atoll.learners import keras_allowed


def sequential(*stack: Any, shape: tuple[int | None, ...] = (6,)) -> dict[str, Any]:
    return json.loads(keras.Sequential([keras.Input(shape), *stack]).to_json())


def branches() -> dict[str, Any]:
    left, right = keras.Input((4,)), keras.Input((4,))
    both = layers.Concatenate()([layers.Dense(3, "tanh")(left), layers.Dense(3, "gelu")(right)])
    return json.loads(keras.Model([left, right], layers.Dense(1)(both)).to_json())


HARMLESS = {
    "dense": lambda: sequential(
        layers.Dense(4, "relu", kernel_regularizer="l2", kernel_constraint="max_norm", kernel_initializer="he_normal"),
        layers.LayerNormalization(),
        layers.Dense(1),
    ),
    "pictures": lambda: sequential(
        layers.Conv2D(4, 3), layers.BatchNormalization(), layers.MaxPooling2D(), layers.GlobalAveragePooling2D(), shape=(8, 8, 1)
    ),
    "words": lambda: sequential(layers.Embedding(9, 4), layers.Bidirectional(layers.LSTM(3)), layers.Dense(1), shape=(None,)),
    "series": lambda: sequential(layers.GRU(3, return_sequences=True), layers.TimeDistributed(layers.Dense(1)), shape=(5, 2)),
    "attention": lambda: json.loads(keras.Model(x := keras.Input((5, 4)), layers.MultiHeadAttention(2, 2)(x, x)).to_json()),
    "branches": branches,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_models_pass_and_build(name):
    model = HARMLESS[name]()
    keras_allowed.check(model)
    assert keras.models.model_from_json(json.dumps(model)).count_params() > 0


def test_every_listed_layer_is_one_of_keras():
    assert {name for name in keras_allowed.LAYERS if not hasattr(layers, name)} == set()


def test_every_listed_activation_is_one_of_keras():
    assert {name for name in keras_allowed.ACTIVATIONS if not hasattr(keras.activations, name)} == set()


def with_layer(name: str, /, module: str | None = "keras.layers", registered: str | None = None, **config: Any) -> dict[str, Any]:
    model = sequential(layers.Dense(1))
    layer = {"module": module, "class_name": name, "config": config, "registered_name": registered}
    model["config"]["layers"].append(layer)
    return model


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: with_layer("Lambda", function={"class_name": "__lambda__", "config": {"code": "aGk="}}), "Lambda"),
        (lambda: with_layer("TorchModuleWrapper", module_="x"), "TorchModuleWrapper"),
        (lambda: with_layer("TFSMLayer", filepath="/etc/passwd"), "TFSMLayer"),
        (lambda: with_layer("JaxLayer"), "JaxLayer"),
        (lambda: with_layer("FlaxLayer"), "FlaxLayer"),
        (lambda: with_layer("Dense", module="os"), "os.Dense"),
        (lambda: with_layer("Dense", module=None), "None.Dense"),
        (lambda: with_layer("Dense", registered="mine>Dense", units=1), "custom objects ('mine>Dense')"),
        (lambda: with_layer("system", module="builtins"), "system"),
        (lambda: with_layer("function", module="builtins", registered="function"), "function"),
        (lambda: with_layer("Dense", units=1, activation="os.system"), "activation 'os.system'"),
        (lambda: with_layer("Dense", units=1, activation={"module": "builtins", "class_name": "function"}), "function"),
        (lambda: with_layer("StringLookup", vocabulary="/etc/passwd"), "StringLookup"),
        (lambda: with_layer("Embedding", input_dim=1, output_dim=1, weights="/etc/passwd"), "loads a file"),
        (lambda: with_layer("Dense", units=1, name="http://evil"), "loads a file"),
        (lambda: with_layer("Dense", units=1, kernel_initializer={"class_name": "__tensor__", "__tensor__": 1}), "__tensor__"),
        (lambda: {"class_name": "Model", "config": {}}, "a 'Model' can't be sent"),
        (dict, "can't be sent"),
    ],
)
def test_what_could_run_code_or_read_files_is_refused_by_name(model, said):
    with pytest.raises(PlanError) as caught:
        keras_allowed.check(model())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda v: st.lists(v) | st.dictionaries(st.text(max_size=8), v),
)


@given(json_values, st.sampled_from(["class_name", "module", "config", "registered_name", "layers"]))
def test_no_json_makes_the_check_fail_in_another_way(value, key):
    model = copy.deepcopy(BASE)
    model["config"]["layers"][1][key] = value
    with contextlib.suppress(PlanError):
        keras_allowed.check(model)


BASE = sequential(layers.Dense(1))


@given(st.text(min_size=1, max_size=20).filter(lambda name: name not in keras_allowed.LAYERS))
def test_no_other_layer_passes(name):
    with pytest.raises(PlanError):
        keras_allowed.check(with_layer(name))
