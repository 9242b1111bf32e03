"""PyTorch modules of many clients in one call: within 1e-5 of one after the other, and honest about what can't be."""

from __future__ import annotations

import numpy as np
import pytest
from tests.federation import rows

import atoll
from atoll import learners
from atoll.errors import AtollError
from atoll.learner import Rows
from atoll.plan import Plan

torch = pytest.importorskip("torch")

RAGGED = (33, 16, 9, 5)
OPTIMIZERS = {"sgd": {"momentum": 0.9}, "adam": {}, "rmsprop": {"eps": 1e-3}, "adagrad": {"weight_decay": 0.1}}


def torch_plan(model: str = "deep", options: dict | None = None, **training) -> Plan:
    return Plan.of(
        {
            "plan": {"name": "t", "rounds": 2, "seed": 1},
            "model": {
                "torch": f"tests.learners.torch_models:{model}",
                "loss": "binary_cross_entropy_with_logits",
                "options": {"inputs": 4} if options is None else options,
            },
            "training": {"batch_size": 8, "learning_rate": 0.1, **training},
        }
    )


def simulate(plan: Plan, data, strategy: str = "map", **options) -> atoll.Simulated:
    return atoll.simulate(plan, data, allow=plan.model.functions, strategy=strategy, **options)


def apart(one: atoll.Simulated, other: atoll.Simulated) -> float:
    return max(float(np.abs(one.model[name].values - other.model[name].values).max()) for name in one.model)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ragged_clients_are_within_1e_5_of_map_for_any_number_of_workers(optimizer):
    data = {f"node-{k}": rows(k, count) for k, count in enumerate(RAGGED)}
    plan = torch_plan(optimizer=optimizer, epochs=2).with_(training={"options": OPTIMIZERS[optimizer], "learning_rate": 0.02})
    exact = simulate(plan, data)
    alone, together = (simulate(plan, data, "vmap", workers=workers) for workers in (1, 3))
    assert alone.digest == together.digest
    assert alone.strategy == "vmap"
    assert apart(alone, exact) < 1e-5
    for name, figures in exact.by_node.items():
        assert alone.by_node[name] == pytest.approx(figures, abs=1e-5)


def test_a_schedule_and_frozen_layers_are_kept():
    data = {f"node-{k}": rows(k, count) for k, count in enumerate(RAGGED)}
    plan = torch_plan("tuned").with_(training={"schedule": {"kind": "cosine"}})
    exact, found = simulate(plan, data), simulate(plan, data, "vmap")
    assert apart(exact, found) < 1e-5
    np.testing.assert_array_equal(found.model["buffers"].values, exact.model["buffers"].values)


def test_batch_norm_goes_side_by_side_where_batches_are_whole():
    even = {f"node-{k}": rows(k, 16) for k in range(3)}
    plan = torch_plan("normed", {"inputs": 4, "dropout": 0.0})
    exact, found = simulate(plan, even), simulate(plan, even, "vmap")
    assert apart(exact, found) < 1e-5
    assert not found.said
    assert found.model["counts"].values.tolist() == exact.model["counts"].values.tolist()
    exact, found = (simulate(plan, {**even, "node-3": rows(3, 11)}, strategy) for strategy in ("map", "vmap"))
    assert apart(exact, found) < 1e-5
    assert "its last batch is short, which its model would notice" in found.said


@pytest.mark.parametrize("first", [2, 4])
def test_a_first_client_of_few_rows_hides_no_batch_norm(first):
    """So few rows, again and again, have one mean in the half of a batch and in the whole."""
    data = {f"node-{k}": rows(k, count) for k, count in enumerate((first, 11, 6))}
    plan = torch_plan("normed", {"inputs": 4, "dropout": 0.0}, batch_size=4).with_(plan={"rounds": 1})
    exact, found = simulate(plan, data), simulate(plan, data, "vmap")
    assert apart(exact, found) < 1e-5
    assert "its last batch is short, which its model would notice" in found.said


def test_buffers_in_no_state_begin_as_they_were_made_whatever_was_fitted_before():
    data = {f"node-{k}": rows(k, 16) for k in range(3)}
    plan = torch_plan("fading")
    used, fresh = (learners.build(plan, plan.model.functions) for _ in range(2))
    used.fit(used.initial(1), Rows(*rows(0, 16)), 3, 8, np.random.default_rng(0))
    found = [atoll.simulate(plan, data, learner=one, strategy="vmap").digest for one in (used, fresh)]
    assert found[0] == found[1]
    assert apart(simulate(plan, data), simulate(plan, data, "vmap")) < 1e-5


def test_what_cannot_be_names_the_way_out():
    data = {f"node-{k}": rows(k, 16) for k in range(3)}
    with pytest.raises(AtollError, match=r"--strategy vmap: PyTorch can't fit this model for many clients .*; take pool or map"):
        simulate(torch_plan("dropping"), data, "vmap")
    with pytest.raises(AtollError, match=r"--strategy scan: a 'torch' learner can't train clients .*; take vmap or pool or map"):
        simulate(torch_plan(), data, "scan")


@pytest.mark.parametrize("strategy", ["vmap", "auto"])
@pytest.mark.parametrize("whose", [0, 1])
def test_rows_that_the_module_cannot_take_are_one_line(monkeypatch, strategy, whose):
    from atoll.simulate import choose

    monkeypatch.setattr(choose, "_SOON", 0.0)
    many = np.random.default_rng(0).integers(0, 20, (16, 6))
    data = {f"node-{k}": (many + 20 * (k == whose), np.ones(16)) for k in range(3)}  # the embedding has 20
    with pytest.raises(AtollError, match="index out of range"):
        simulate(torch_plan("words", {}), data, strategy)


def test_auto_takes_it_where_it_is_the_fastest_and_passes_over_what_cannot_be(monkeypatch):
    from atoll.simulate import choose

    seconds = choose._seconds
    monkeypatch.setattr(choose, "_seconds", lambda tried, *job: (seconds(tried, *job), tried.name != "vmap")[1])
    monkeypatch.setattr(choose, "_SOON", 0.0)
    data = {f"node-{k}": rows(k, 16) for k in range(3)}
    assert simulate(torch_plan(), data, "auto").strategy == "vmap"
    assert simulate(torch_plan("dropping"), data, "auto").strategy in ("map", "pool")
