"""What is special in a Keras model is handled rightly in a real federation: layers with state, shared, frozen, random, rough."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
from keras import layers
from tests import federation
from tests.learners.tables import rows

from atoll import learners
from atoll.plan import Plan
from atoll.simulate import simulate
from atoll.wire import unpack


def everything(precision: str = "float32") -> Plan:
    """An embedding, a layer used twice, a frozen one, batch norm and dropout."""
    with_ = {"dtype": precision}
    read = keras.Input((6,))
    x = layers.Flatten(**with_)(layers.Embedding(20, 4, name="words", **with_)(read))
    x = layers.Dense(8, name="frozen", trainable=False, **with_)(x)
    twice = layers.Dense(8, "tanh", name="twice", **with_)
    x = layers.BatchNormalization(name="norm", **with_)(twice(twice(x)))
    x = layers.Dense(1, "sigmoid", name="out", **with_)(layers.Dropout(0.3, **with_)(x))
    return Plan.of(
        {
            "plan": {"name": "k", "rounds": 2},
            "model": {"keras": json.loads(keras.Model(read, x).to_json()), "loss": "binary_crossentropy"},
            "training": {"learning_rate": 0.1, "batch_size": 16},
            "cohort": {"minimum": 3, "deadline": 20, "grace": 1},
        }
    )


def test_a_deployed_run_gives_the_simulated_runs_bits(tmp_path):
    plan, whole = everything(), rows("words")
    data = {f"node-{k}": (whole.x[k::3][:32], whole.y[k::3][:32]) for k in range(3)}
    learner = learners.build(plan)
    simulated = simulate(plan, data, learner=learner)
    history = federation.run(plan, data, tmp_path)
    assert [row["model"] for row in history["rounds"]] == [row["model"] for row in simulated.rounds]
    names = {group: [tensor.name for tensor in layout.tensors] for group, layout in learner.layouts.items()}
    weights = ["words/embeddings", "twice/kernel", "twice/bias", "norm/gamma", "norm/beta", "out/kernel", "out/bias"]
    assert names["parameters"] == weights, "a layer that is used twice travels once"
    assert sorted(names["buffers"]) == ["frozen/bias", "frozen/kernel", "norm/moving_mean", "norm/moving_variance"]
    body = (tmp_path / "store" / "models" / f"{history['last']}.safetensors").read_bytes()
    buffers, start = unpack(body, learner.layouts)[0]["buffers"].arrays, learner.initial(0)["buffers"].arrays
    for name, array in buffers.items():
        assert (array.tobytes() == start[name].tobytes()) == name.startswith("frozen"), f"{name}: frozen means to the bit"
    one = plan.with_(plan={"rounds": 1}, cohort={"minimum": 1})
    alone = [simulate(one, {name: data[name]}, learner=learner).model["buffers"].arrays for name in data]
    first = simulate(one.with_(cohort={"minimum": 3}), data, learner=learner).model["buffers"].arrays
    for name in ("norm/moving_mean", "norm/moving_variance"):
        np.testing.assert_allclose(first[name], np.mean([arrays[name] for arrays in alone], axis=0), rtol=1e-5)


def test_learners_that_are_built_at_once_have_the_same_names_and_first_weights():
    plan = everything()

    def built(_: int) -> tuple[object, bytes]:
        learner = learners.build(plan)
        return learner.layouts, learner.initial(3)["parameters"].values.tobytes()

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(built, range(12)))
    assert all(one == found[0] for one in found)


def test_mixed_precision_keeps_weights_that_are_exact():
    """`mixed_bfloat16` is the model's own, in its JSON: weights are float32, and so are what travels and the sums."""
    exact, rough = (learners.build(everything(precision)) for precision in ("float32", "mixed_bfloat16"))
    assert rough.layouts == exact.layouts
    start, table = exact.initial(0), rows("words")
    fits = [one.fit(start, table, 20, 40, np.random.default_rng(0)) for one in (exact, rough)]
    fitted = [fit.groups["parameters"].values for fit in fits]
    assert fitted[1].dtype == np.float32
    assert not np.array_equal(*fitted), "something was computed at low precision"
    np.testing.assert_allclose(fitted[1], fitted[0], atol=0.05)
    judged = rough.evaluate(start, rows("words"))
    assert judged["samples"] == 120
    assert judged["loss"] == np.float64(judged["loss"])
    np.testing.assert_allclose(judged["loss"], exact.evaluate(start, rows("words"))["loss"], rtol=0.02)
