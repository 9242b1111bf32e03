"""What holds under any noise: joint bounds, public denominators, a relation that is said, no discount that isn't earned."""

from __future__ import annotations

import numpy as np
import pytest
from tests.federation import clients, plan

import atoll
from atoll import method
from atoll.cli.privacy import told
from atoll.keys import new_secret
from atoll.privacy.dp import central, distributed, local
from atoll.privacy.dp.account import RELATIONS, account
from atoll.vector import Group, Layout, Tensor

NOISE = {"multiplier": 1.0, "delta": 1e-3}
UNIFORM = {"options": {"weighted": False}}
MECHANISMS = {
    "central_noise": ({"clip": 1.0, "central_noise": NOISE}, {}),
    "poisson": ({"clip": 1.0, "central_noise": NOISE}, {"draw": "poisson", "fraction": 0.3}),
    "tree_noise": ({"clip": 1.0, "tree_noise": NOISE}, {"turns": 3}),
    "distributed_noise": ({"clip": 1.0, "secure_aggregation": True, "distributed_noise": NOISE}, {}),
    "local_noise": ({"clip": 1.0, "local_noise": NOISE}, {}),
    "example_noise": ({"example_noise": {**NOISE, "clip": 1.0}}, {}),
    "rows": ({"example_noise": {**NOISE, "clip": 1.0, "rows": 80}}, {}),
}


def agreed(name: str, **cohort):
    privacy, more = MECHANISMS[name]
    return plan(privacy=privacy, aggregation=UNIFORM, cohort={"minimum": 3, **more, **cohort})


@pytest.mark.parametrize(
    "make", [lambda g: local.noisy(g, 1.0, 1.0, new_secret()), lambda g: distributed.noisy(g, 1.0, 1.0, 3, new_secret())]
)
def test_a_node_s_own_noise_goes_to_an_update_that_is_bounded_over_all_groups(monkeypatch, make):
    for module in (local, distributed):
        monkeypatch.setattr(module, "discrete_gaussian", lambda sigma, count, stream: np.zeros(count, np.int64))
    update = {
        name: Group(Layout((Tensor("w", (9,)),)), np.full(9, size, np.float32))
        for name, size in (("parameters", 2.0), ("buffers", 7.0))
    }
    found = make(update)
    lengths = {name: float(np.linalg.norm(group.values.astype(float))) for name, group in found.items()}
    assert 0.999 < np.hypot(*lengths.values()) <= 1.0
    assert lengths["buffers"] / lengths["parameters"] == pytest.approx(3.5, rel=1e-3)  # made smaller alike: the direction stays


@pytest.mark.parametrize(
    ("name", "cohort", "voices"),
    [
        ("central_noise", {}, 7),
        ("central_noise", {"buffer": 5}, 5),
        ("poisson", {}, 0.3 * 20),
        ("tree_noise", {}, 20 / 3),
    ],
)
def test_what_a_sum_is_divided_by_is_known_beforehand_whoever_answers(name, cohort, voices):
    mine = agreed(name, **cohort)
    for survivors in (0, 3, 7):
        made = method.noise(mine, account(mine), method.Round(1, 1, 7, 20, survivors), [])
        assert made["voices"] == pytest.approx(voices)


def test_a_node_counts_once_or_by_a_weight_that_is_capped(monkeypatch):
    """A node with ten times the rows moves the model no further than the others."""
    monkeypatch.setattr(central, "discrete_gaussian", lambda sigma, count, stream: np.zeros(count, np.int64))
    x, y = clients(1)["node-0"]
    many = np.concatenate([x] * 10), np.concatenate([y] * 10)
    for privacy, options in (
        (MECHANISMS["central_noise"][0], UNIFORM),
        ({**MECHANISMS["central_noise"][0], "largest_weight": 40.0}, {}),
    ):
        one = plan(
            privacy=privacy, aggregation=options, training={"steps": 1, "epochs": None, "batch_size": 400}, plan={"rounds": 1}
        )
        same, more = (atoll.simulate(one, {**clients(), "node-0": data}) for data in ((x, y), many))
        np.testing.assert_allclose(more.model["parameters"].values, same.model["parameters"].values, atol=1e-4)


@pytest.mark.parametrize("name", MECHANISMS)
def test_each_mechanism_says_what_its_neighbours_are(name):
    assert told(agreed(name), 40)["neighbours"] == account(agreed(name), 40).relation == RELATIONS[name]
    assert "neighbours" in RELATIONS[name]


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_draw_that_others_know_earns_no_discount(name):
    about = account(agreed(name), 40)
    assert about.rate == {"poisson": 0.3, "example_noise": 0.2, "rows": 0.1}.get(name, 1.0)
    if not MECHANISMS[name][1]:
        assert account(agreed(name, fraction=0.1), 40).rate == about.rate
