"""No mechanism's noise is a float, none comes from a generator that can be foretold, and no rounding passes a bound."""

from __future__ import annotations

import numpy as np
import pytest
from tests.federation import clients, plan, rows
from tests.privacy.dp.test_central import bodies

import atoll
from atoll import learners, method
from atoll.keys import Keystream, new_secret
from atoll.learner import Rows
from atoll.privacy.dp import central, distributed, example, local
from atoll.privacy.dp.clip import STEPS, length, shortened, whole
from atoll.vector import Group, Layout, Tensor

UNIFORM = {"options": {"weighted": False}}
NOISE = {"multiplier": 1.0, "delta": 1e-3}
MECHANISMS = {
    "central_noise": {"clip": 1.0, "central_noise": NOISE},
    "adaptive": {"clip": "adaptive", "central_noise": NOISE},
    "distributed_noise": {"clip": 1.0, "secure_aggregation": True, "distributed_noise": NOISE},
    "adaptive, under masks": {"clip": "adaptive", "secure_aggregation": True, "distributed_noise": NOISE},
    "local_noise": {"clip": 1.0, "local_noise": NOISE},
    "example_noise": {"example_noise": {**NOISE, "clip": 1.0}},
    "tree_noise": {"clip": 1.0, "tree_noise": {"multiplier": 1.0, "delta": 1e-3}},
}


def agreed(name: str):
    cohort = {"cohort": {"turns": 3}} if name == "tree_noise" else {}
    return plan(privacy=MECHANISMS[name], aggregation=UNIFORM, **cohort)


def awkward() -> np.ndarray:
    """Numbers of which a sum of squares in float32 is too small: one is large, and hides thousands that are small."""
    values = np.full(1 << 16, 105.0005 / STEPS, np.float32)
    values[0] = 1.0
    return values


@pytest.mark.parametrize("grid", [STEPS, 1 << 17])
def test_no_rounding_lets_an_update_pass_its_bound(grid, monkeypatch):
    """In whole numbers, where nothing is rounded; that float32 is not enough for its length is a part of the test."""
    values = awkward()
    quick = float(np.sqrt(np.cumsum(values * values, dtype=np.float32)[-1]))
    passed = whole(values, shortened(quick, 1.0) * grid)
    exact = {"parameters": Group(Layout((Tensor("w", (values.size,)),)), values)}
    found = whole(values, shortened(length(exact), 1.0) * grid)
    assert sum(int(v) ** 2 for v in found) <= grid**2
    if grid == STEPS:
        assert sum(int(v) ** 2 for v in passed) > grid**2, "float32 would have done"
    monkeypatch.setattr(local, "discrete_gaussian", lambda sigma, count, stream: np.zeros(count, np.int64))
    monkeypatch.setattr(distributed, "discrete_gaussian", lambda sigma, count, stream: np.zeros(count, np.int64))
    for made in (local.noisy(exact, 1.0, 1.0, new_secret()), distributed.noisy(exact, 1.0, 1.0, 3, new_secret())):
        assert sum(int(v * STEPS) ** 2 for v in made["parameters"].values.astype(float)) <= STEPS**2
    total = central.summed(1.0)(bodies([exact]), [1.0], 1)
    assert sum(int(v) ** 2 for v in total.groups["parameters"].values) <= STEPS**2


def test_a_row_s_gradient_passes_no_bound_either():
    values = awkward()

    class One:
        """A learner whose only row has this gradient."""

        def fit(self, groups, rows, steps, batch_size, rng, correct):
            correct(values, values)

    private = example.Private(learners.build(plan(privacy=MECHANISMS["example_noise"])), plan())
    private._inner = One()
    start = {"parameters": Group(Layout((Tensor("w", (values.size,)),)), np.zeros_like(values))}
    seen = private._summed(start, start["parameters"].values, Rows(np.zeros((1, 4)), np.zeros(1)), 1.0, np.random.default_rng(0))
    assert sum(int(v) ** 2 for v in seen) <= STEPS**2


@pytest.mark.parametrize("name", MECHANISMS)
def test_all_noise_is_whole_numbers_from_a_fresh_key_of_the_system_s_generator(name, monkeypatch):
    """Every draw is discrete, from AES under a key that no other draw has; without such draws there is no noise at all."""
    keys, drawn = [], []
    real = Keystream.__init__

    def made(self, key):
        keys.append(key)
        real(self, key)

    def draw(module):
        inner = module.discrete_gaussian

        def watched(sigma, count, stream):
            assert isinstance(stream, Keystream)
            assert sigma >= 4.0  # so wide, in steps of its grid, that sums of such draws are again discrete Gaussians
            values = inner(sigma, count, stream)
            assert values.dtype == np.int64
            drawn.append(count)
            return values

        monkeypatch.setattr(module, "discrete_gaussian", watched)

    monkeypatch.setattr(Keystream, "__init__", made)
    for module in {central, distributed, local, example, method.tree}:
        draw(module)
    atoll.simulate(agreed(name), clients(3))
    assert len(drawn) >= (3 if "central" in name or name in ("adaptive", "tree_noise") else 9), "fewer draws than rounds"
    assert len(set(keys)) == len(keys) or name == "tree_noise", "a key made two streams"  # a tree takes off what it added
    monkeypatch.undo()
    for module in {central, distributed, local, example, method.tree}:
        monkeypatch.setattr(module, "discrete_gaussian", lambda sigma, count, stream: np.zeros(count, np.int64))
    if name == "example_noise":
        monkeypatch.setattr(example, "_drawn", lambda rows, rate, stream: np.arange(int(rows * rate)))
    one, other = (atoll.simulate(agreed(name), clients(3)) for _ in range(2))
    assert one.digest == other.digest, "something else than these draws is random"


@pytest.mark.parametrize("name", ["local_noise", "distributed_noise"])
def test_what_leaves_a_node_lies_on_the_grid_whatever_its_rows_are(name):
    """Mironov's attack reads off which floats can come out; here the same ones can, for any update."""
    made = method.find(agreed(name), learners.build(agreed(name)))
    unit = STEPS if name == "local_noise" else 1 / distributed.step(1.0)
    for seed in range(4):
        learner = learners.build(agreed(name))
        x, y = rows(seed)
        pace = plan().training.pace(len(x), 1, 3)
        _, update = made.local(learner, learner.initial(0), {}, Rows(x, y), pace, np.random.default_rng(0))
        steps = update.groups["parameters"].values.astype(float) * unit
        assert np.abs(steps).max() > 1000
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
