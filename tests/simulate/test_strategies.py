"""Compiled strategies: within 1e-5 of `map`, the same for any number of workers, and honest about what they can't."""

from __future__ import annotations

import numpy as np
import pytest
from tests.federation import clients, plan, rows

import atoll
from atoll import algorithms, learners
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.local import gradient, trained
from atoll.errors import AtollError, DataError, LayoutError
from atoll.learner import Data, Rows
from atoll.plan import Plan
from atoll.simulate.choose import _seconds

RAGGED = (33, 16, 9, 5)


def agreed(model: str, **training) -> Plan:
    return Plan.of(
        {
            "plan": {"name": "t", "rounds": 2, "seed": 1},
            "model": {
                "jax": f"tests.learners.jax_models:{model}",
                "loss": "sigmoid_binary_cross_entropy",
                "options": {"inputs": 4},
            },
            "training": {"batch_size": 8, "learning_rate": 0.1, **training},
        }
    )


def simulate(agreed: Plan, data, strategy: str = "map", **options) -> atoll.Simulated:
    return atoll.simulate(agreed, data, allow=agreed.model.functions, strategy=strategy, **options)


def apart(one: atoll.Simulated, other: atoll.Simulated) -> float:
    return max(float(np.abs(one.model[name].values - other.model[name].values).max()) for name in one.model)


def test_ragged_clients_are_within_1e_5_of_map_for_any_number_of_workers():
    data = {f"node-{k}": rows(k, count) for k, count in enumerate(RAGGED)}
    adam = agreed("linear", optimizer="adam", epochs=2)
    exact = simulate(adam, data)
    for strategy in ("scan", "vmap"):
        alone, together = (simulate(adam, data, strategy, workers=workers) for workers in (1, 3))
        assert alone.digest == together.digest
        assert alone.strategy == strategy
        assert apart(alone, exact) < 1e-5
        assert "% of the work was padding" in alone.said
        for name, figures in exact.by_node.items():
            assert alone.by_node[name] == pytest.approx(figures, abs=1e-5)
        assert [row["nodes"] for row in alone.rounds] == [pytest.approx(row["nodes"], abs=1e-5) for row in exact.rounds]
        assert [row["bytes"] for row in alone.rounds] == [row["bytes"] for row in exact.rounds]


@pytest.mark.parametrize("strategy", ["scan", "vmap"])
def test_rows_that_the_model_cannot_take_are_one_line(strategy):
    wide = {f"node-{k}": (np.ones((8, 5)), np.ones(8)) for k in range(3)}
    with pytest.raises(AtollError, match=rf"--strategy {strategy}: the model can't take rows of shape \(5,\): "):
        simulate(agreed("normed"), wide, strategy)


def test_batch_norm_and_dropout_are_vectorised_where_batches_are_whole_and_left_to_map_where_not():
    even = {f"node-{k}": rows(k, 8) for k in range(3)}
    exact, found = (simulate(agreed("normed"), even, strategy) for strategy in ("map", "scan"))
    assert apart(exact, found) < 1e-5
    assert not found.said
    short = {**even, "node-3": rows(3, 11)}
    exact, found = (simulate(agreed("normed"), short, strategy) for strategy in ("map", "scan"))
    assert apart(exact, found) < 1e-5
    assert "2 fits one by one: its last batch is short, which its model would notice" in found.said


def test_what_a_method_saw_in_its_gradients_is_not_lost(monkeypatch):
    """A gradient first, and a fit that could be compiled after it."""

    def looked(learner, brief, memory, rows, pace, rng):
        slope, _ = gradient(learner, brief, rows, pace, rng)
        update = trained(learner, brief, rows, pace, rng)
        assert slope.any()
        return memory, update

    monkeypatch.setitem(algorithms._OWN, "looked", lambda: fedavg()._replace(local=looked, needs=frozenset({"correct"})))
    made, data = agreed("linear").with_(aggregation={"rule": "looked"}), {f"node-{k}": rows(k, 16) for k in range(3)}
    assert apart(simulate(made, data), simulate(made, data, "vmap")) < 1e-5


@pytest.mark.parametrize("rule", ["apfl", "finetune", "qffl", "fednova"])
def test_methods_that_fit_more_than_once_are_compiled_too(rule):
    made, data = agreed("linear").with_(aggregation={"rule": rule}), {f"node-{k}": rows(k, 16) for k in range(3)}
    exact, found = simulate(made, data), simulate(made, data, "vmap")
    assert apart(exact, found) < 1e-5
    for name, figures in exact.by_node.items():
        assert found.by_node[name] == pytest.approx(figures, abs=1e-5)


def test_what_cannot_be_is_one_line():
    with pytest.raises(AtollError, match="a 'logistic' learner can't train many clients in one call; take pool or map"):
        atoll.simulate(plan(), clients(), strategy="vmap")
    with pytest.raises(AtollError, match="'fast' is none; it is one of auto, map"):
        atoll.simulate(plan(), clients(), strategy="fast")
    with pytest.raises(AtollError, match="--workers: 0 is too few"):
        atoll.simulate(plan(), clients(), strategy="auto", workers=0)
    with pytest.raises(AtollError, match="judge every round"):
        atoll.simulate(plan(stopping={"patience": 2}), clients(), judge_every=2)


@pytest.mark.parametrize("strategy", ["map", "scan"])
def test_a_rate_that_diverges_ends_the_run_with_round_and_client(strategy):
    wild = agreed("linear", learning_rate=1e9)
    with pytest.raises(LayoutError, match=r"round 1, node-1: training gave NaN or infinity; lower training.learning_rate"):
        simulate(wild, {"node-0": rows(0, 8), "node-1": (np.full((8, 4), 1e30), np.tile([0.0, 1.0], 4))}, strategy)


