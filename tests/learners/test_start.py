"""A run that starts from a model trained before: any file of the plan's arrays, no other, and no code in it."""

from __future__ import annotations

import asyncio
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.federation import clients, plan, run

os.environ.setdefault("KERAS_BACKEND", "jax")
import keras
from keras import layers

from atoll import learners
from atoll.errors import AtollError, LearnerError
from atoll.learner import Rows
from atoll.learners.keras import export
from atoll.plan import Plan
from atoll.server.replay import replay
from atoll.simulate import simulate
from atoll.store.sql import SqlStore
from atoll.vector import Groups
from atoll.wire import digest_of, pack

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own, on saving


def stack(width: int = 8) -> Any:
    body = [layers.Dense(width, "relu"), layers.BatchNormalization(), layers.Dropout(0.1), layers.Dense(1, "sigmoid")]
    return keras.Sequential([keras.Input((4,)), *body])


def keras_plan(model: Any) -> Plan:
    return plan(model={"logistic": False, "inputs": None, "keras": json.loads(model.to_json()), "loss": "binary_crossentropy"})


KERAS = keras_plan(stack())


def trained(agreed: Plan) -> Groups:
    learner = learners.build(agreed)
    x, y = clients()["node-0"]
    return learner.fit(learner.initial(3), Rows(x.astype(np.float32), y), 20, 8, np.random.default_rng(0)).groups


def first(agreed: Plan, path: Path) -> Groups:
    return learners.first(agreed, learners.build(agreed), path)


def write(path: Path, groups: Groups) -> Path:
    path.write_bytes(b"".join(pack(groups)))
    return path


def test_an_exported_model_starts_a_run_with_the_same_bits(tmp_path):
    groups = trained(KERAS)
    export(KERAS, groups, tmp_path / "model.keras")
    write(tmp_path / "model.safetensors", groups)
    for name in ("model.keras", "model.safetensors"):
        assert digest_of(pack(first(KERAS, tmp_path / name))) == digest_of(pack(groups))


def test_a_keras_file_of_the_same_layers_under_other_names(tmp_path):
    twin = stack()
    twin.save(tmp_path / "twin.keras")
    loaded = first(KERAS, tmp_path / "twin.keras")
    assert np.array_equal(loaded["parameters"].values[:32], np.ravel(twin.trainable_variables[0]))


def test_safetensors_of_another_hand_in_any_order_without_groups(tmp_path):
    groups = trained(KERAS)
    arrays = {name: array for group in groups.values() for name, array in group.arrays.items()}
    save_file({name: np.ascontiguousarray(arrays[name]) for name in reversed(list(arrays))}, tmp_path / "other.safetensors")
    assert digest_of(pack(first(KERAS, tmp_path / "other.safetensors"))) == digest_of(pack(groups))


def test_simulated_and_deployed_start_alike_and_go_on_where_the_first_run_ended(tmp_path):
    before = simulate(plan(plan={"rounds": 2}), clients())
    start = write(tmp_path / "before.safetensors", before.model)
    after = simulate(plan(plan={"rounds": 1}), clients(), start=start)
    history = run(plan(plan={"rounds": 1}), clients(), tmp_path, start=start)
    assert history["initial"] == before.digest
    assert history["last"] == after.digest
    assert simulate(plan(plan={"rounds": 1}), clients(), start=before.model).digest == after.digest
    assert asyncio.run(replayed(tmp_path / "store")) == [after.digest]


async def replayed(place: Path) -> list[str]:
    store = SqlStore(place)
    found = [one.found async for one in replay(place, store, store.find())]
    store.close()
    return found


def save(path: Path, **arrays: Any) -> Path:
    save_file({name.replace("_", "/"): array for name, array in arrays.items()}, path)
    return path


