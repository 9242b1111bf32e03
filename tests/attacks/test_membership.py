"""Was it in? Canaries audit what noise promises: a lower bound on ε from one run each, below the claim with noise, above without.

Many canaries are in or out by a coin each, all in one run, and somebody who sees only the result guesses which. Under ε the
number of right guesses is no more, in distribution, than of coins that fall right with a chance of e^ε/(1 + e^ε): so many right
ones give a lower bound on ε with 95 % confidence. Source: Steinke, Nasr, Jagielski 2023, "Privacy Auditing with One (1) Training
Run", theorem 3.1; δ is so small here that its part is nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tests.federation import plan

import atoll
from atoll import learners
from atoll.keys import new_secret
from atoll.learner import Rows
from atoll.privacy.dp import central, distributed, example, local
from atoll.privacy.dp.account import account
from atoll.privacy.dp.accountant import epsilon
from atoll.vector import Group, Layout, Tensor

CANARIES = 400
COINS = np.random.default_rng(0).random(CANARIES) < 0.5
DELTA = 1e-9
UNIFORM = {"options": {"weighted": False}}


def lower_bound(right: int, guesses: int, chance_of_error: float = 0.05) -> float:
    """The least ε that a number of right guesses leaves possible, with 95 % confidence."""

    def tail(eps: float) -> float:
        chance = 1 / (1 + math.exp(-eps))
        logs = [
            math.lgamma(guesses + 1) - math.lgamma(k + 1) - math.lgamma(guesses - k + 1)
            + k * math.log(chance) + (guesses - k) * math.log1p(-chance) for k in range(right, guesses + 1)
        ]  # fmt: skip
        return sum(map(math.exp, logs))

    low, high = 0.0, 20.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) < chance_of_error else (low, middle)
    return low


def audited(scores: np.ndarray) -> float:
    """The best of the bounds from guessing only the surest few, at both ends; each with its share of the 5 %."""
    order, found = np.argsort(scores), []
    for few in (20, 60, 180):
        right = int(COINS[order[-few:]].sum() + (~COINS[order[:few]]).sum())
        found.append(lower_bound(right, 2 * few, 0.05 / 3))
    return max(found)


def silent(monkeypatch, *modules):
    for module in modules:
        monkeypatch.setattr(module, "discrete_gaussian", lambda sigma, count, stream: np.zeros(count, np.int64))


def of_nodes(privacy) -> tuple[float, float]:
    """Whether each node's update was in the sum: one round, each canary's update along an axis of its own."""
    agreed = plan(
        privacy=privacy, aggregation=UNIFORM, plan={"rounds": 1}, model={"inputs": CANARIES - 1}, training={"epochs": 1}
    )
    x = np.zeros((1, CANARIES - 1))
    data = {f"n{k:03}": (x, np.zeros(1)) for k in range(CANARIES)}

    def tamper(round_, updates):
        sent = {}
        for k, (name, update) in enumerate(updates.items()):
            group = update.groups["parameters"]
            values = np.zeros(CANARIES)
            values[k] = 1e6 * COINS[k]  # as long as it likes: the server makes it shorter
            sent[name] = replace(update, groups={"parameters": group.with_values(values)})
        return sent

    found = atoll.simulate(agreed, data, tamper=tamper)
    return audited(found.model["parameters"].values), account(agreed).spent(1)


def of_rows() -> tuple[float, float]:
    """Whether each row was trained on: a few steps over rows along axes of their own."""
    noise = {"multiplier": 3.0, "delta": DELTA, "clip": 1.0}
    steps = 4
    agreed = plan(
        privacy={"example_noise": noise},
        plan={"rounds": 1},
        model={"inputs": CANARIES},
        training={"epochs": None, "steps": steps, "batch_size": 500, "learning_rate": 1e-3},
    )
    x = np.eye(CANARIES)[COINS] * 1e4
    learner = learners.build(agreed)
    private = example.Private(learner, agreed)
    fit = private.fit(learner.initial(0), Rows(x, np.ones(len(x))), steps, 500, np.random.default_rng(0))
    about = account(agreed, len(x))
    assert about.rate == 1.0
    return audited(fit.groups["parameters"].values[:-1]), about.spent(1)


def of_shares(multiplier: float) -> tuple[float, float]:
    """Whether each node's update was in a sum that has noise in shares, by who sees that sum: the server of a secure one."""
    layout, total = Layout((Tensor("w", (CANARIES,)),)), np.zeros(CANARIES)
    for k in range(CANARIES):
        values = np.zeros(CANARIES, np.float32)
        values[k] = 1e6 * COINS[k]
        total += distributed.noisy({"w": Group(layout, values)}, 0.7, multiplier, CANARIES, new_secret())["w"].values
    return audited(total), epsilon(multiplier, 1, DELTA)


CENTRAL = {"clip": 0.7, "central_noise": {"multiplier": 2.0, "delta": DELTA}}


def test_whether_a_node_took_part_can_t_be_told_better_than_promised():
    found, claimed = of_nodes(CENTRAL)
    assert found < claimed < 4.0


def test_without_noise_the_same_audit_finds_far_more_than_was_promised(monkeypatch):
    silent(monkeypatch, central, example, local)
    found, claimed = of_nodes(CENTRAL)
    assert found > claimed + 1
    found, claimed = of_rows()
    assert found > claimed + 0.4


def test_whether_a_node_s_part_is_in_a_secure_sum_can_t_be_told_better_than_promised(monkeypatch):
    found, claimed = of_shares(2.0)
    assert found < claimed < 4.0
    silent(monkeypatch, distributed)
    assert of_shares(2.0)[0] > claimed + 1


def test_whether_a_row_was_trained_on_can_t_be_told_better_than_promised():
    found, claimed = of_rows()
    assert found < claimed < 4.5


def test_half_the_noise_that_was_promised_is_found_out(monkeypatch):
    """The audit notices not only that noise is missing, but that it is far too little."""
    real = central.discrete_gaussian
    monkeypatch.setattr(central, "discrete_gaussian", lambda sigma, count, stream: real(sigma / 16, count, stream))
    found, claimed = of_nodes(CENTRAL)
    assert found > claimed


def test_the_bound_itself():
    assert lower_bound(50, 100) == pytest.approx(0.0, abs=1e-3)
    assert lower_bound(100, 100) == pytest.approx(math.log(0.05 ** (1 / 100) / (1 - 0.05 ** (1 / 100))), abs=1e-3)
    assert lower_bound(90, 100) < math.log(9) < lower_bound(98, 100)
