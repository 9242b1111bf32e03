"""Text as numbers: the same on every node, without a word learnt from data; what a plan may ask, and what comes of it."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import federation

from atoll import learners
from atoll.columns import PRINTABLE
from atoll.errors import PlanError
from atoll.learner import Data, Rows
from atoll.plan import Plan
from atoll.preprocess import described, prepare
from atoll.preprocess.text import NOTHING, foretold, hashed, spelled
from atoll.simulate import simulate
from atoll.testing import check_learner

NETWORKS = "atoll.learners.networks:"
BAG = {"features": ["said"], "target": "kind", "words": {"said": 64}}
NEXT = {"features": ["said"], "target": "said", "characters": {"said": 6}}
LSTM = {"jax": f"{NETWORKS}lstm", "loss": "softmax_cross_entropy_with_integer_labels", "options": {"hidden": 12}}


def plan(data: dict[str, Any], model: dict[str, Any] | None = None, **training: Any) -> Plan:
    return Plan.of(
        {
            "plan": {"name": "text", "rounds": 2, "seed": 3},
            "model": model or {"logistic": True},
            "data": data,
            "training": {"epochs": 1, "batch_size": 8, "learning_rate": 0.5, **training},
            "cohort": {"minimum": 2, "deadline": 20, "grace": 1},
        }
    )


def lstm(**training: Any) -> Plan:
    return plan(NEXT, LSTM, **training)


def keras_lstm() -> Plan:
    import keras

    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((None,)), layers.Embedding(98, 4), layers.LSTM(8, return_sequences=True), layers.Dense(98)]
    )
    loss = {"loss": "sparse_categorical_crossentropy", "options": {"from_logits": True}}
    return plan(NEXT, {"keras": json.loads(model.to_json()), **loss})


def test_texts_are_as_near_in_hashed_words_as_in_all_words():
    rng = np.random.default_rng(0)
    texts = [" ".join(f"word{number}" for number in rng.zipf(1.5, 30) % 500) for _ in range(60)]
    known = sorted({word for text in texts for word in text.split()})
    bags = np.array([[text.split().count(word) for word in known] for text in texts], float)
    bags /= np.linalg.norm(bags, axis=1, keepdims=True)
    found = hashed(texts, 4096)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(found @ found.T, bags @ bags.T, atol=0.05)


@given(st.lists(st.text(), min_size=1, max_size=5), st.integers(1, 12))
def test_what_is_spelled_can_be_read_again_and_what_is_foretold_is_what_is_spelled_later(texts, length):
    codes, following = spelled(texts, length, PRINTABLE), foretold(texts, length, PRINTABLE)
    for text, row, after in zip(texts, codes, following, strict=True):
        shown = text[:length]
        assert [PRINTABLE[code - 1] if code <= len(PRINTABLE) else None for code in row if code] == [
            sign if sign in PRINTABLE else None for sign in shown
        ]
        assert after[: max(0, len(shown) - 1)].tolist() == row[1 : len(shown)].tolist()
        assert (after[len(shown) :] == NOTHING).all()
        if 0 < len(text) <= length:
            assert after[len(text) - 1] == 0, "the end is foretold, too"


def test_a_table_of_text_and_numbers_becomes_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('said,age,kind\n"Good, good!",3,yes\nbad,4,no\n,5,yes\n')
    data = {**BAG, "features": ["age", "said"], "positive": ["yes"]}
    found = prepare(path, plan(data)).train
    assert plan(data).inputs == found.x.shape[1] == 65
    assert found.x[:, 0].tolist() == [3, 4], "a row without text is left out"
    np.testing.assert_array_equal(found.x[:, 1:], hashed(["good good", "bad"], 64))
    assert found.y.tolist() == [1, 0]


def test_the_target_of_a_text_that_foretells_itself_is_what_comes_next(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("said\nto be or not\nbe\n")
    data = prepare(path, lstm())
    x, y = data.train
    assert [PRINTABLE[code - 1] for code in x[0]] == list("to be ")
    assert [PRINTABLE[code - 1] for code in y[0]] == list("o be o")
    assert y[1].tolist() == [x[1, 1], 0, *[NOTHING] * 4]
    assert x.dtype.kind == y.dtype.kind == "i"
    assert described(data) == {"train": 2, "test": 0, "shape": [6], "classes": {}}


def test_many_rows_of_many_words_are_made_some_at_a_time(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("said,kind\n" + "".join(f"word{row},1\n" for row in range(700)))
    found = prepare(path, plan({**BAG, "words": {"said": 4096}}), spool=tmp_path / "spool").train
    assert (found.x.shape, found.x.dtype) == ((700, 4096), np.float32)
    np.testing.assert_array_equal(found.x[650:], hashed([f"word{row}" for row in range(650, 700)], 4096))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({**BAG, "words": {"sad": 64}}, "data: words.sad is no feature; did you mean 'said'?"),
        ({**BAG, "characters": {"said": 8}}, "data: 'said' is coded twice: it has a place in one of categories, words and"),
        ({**BAG, "words": {"said": 0}}, "data.words.said: Input should be greater than 0"),
        ({**NEXT, "alphabet": "abca"}, "data: a character is in alphabet twice"),
        ({**BAG, "standardise": "node"}, "data: words and characters have their right size already: leave standardise out"),
        ({**NEXT, "features": ["said", "age"]}, "data: a target that is its own feature stands for the next character"),
        ({**NEXT, "positive": ["a"]}, "data: a target that is its own feature stands for the next character"),
    ],
)
def test_what_a_plan_cannot_ask(data, said):
    with pytest.raises(PlanError, match=re.escape(said)):
        plan(data, LSTM if "target" in data and data["target"] == "said" else None)


def test_a_model_with_one_answer_a_row_foretells_no_text():
    with pytest.raises(PlanError, match="each place has a target; a 'logistic' model takes one a row"):
        plan(NEXT)


LINES = ["abcabcabc", "bcabc", "cabcab", "ab", "abcab", "bc", "cabcabca", "abc"] * 3


def test_lstm_passes_the_suite_of_learners():
    data = Rows(spelled(LINES, 6, PRINTABLE), foretold(LINES, 6, PRINTABLE))
    build = lstm(learning_rate=1.0)
    check_learner(lambda: learners.build(build, allow=[f"{NETWORKS}lstm"]), Data(data, Rows(data.x[:0], data.y[:0])), steps=40)


@pytest.mark.parametrize("made", [lstm, keras_lstm])
def test_the_end_of_a_text_counts_and_what_is_behind_it_does_not(made):
    learner = learners.build(made(), allow=[f"{NETWORKS}lstm"])
    model = learner.initial(0)
    rows = Rows(spelled(LINES, 6, PRINTABLE), foretold(LINES, 6, PRINTABLE))
    wide = Rows(spelled(LINES, 9, PRINTABLE)[:, :6], foretold(LINES, 9, PRINTABLE)[:, :6])
    assert learner.evaluate(model, rows) == learner.evaluate(model, wide)
    alone = [learner.evaluate(model, Rows(rows.x[k : k + 1, :n], rows.y[k : k + 1, :n])) for k, n in ((1, 5), (3, 2))]
    padded = [learner.evaluate(model, Rows(rows.x[k : k + 1], rows.y[k : k + 1])) for k in (1, 3)]
    for one, other in zip(alone, padded, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["correct"] == pytest.approx(other["correct"])


def test_keras_foretells_the_same_compiled_for_many():
    rows = Rows(spelled(LINES, 6, PRINTABLE), foretold(LINES, 6, PRINTABLE))
    clients = {name: Data(Rows(rows.x[k:], rows.y[k:]), Rows(rows.x[:0], rows.y[:0])) for k, name in ((0, "a"), (5, "b"))}
    one, other = (simulate(keras_lstm(), clients, strategy=strategy) for strategy in ("map", "scan"))
    assert one.rounds[-1]["nodes"]["loss"] < one.rounds[0]["nodes"]["loss"]
    np.testing.assert_allclose(other.model["parameters"].values, one.model["parameters"].values, atol=1e-5)


def test_foretelling_is_the_same_simulated_deployed_and_compiled(tmp_path):
    clients = {}
    for name, lines in (("node-0", LINES[:14]), ("node-1", LINES[5:])):
        clients[name] = tmp_path / f"{name}.csv"
        clients[name].write_text("said\n" + "".join(f"{line}\n" for line in lines))
    allow = [f"{NETWORKS}lstm"]
    simulated = simulate(lstm(), clients, allow=allow)
    history = federation.run(lstm(), clients, tmp_path, allow=allow)
    assert history["last"] == simulated.digest
    other = simulate(lstm(), clients, allow=allow, strategy="vmap")
    np.testing.assert_allclose(other.model["parameters"].values, simulated.model["parameters"].values, atol=1e-5)


def test_convolutional_is_mcmahans_cnn_and_its_products_are_convolutions():
    import jax
    from jax.lax import conv_general_dilated

    from atoll.learners.networks import convolutional

    model = convolutional()
    parameters = model.init(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == 1_663_370

    x = jax.random.normal(jax.random.key(1), (3, 28, 28, 1))
    there = x
    for layer, channels in zip(parameters[:2], (1, 32), strict=True):
        kernel = layer["kernel"].reshape(5, 5, channels, -1)
        there = jax.nn.relu(conv_general_dilated(there, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
        there = there.reshape(3, there.shape[1] // 2, 2, there.shape[2] // 2, 2, -1).max((2, 4))
    there = jax.nn.relu(there.reshape(3, -1) @ parameters[2]["kernel"]) @ parameters[3]["kernel"]
    found = model.apply(parameters, x.reshape(3, 784), None, False)
    np.testing.assert_allclose(found, there, atol=1e-4)