FULL = {"parameters_kernel": np.zeros(4), "parameters_bias": np.zeros(1)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parameters_kernel": np.zeros(5)}, "'parameters/kernel' is F64 [5], the plan's model has F64 [4] there"),
        ({"parameters_kernel": np.zeros(4, np.float32)}, "'parameters/kernel' is F32 [4], the plan's model has F64 [4]"),
        ({"more": np.zeros(1)}, "'more' is one too many"),
        ({"parameters_bias": np.full(1, np.nan)}, "'bias' in group 'parameters' holds NaN"),
        (None, "'parameters/bias' is missing; there are: no more arrays"),
    ],
)
def test_the_first_array_that_does_not_fit_is_named(tmp_path, change, said):
    arrays = {**FULL, **change} if change is not None else {"parameters_kernel": np.zeros(4)}
    with pytest.raises(AtollError) as caught:
        first(plan(), save(tmp_path / "start.safetensors", **arrays))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def deep(path: Path) -> None:
    header = b"[" * 100_000
    path.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("none.safetensors", lambda path: None, "can't be read (No such file"),
        ("empty.safetensors", lambda path: path.write_bytes(b""), "no model of this plan"),
        ("deep.safetensors", deep, "its header is no JSON"),
        ("model.pt", lambda path: path.write_bytes(b""), "starts from a .safetensors file or a .keras file"),
        ("none.keras", lambda path: None, "can't be read (No such file"),
        ("text.keras", lambda path: path.write_text("x"), "no model of this plan"),
        ("more.keras", lambda path: stack(9).save(path), "it holds 91 weights, the plan's model has 81"),
        ("other.keras", lambda path: other().save(path), "no model of this plan"),
    ],
)
def test_files_that_are_no_model_of_the_plan_are_one_line(tmp_path, name, make, said):
    make(tmp_path / name)
    with pytest.raises(LearnerError) as caught:
        first(KERAS, tmp_path / name)
    assert said in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def other() -> Any:
    """As many weights as the plan's model, in other shapes."""
    return keras.Sequential([keras.Input((80,)), layers.Dense(1)])


def test_a_keras_plan_alone_reads_keras_files(tmp_path):
    with pytest.raises(LearnerError, match=r"starts from a \.safetensors file, as"):
        first(plan(), tmp_path / "model.keras")


def test_only_weights_are_read_from_a_keras_file(tmp_path):
    """The config and the metadata are nonsense, assets would escape: none of it is looked at."""
    stack().save(tmp_path / "good.keras")
    with zipfile.ZipFile(tmp_path / "good.keras") as good, zipfile.ZipFile(tmp_path / "bad.keras", "w") as bad:
        bad.writestr("config.json", '{"class_name": "Lambda"}')
        bad.writestr("metadata.json", "no json")
        bad.writestr("assets/../../escaped", "x")
        bad.writestr("model.weights.h5", good.read("model.weights.h5"))
    assert first(KERAS, tmp_path / "bad.keras")["parameters"] == first(KERAS, tmp_path / "good.keras")["parameters"]
    assert not (tmp_path.parent / "escaped").exists()


def test_a_weights_file_that_points_into_another_file_or_holds_no_numbers_is_refused(tmp_path):
    """HDF5 can keep an array's bytes in any file of the reader's disk, link to another file's arrays, or hold long texts."""
    import h5py

    (tmp_path / "secret").write_bytes(bytes(4 * 32))
    stack().save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        archive.extract("model.weights.h5", tmp_path)
    for trick in ("external", "link", "text"):
        crafted = tmp_path / f"{trick}.h5"
        crafted.write_bytes((tmp_path / "model.weights.h5").read_bytes())
        with h5py.File(crafted, "a") as file:
            name = next(iter(file["layers"]))
            held = file[f"layers/{name}/vars"]
            shape = held["0"].shape
            del held["0"]
            if trick == "external":
                held.create_dataset("0", shape, "f4", external=[(str(tmp_path / "secret"), 0, h5py.h5f.UNLIMITED)])
            elif trick == "text":  # a gigabyte for each of its few elements
                held.create_dataset("0", shape, "S1000000000", chunks=(1,) * len(shape))
            else:
                held["0"] = h5py.ExternalLink(str(tmp_path / "model.weights.h5"), f"layers/{name}/vars/0")
        with zipfile.ZipFile(tmp_path / f"{trick}.keras", "w") as bad:
            bad.write(crafted, "model.weights.h5")
        with pytest.raises(LearnerError, match="no model of this plan"):
            first(KERAS, tmp_path / f"{trick}.keras")
