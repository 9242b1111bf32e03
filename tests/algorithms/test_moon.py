"""MOON is what its paper says, on JAX and on Keras: against a program that knows its equations alone."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from tests.algorithms.test_methods import sites
from tests.federation import plan, run

os.environ.setdefault("KERAS_BACKEND", "jax")
import jax
import jax.numpy as jnp
import keras

from atoll.algorithms import find
from atoll.algorithms.moon import slope
from atoll.errors import PlanError
from atoll.learners import build
from atoll.node.runtime import Node
from atoll.plan import Plan
from atoll.preprocess import prepare
from atoll.server.runtime import Server
from atoll.simulate import simulate
from atoll.testing import check_algorithm

ALLOW = ["atoll.learners.networks:perceptron"]
MU, TAU, ETA, STEPS, ROUNDS, WIDTH = 5.0, 0.5, 0.3, 4, 3, 6
SIZES = (24, 24, 8)  # few shapes, since each is compiled
PEOPLE = {
    f"node-{k}": (x[:size].astype(np.float32), y[:size].astype(np.float32))
    for k, ((x, y), size) in enumerate(zip(sites(), SIZES, strict=True))
}


def agreed(kind: str, rule: str = "moon", **options: Any) -> Plan:
    jaxed = {"jax": "atoll.learners.networks:perceptron", "options": {"sizes": [4, WIDTH, 1]}}
    model = {
        "jax": {**jaxed, "loss": "sigmoid_binary_cross_entropy"},
        "keras": {"keras": network(), "loss": "binary_crossentropy", "options": {"from_logits": True}},
    }
    return plan(
        plan={"rounds": ROUNDS},
        model={"logistic": False, "inputs": None, **model[kind]},
        training={"epochs": None, "steps": STEPS, "batch_size": max(SIZES), "learning_rate": ETA},
        aggregation={"rule": rule, "options": {"mu": MU, "temperature": TAU, **options} if rule == "moon" else options},
        cohort={"minimum": 3, "quorum": 1.0, "deadline": 20},
    )


def network() -> dict[str, Any]:
    stack = [keras.Input((4,)), keras.layers.Dense(WIDTH, "relu", name="seen"), keras.layers.Dropout(0.0, name="drop")]
    return json.loads(keras.Sequential([*stack, keras.layers.Dense(1, name="out")]).to_json())


Weights = dict[str, Any]


def oracle(start: Weights) -> Weights:
    """Algorithm 1 of the paper, on all rows at a time."""

    def seen(w: Weights, x: Any) -> Any:
        return jnp.maximum(x @ w["k0"] + w["b0"], 0)

    def cosine(a: Any, b: Any) -> Any:
        lengths = [jnp.sqrt(jnp.maximum(jnp.sum(one**2, axis=1), 1e-16)) for one in (a, b)]
        return jnp.sum(a * b, axis=1) / lengths[0] / lengths[1]

    def loss(w: Weights, whole: Weights, before: Weights | None, x: Any, y: Any) -> Any:
        z = seen(w, x)
        logits = (z @ w["k1"] + w["b1"])[:, 0]
        own = jnp.mean(jnp.logaddexp(0.0, logits) - y * logits)
        if before is None:
            return own
        near, far = cosine(z, seen(whole, x)) / TAU, cosine(z, seen(before, x)) / TAU
        return own - MU * jnp.mean(jnp.log(jnp.exp(near) / (jnp.exp(near) + jnp.exp(far))))

    slopes = jax.jit(jax.grad(loss))
    w, mine = start, [None] * len(SIZES)
    for _ in range(ROUNDS):
        ends = []
        for k, (x, y) in enumerate(PEOPLE.values()):
            end = w
            for _ in range(STEPS):
                down = slopes(end, w, mine[k], x, y)
                end = {name: end[name] - ETA * down[name] for name in end}
            ends.append(end)
        mine = ends
        w = {name: sum(size * end[name] for size, end in zip(SIZES, ends, strict=True)) / sum(SIZES) for name in w}
    return w


ORDER = {"jax": ("b0", "k0", "b1", "k1"), "keras": ("k0", "b0", "k1", "b1")}
"""How the two learners lay out two dense layers."""


def named(kind: str, groups: Any) -> Weights:
    return dict(zip(ORDER[kind], groups["parameters"].arrays.values(), strict=True))


@pytest.mark.parametrize(("kind", "options"), [("jax", {}), ("keras", {"layer": "seen"})])
def test_it_is_what_its_paper_says(kind, options):
    made = agreed(kind, **options)
    found = named(kind, simulate(made, PEOPLE, allow=ALLOW).model)
    expected = oracle(named(kind, build(made, ALLOW).initial(made.plan.seed)))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=2e-5)
    plain = named(kind, simulate(agreed(kind, "fedavg"), PEOPLE, allow=ALLOW).model)
    assert max(np.abs(plain[name] - expected[name]).max() for name in plain) > 0.01, "the contrast did something"


def test_the_slope_is_that_of_equation_3():
    z, near, far = np.random.default_rng(0).normal(size=(3, 7, 5))

    def contrast(z: Any) -> float:
        ups = [np.exp(np.sum(z * o, 1) / np.linalg.norm(z, axis=1) / np.linalg.norm(o, axis=1) / 0.3) for o in (near, far)]
        return float(np.mean(-np.log(ups[0] / (ups[0] + ups[1]))))

    found = slope(z, near, far, 0.3)
    for at in np.ndindex(z.shape):
        push = np.zeros_like(z)
        push[at] = 1e-6
        np.testing.assert_allclose((contrast(z + push) - contrast(z - push)) / 2e-6, found[at], rtol=1e-5, atol=1e-8)
    assert not slope(np.zeros((2, 5)), near[:2], near[:2], 0.3).any(), "a row that a layer makes nothing of pulls nowhere"


@pytest.mark.parametrize("kind", ["jax", "keras"])
def test_it_passes_the_suite_and_without_mu_it_is_fedavg(kind):
    made = agreed(kind)
    learner = build(made, ALLOW)
    data = [prepare(one, made) for one in PEOPLE.values()]
    check_algorithm(lambda: find(made, learner), learner, data, rounds=2, training=made.training)
    digests = [simulate(one, PEOPLE, learner=learner).digest for one in (agreed(kind, mu=0.0), agreed(kind, "fedavg"))]
    assert digests[0] == digests[1]


def test_a_deployed_run_has_the_bits_of_a_simulated_one(tmp_path):
    """The last model of each node lies on its disk."""
    made = agreed("jax").with_(plan={"rounds": 2})
    learner = build(made, ALLOW)
    simple = simulate(made, PEOPLE, strategy="map", learner=learner)
    assert run(made, PEOPLE, tmp_path, learner=learner)["last"] == simple.digest
    compiled = simulate(made, PEOPLE, strategy="vmap", learner=learner)
    np.testing.assert_allclose(compiled.model["parameters"].values, simple.model["parameters"].values, atol=1e-5)


def test_a_node_that_starts_again_goes_on_from_its_last_model(tmp_path):
    """Broken off once its first model has counted; all that the next one knows of it lies in the directory."""
    made = agreed("jax")
    learner = build(made, ALLOW)

    async def together() -> dict[str, Any]:
        server, counted = Server(made, store=tmp_path / "store", port=0, learner=learner), asyncio.Event()

        def node(name: str) -> Node:
            def watch(fact: Mapping[str, Any]) -> None:
                if fact["what"] == "verdict" and name == "node-0":
                    counted.set()

            return Node(server.url, PEOPLE[name], name=name, directory=tmp_path / name, learner=learner, watch=watch)

        serving = asyncio.create_task(server.serve_async())
        first, *others = [asyncio.create_task(node(name).start_async()) for name in PEOPLE]
        await counted.wait()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await asyncio.gather(node("node-0").start_async(), *others)
        return await serving

    history = asyncio.run(asyncio.wait_for(together(), 100))
    assert history["last"] == simulate(made, PEOPLE, strategy="map", learner=learner).digest


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: agreed("jax", mu=-1), r"options.mu: it is not negative; it is -1"),
        (lambda: agreed("jax", temperature=0), r"options.temperature: it is above 0; it is 0"),
        (lambda: agreed("jax", layer="seen"), r"options.layer: .* leave layer out"),
        (lambda: agreed("keras", layer="sean"), r"options.layer: the model has no layer 'sean'; it has seen, drop, out"),
        (
            lambda: plan(aggregation={"rule": "moon"}),
            r"rule: 'moon' needs a learner that can give what a layer makes of each row; .* can't \(neural ones",
        ),
    ],
)
def test_what_does_not_fit_is_named_when_the_plan_is_read(make: Callable[[], Plan], said):
    wrong = make()
    with pytest.raises(PlanError, match=f"aggregation.{said}"):
        find(wrong, build(wrong, ALLOW))
