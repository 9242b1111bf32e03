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

from atoll import learners, memory
from atoll.errors import LearnerError, PlanError
from atoll.learners.keras import allowed, room
from atoll.plan import Plan


def sequential(*stack: Any, shape: tuple[int | None, ...] = (6,)) -> dict[str, Any]:
    return json.loads(keras.Sequential([keras.Input(shape), *stack]).to_json())


def branches() -> dict[str, Any]:
    left, right = keras.Input((4,)), keras.Input((4,))
    both = layers.Concatenate()([layers.Dense(3, "tanh")(left), layers.Dense(3, "gelu")(right)])
    return json.loads(keras.Model([left, right], layers.Dense(1)(both)).to_json())


def nested() -> Any:
    return keras.Sequential([keras.Input((6,)), layers.Dense(3), layers.BatchNormalization()])


def compiled() -> dict[str, Any]:
    model = keras.Sequential([keras.Input((6,)), layers.Dense(1)])
    model.compile("adam", "mse", metrics=["mae"])
    return json.loads(model.to_json())


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
    "nested": lambda: sequential(nested(), layers.Dense(1)),
    "augmented": lambda: sequential(
        layers.Rescaling(0.1),
        layers.RandomFlip("horizontal"),
        layers.RandomZoom(0.1),
        layers.Resizing(4, 4),
        layers.Conv2D(1, 2),
        shape=(8, 8, 1),
    ),
    "normalised, mixed precision": lambda: sequential(
        layers.Normalization(mean=[1.0] * 6, variance=[2.0] * 6), layers.Dense(1, dtype="mixed_bfloat16")
    ),
    "compiled": compiled,
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own, where a model was compiled
def test_harmless_models_pass_and_build(name):
    model = HARMLESS[name]()
    kept = allowed.check(model)
    size = room.measure(kept)
    built = keras.models.model_from_json(json.dumps(kept))
    assert size.weights == built.count_params() > 0
    assert size.widest >= 1


def test_every_listed_layer_is_one_of_keras():
    assert {name for name in allowed.LAYERS if not hasattr(layers, name)} == set()


def test_every_listed_activation_is_one_of_keras():
    assert {name for name in allowed.ACTIVATIONS if not hasattr(keras.activations, name)} == set()


def with_layer(name: str, /, module: str | None = "keras.layers", registered: str | None = None, **config: Any) -> dict[str, Any]:
    model = sequential(layers.Dense(1))
    layer = {"module": module, "class_name": name, "config": config, "registered_name": registered}
    model["config"]["layers"].append(layer)
    return model


def policy(**changed: Any) -> dict[str, Any]:
    return {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float32"}, "registered_name": None, **changed}


def thing(module: str, name: str) -> dict[str, Any]:
    return {"module": module, "class_name": name, "config": {}, "registered_name": None}


def deep(depth: int) -> Any:
    held: Any = 1
    for _ in range(depth):
        held = [held]
    return held


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
        (lambda: with_layer("Dense", units=1, dtype=policy(module="os")), "a dtype policy other than Keras' own"),
        (lambda: with_layer("Dense", units=1, dtype=policy(registered_name="mine>P")), "a dtype policy other than Keras' own"),
        (lambda: with_layer("Dense", dtype=policy(config={"name": "float32", "more": 1})), "holds a name and nothing else"),
        (lambda: with_layer("Dense", units=1, dtype=policy(config={"name": "int8_from_float32"})), "dtype 'int8_from_float32'"),
        (lambda: with_layer("Dense", units=1, dtype="mixed_float16"), "mixed_bfloat16 needs no loss scaling"),
        (lambda: with_layer("Dense", quantization_config=thing("keras.quantizers", "AbsMaxQuantizer")), "AbsMaxQuantizer"),
        *(
            (lambda key=key: with_layer("Dense", **{key: {"class_name": "__lambda__", "config": {"code": "aGk="}}}), "__lambda__")
            for key in ("kernel_initializer", "bias_regularizer", "kernel_constraint", "activation")
        ),
        (lambda: with_layer("Dense", units=1, kernel_initializer=thing("builtins", "function")), "functions can't be sent"),
        (lambda: with_layer("Dense", bias_regularizer=thing("keras.losses", "Huber")), "keras.losses.Huber"),
        (lambda: with_layer("Normalization"), "say its mean: what adapt() finds isn't in the JSON"),
        (lambda: with_layer("Discretization", num_bins=4), "say its bin_boundaries"),
        (lambda: with_layer("LSTM", units=1, unroll=True), "unroll = true"),
        (lambda: with_layer("SpectralNormalization", power_iterations=10**9), "more than 100 iterations"),
        (lambda: with_layer("Dense", units=deep(5000)), "nested too deep"),
        (lambda: {"class_name": "Model", "config": {}}, "a 'Model' can't be sent"),
        (dict, "can't be sent"),
    ],
)
def test_what_could_run_code_or_read_files_is_refused_by_name(model, said):
    with pytest.raises(PlanError) as caught:
        allowed.check(model())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_how_a_model_was_built_and_compiled_never_reaches_keras():
    """Keras would build with the shapes, and deserialise optimiser, loss and metrics."""
    model = sequential(layers.Dense(1))
    model["compile_config"] = {"optimizer": thing("os", "system"), "loss": "__import__"}
    model["config"]["layers"][1]["build_config"] = {"input_shape": [None, 10**12]}
    kept = allowed.check(model)
    assert "compile_config" not in kept
    assert kept["config"]["layers"][1].keys() == {"module", "class_name", "config", "registered_name"}
    assert room.measure(kept).weights == 7


