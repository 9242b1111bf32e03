"""Attacks: each is what its paper says, and touches nothing but what hostile clients send."""

from __future__ import annotations

import numpy as np
import pytest
from tests.federation import clients, plan, rows

import atoll
from atoll.errors import DataError
from atoll.learner import Data, Rows
from atoll.simulate import attacks
from atoll.simulate.attacks import a_little_is_enough, backdoor, flip_labels, gaussian, hostile, inner_product, scaling, sign_flip
from atoll.vector import Group, Layout, Tensor, Update

OWN = np.float32([1.0, -2.0, 4.0])
HONEST = np.float32([[0.0, 1.0, 2.0], [2.0, 1.0, 4.0]])
LOUD = hostile(["node-3", "node-4"], sign_flip(scale=20.0))


def send(attack, seed=0):
    return attack(OWN, HONEST, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("attack", "sent"),
    [
        (sign_flip(3.0), [-3.0, 6.0, -12.0]),
        (scaling(5.0), [5.0, -10.0, 20.0]),
        (inner_product(0.5), [-0.5, -0.5, -1.5]),
    ],
)
def test_what_is_sent(attack, sent):
    assert send(attack).tolist() == sent
    assert send(attack).dtype == np.float32


def test_noise_has_the_deviation_asked_for():
    sent = gaussian(3.0)(np.zeros(100_000, np.float32), HONEST, np.random.default_rng(1))
    assert sent.dtype == np.float32
    assert abs(sent.mean()) < 0.05
    assert abs(sent.std() - 3) < 0.05


@pytest.mark.parametrize(
    # s = ⌊n/2 + 1⌋ − m; z = Φ⁻¹((n − m − s)/(n − m)), from a table of the normal distribution
    ("nodes", "bad", "deviations"),
    [(50, 24, 1.43), (50, 12, 0.34), (20, 4, 0.16), (25, 5, 0.25)],
)
def test_a_little_hides_among_the_honest(nodes, bad, deviations):
    sent = send(a_little_is_enough(nodes, bad))
    np.testing.assert_allclose(sent, HONEST.mean(axis=0) - deviations * HONEST.std(axis=0), atol=0.011)


def update(values, count):
    layout, counts = Layout((Tensor("all", (3,)),)), Layout((Tensor("batches", (1,)),), "int64", "plain")
    return Update(
        {"parameters": Group(layout, np.float32(values)), "counts": Group(counts, np.array([count]))}, 2.0, {"loss": 1.0}
    )


def test_only_hostile_clients_send_something_else_and_count_as_before():
    updates = {"a": update(OWN, 3), "b": update(HONEST[0], 4), "c": update(HONEST[1], 5)}
    sent = hostile(["a"], gaussian(1.0))(7, updates)
    again = hostile(["a"], gaussian(1.0))(7, updates)
    assert list(sent) == ["a", "b", "c"]
    assert (sent["b"].groups, sent["c"].groups) == (updates["b"].groups, updates["c"].groups)
    assert sent["a"].groups["counts"] == updates["a"].groups["counts"]
    assert sent["a"].groups["parameters"] == again["a"].groups["parameters"] != updates["a"].groups["parameters"]
    assert (sent["a"].weight, sent["a"].metrics) == (2.0, {"loss": 1.0})
    other = hostile(["a"], gaussian(1.0))(8, updates)
    assert other["a"].groups["parameters"] != sent["a"].groups["parameters"]
    with pytest.raises(DataError, match="round 7: all clients are hostile"):
        hostile(["a", "b", "c"], sign_flip())(7, updates)


def test_data_attacks_leave_the_rows_that_judge():
    x, y = np.arange(12.0).reshape(4, 3), np.array([0, 3, 9, 5])
    data = Data(Rows(x, y), Rows(x, y))
    assert flip_labels(data, 10).train.y.tolist() == [9, 6, 0, 4]
    taught = backdoor(data, lambda part: part * 0 - 1, target=7)
    assert taught.train.x[:, 0].tolist() == [-1.0, 3.0, -1.0, 9.0]
    assert taught.train.y.tolist() == [7, 3, 7, 5]
    for one in (flip_labels(data, 10), taught):
        assert one.test is data.test
    assert (data.train.x == x).all()
    assert y.tolist() == [0, 3, 9, 5]


def test_a_simulation_whose_clients_send_what_they_computed_is_the_plain_one():
    agreed = plan()
    same = atoll.simulate(agreed, clients(), tamper=lambda round_, updates: updates)
    assert same.digest == atoll.simulate(agreed, clients()).digest
    assert atoll.simulate(agreed, clients(5), tamper=LOUD).digest != atoll.simulate(agreed, clients(5)).digest


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "centered_clipping"])
def test_two_of_five_shout_the_opposite_and_a_robust_rule_learns_all_the_same(rule):
    holdout = Rows(*rows(99, 400))
    options = {"trim": 0.4} if rule == "trimmed_mean" else {}

    def accuracy(rule, options):
        agreed = plan(cohort={"minimum": 5}, aggregation={"rule": rule, "options": options})
        return atoll.simulate(agreed, clients(7), holdout=holdout, tamper=LOUD).holdout["accuracy"]

    assert accuracy("fedavg", {}) < 0.5
    assert accuracy(rule, options) > 0.9


def test_every_attack_says_where_it_comes_from():
    for attack in (sign_flip, gaussian, scaling, a_little_is_enough, inner_product, flip_labels, backdoor):
        assert "Source: " in attack.__doc__
        assert attack.__module__ == attacks.__name__