@pytest.mark.parametrize(
    ("model", "strategy"),
    [("logistic", "pool"), ("SGDClassifier", "map"), ("SGDRegressor", "map"), ("MLPRegressor", "map"), ("jax", "vmap")],
)
def test_what_diverges_in_any_learner_ends_the_run_with_round_and_client(model, strategy):
    kinds = {"logistic": {"logistic": True}, "jax": agreed("linear").model.model_dump(mode="json")}
    rate = {"jax": 1e36, "logistic": 1e308, "SGDClassifier": 1e308, "SGDRegressor": 1e200, "MLPRegressor": 1e10}[model]
    wild = Plan.of(
        {
            "plan": {"name": "wild", "rounds": 3},
            "model": {"inputs": 4, **kinds.get(model, {"sklearn": model})},
            "training": {"learning_rate": rate, "batch_size": 8, "epochs": 3},
        }
    )
    wide = {name: (1e3 * x, y) for name, (x, y) in clients().items()}
    with pytest.raises(LayoutError, match=r"^round [12], node-\d: .* NaN or infinity.*; lower training.learning_rate, or"):
        simulate(wild, wide, strategy)


def test_a_client_without_rows_is_named():
    with pytest.raises(DataError, match="client 'node-3' has no row to train on: leave it out"):
        atoll.simulate(plan(), {**clients(), "node-3": Data(Rows(*rows(3, 0)), Rows(*rows(3, 5)))})


def test_models_are_judged_as_often_as_asked():
    found = atoll.simulate(plan(plan={"rounds": 5}), clients(), holdout=Rows(*rows(9)), judge_every=2)
    assert [bool(row["nodes"]) and bool(row["holdout"]) for row in found.rounds] == [False, True, False, True, True]
    assert found.digest == atoll.simulate(plan(plan={"rounds": 5}), clients()).digest


def test_auto_stays_with_map_where_that_is_done_soon():
    assert simulate(agreed("linear"), clients(), "auto").digest == simulate(agreed("linear"), clients()).digest


def test_what_auto_measured_is_no_part_of_the_run(monkeypatch):
    monkeypatch.setattr("atoll.simulate.choose._SOON", 0.0)
    monkeypatch.setattr("atoll.simulate.choose._seconds", lambda tried, *job: (_seconds(tried, *job), tried.name != "vmap")[1])
    data = {f"node-{k}": rows(k, count) for k, count in enumerate(RAGGED)}
    holdout, told = Rows(*rows(9)), []
    found = simulate(agreed("linear"), data, "auto", holdout=holdout, watch=told.append)
    assert told[0]["strategy"] == found.strategy == "vmap"
    named = simulate(agreed("linear"), data, "vmap", holdout=holdout)
    assert (found.digest, found.holdout, found.said) == (named.digest, named.holdout, named.said)


def test_a_keras_model_and_its_random_state_are_vectorised():
    def layer(kind: str, module: str = "keras.layers", **config):
        return {"class_name": kind, "module": module, "registered_name": None, "config": config}

    layers = [
        layer("InputLayer", batch_shape=[None, 4], name="in"),
        layer("Dense", units=3, activation="relu", name="one"),
        layer("Dropout", rate=0.5, name="two"),
        layer("Dense", units=1, activation="sigmoid", name="three"),
    ]

    def agreed(layers, batch_size: int) -> Plan:
        model = {"keras": layer("Sequential", "keras", name="net", layers=layers), "loss": "binary_crossentropy"}
        training = {"batch_size": batch_size, "learning_rate": 0.1, "epochs": 2}
        return Plan.of({"plan": {"name": "t", "rounds": 2, "seed": 1}, "model": model, "training": training})

    for some, data in (
        (agreed(layers, 8), {f"node-{k}": rows(k, 16) for k in range(3)}),
        (agreed([one for one in layers if one["class_name"] != "Dropout"], 8), {f"node-{k}": rows(k, 9 + k) for k in range(3)}),
    ):
        exact, found = (atoll.simulate(some, data, strategy=strategy) for strategy in ("map", "vmap"))
        assert apart(exact, found) < 1e-5
        assert "one by one" not in found.said


NEURAL = {"logistic": False, "sklearn": "MLPClassifier", "options": {"hidden_layer_sizes": [4]}}


@pytest.mark.parametrize(("model", "rule"), [({}, "scaffold"), (NEURAL, "fedavg")])
def test_processes_give_the_bits_of_map_and_keep_what_clients_remember(model, rule):
    agreed = plan(model=model, aggregation={"rule": rule})
    exact, found = (atoll.simulate(agreed, clients(5), strategy=strategy, workers=2) for strategy in ("map", "pool"))
    assert found.digest == exact.digest
    assert found.rounds == exact.rounds
    assert found.strategy == "pool"


def test_a_client_that_a_process_cannot_train_is_named():
    wild = plan(training={"learning_rate": 1e300})
    with pytest.raises(LayoutError, match="round 1, node-0: training gave NaN"):
        atoll.simulate(wild, {name: (x * 1e30, y) for name, (x, y) in clients().items()}, strategy="pool", workers=1)
    with pytest.raises(AtollError, match="leave learner= out"):
        atoll.simulate(plan(), clients(), strategy="pool", learner=learners.build(plan()))


def test_widths_are_few_and_waste_little():
    from atoll.simulate.vectorised import _rounded

    found = [_rounded(width) for width in range(1, 1025)]
    assert all(width <= rounded < 1.13 * width for width, rounded in enumerate(found, 1))
    assert len(set(found)) <= 64