def changed(model: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Change each key of that name, wherever it is: what a crafted plan says instead."""
    for layer in model["config"]["layers"]:
        layer["config"] |= {name: value for name, value in values.items() if name in layer["config"]}
    return model


def inside(model: dict[str, Any], **values: Any) -> dict[str, Any]:
    changed(model["config"]["layers"][1], **values)
    return model


BOMBS = {
    "units": (lambda: changed(sequential(layers.Dense(4)), units=10**11), "700,000,000,000 weights and their gradient"),
    "an orthogonal kernel": (
        lambda: changed(sequential(layers.Dense(4, kernel_initializer="orthogonal")), units=10**11),
        "weights and their gradient",
    ),
    "words": (
        lambda: changed(sequential(layers.Embedding(9, 4), layers.Flatten(), layers.Dense(1)), input_dim=10**12),
        "weights and their gradient",
    ),
    "repeats": (
        lambda: changed(sequential(layers.Dense(3), layers.RepeatVector(2), layers.Dense(1)), n=10**11),
        "layers of 300,000,000,000 numbers a row, in batches of 32 rows, take 38,400 GB",
    ),
    "a nested one": (lambda: inside(sequential(nested(), layers.Dense(1)), units=10**11), "weights and their gradient"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_model_too_large_for_this_machine_is_refused_before_a_weight_is_made(name):
    make, said = BOMBS[name]
    model = make()
    plan = {"plan": {"name": "k", "rounds": 1}, "model": {"keras": model, "loss": "mean_squared_error"}}
    with pytest.raises(LearnerError) as caught:
        learners.build(Plan.of(plan))
    assert said in str(caught.value)
    assert "this machine has" in str(caught.value)
    assert "\n" not in str(caught.value)
    keras.models.model_from_json(json.dumps(sequential(layers.Dense(1))))  # nothing is left that would be made with the next


def test_where_the_system_does_not_tell_its_memory_any_size_goes(monkeypatch):
    monkeypatch.setattr(memory, "total", lambda: None)
    assert room.check(sequential(layers.Dense(2)), 32).weights == 14
    assert memory.total() is None


def test_the_memory_of_this_machine_is_told():
    found = memory.total()
    assert found is not None
    assert 1 << 28 < found < 1 << 50


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"model": {"options": {"dtype": policy(module="os")}}}, "model.options.dtype: is dict"),
        ({"model": {"options": {"fn": "os.system"}}}, "model.options.fn: is str"),
        ({"training": {"options": {"learning_rate": thing("os", "system")}}}, "training.options.learning_rate: is dict"),
    ],
)
def test_options_are_numbers_and_switches(section, said):
    plan = {"plan": {"name": "k", "rounds": 1}, "model": {"keras": sequential(layers.Dense(1)), "loss": "huber"}}
    with pytest.raises(PlanError) as caught:
        learners.build(Plan.of(plan).with_(**section))
    assert said in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda v: st.lists(v) | st.dictionaries(st.text(max_size=8), v),
)


@given(json_values, st.sampled_from(["class_name", "module", "config", "registered_name", "layers"]))
def test_no_json_makes_the_check_fail_in_another_way(value, key):
    model = copy.deepcopy(BASE)
    model["config"]["layers"][1][key] = value
    with contextlib.suppress(PlanError):
        allowed.check(model)


BASE = sequential(layers.Dense(1))


@given(st.text(min_size=1, max_size=20).filter(lambda name: name not in allowed.LAYERS))
def test_no_other_layer_passes(name):
    with pytest.raises(PlanError):
        allowed.check(with_layer(name))
