"""Noise in shares inside secure sums: as much as was promised, exact, counted by who survived, refused where it falls short."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tests.federation import clients, plan, rows, run

import atoll
from atoll.errors import AtollError, PlanError, PrivacyError
from atoll.keys import new_secret
from atoll.learner import Rows
from atoll.privacy.dp import distributed
from atoll.privacy.dp.account import account
from atoll.privacy.dp.accountant import epsilon
from atoll.privacy.fixed import Fixed
from atoll.store.sql import SqlStore
from atoll.vector import Group, Layout, Tensor

SHARED = {"secure_aggregation": True, "clip": 1.0, "distributed_noise": {"multiplier": 1.0, "delta": 1e-5}}
UNIFORM = {"options": {"weighted": False}}


def test_the_sum_of_shares_is_the_noise_that_was_promised_and_exact_in_words():
    layout = Layout((Tensor("w", (20_000,)),))
    zero = {"parameters": Group(layout, np.zeros(20_000, np.float32))}
    bound, noise, nodes = 0.3, 1.5, 9
    shares = [distributed.noisy(zero, bound, noise, nodes, new_secret())["parameters"].values for _ in range(nodes)]
    total = np.sum(shares, axis=0, dtype=np.float64)
    assert abs(total.std() / (noise * bound) - 1) < 5 / math.sqrt(2 * total.size)
    steps = total / distributed.step(bound)
    assert np.array_equal(steps, np.rint(steps))
    code = Fixed(distributed.widest(bound, noise, nodes), 2048, 64)
    assert np.array_equal(code.decode(np.sum([code.encode(one) for one in shares], axis=0, dtype=np.uint64)), total)


def test_a_share_is_no_longer_than_the_bound_to_the_last_step(monkeypatch):
    monkeypatch.setattr(distributed, "discrete_gaussian", lambda sigma, count, stream: np.zeros(count, np.int64))
    rng = np.random.default_rng(0)
    for bound in (0.01, 1.0, 7.3):
        layout = Layout((Tensor("w", (999,)),), "float64")
        update = {"parameters": Group(layout, rng.normal(size=999) * 100)}
        found = distributed.noisy(update, bound, 1.0, 3, new_secret())["parameters"].values / distributed.step(bound)
        assert sum(int(value) ** 2 for value in found) <= (bound / distributed.step(bound)) ** 2


def test_more_survivors_bring_more_noise_and_too_few_none_of_it_out():
    assert distributed.actual(2.0, 5, 5, 2) == 2.0
    assert distributed.actual(2.0, 8, 5, 2) == pytest.approx(2.0 * math.sqrt(2))
    with pytest.raises(PrivacyError, match="falls short"):
        distributed.actual(2.0, 4, 5, 0)


def test_actual_noise_of_each_round_is_what_counts():
    mine = account(plan(privacy=SHARED, aggregation=UNIFORM))
    assert mine.spent_by([1.0, 1.0]) == epsilon(1.0, 2, 1e-5)
    assert mine.spent_by([2.0, 2.0, 2.0, 2.0]) == pytest.approx(epsilon(1.0, 1, 1e-5))
    assert epsilon(1.0, 1, 1e-5) < mine.spent_by([1.0, 3.0]) < epsilon(1.0, 2, 1e-5)


def test_a_deployed_secure_run_is_noised_by_its_nodes(tmp_path):
    noise = {"multiplier": 3.0, "delta": 1e-5, "budget": 2.5}
    agreed = plan(privacy={**SHARED, "distributed_noise": noise}, aggregation=UNIFORM, plan={"rounds": 9}, cohort={"minimum": 3})
    history = run(agreed, clients(4), tmp_path, holdout=Rows(*rows(9)))
    assert "privacy budget is spent" in history["reason"]
    store = SqlStore(tmp_path / "store")
    closed = store.rounds(store.find().run)
    assert len(closed) == account(agreed).most < 9
    noises = [3.0 * math.sqrt(row.accepted / 3) for row in closed]
    assert [row.noise["multiplier"] for row in closed] == pytest.approx(noises)
    assert history["rounds"][-1]["epsilon"] == pytest.approx(account(agreed).spent_by(noises))
    store.close()


def test_a_simulated_secure_run_is_the_plain_mean_but_for_noise(monkeypatch):
    agreed = plan(privacy={**SHARED, "clip": 50.0}, aggregation=UNIFORM)
    assert atoll.simulate(agreed, clients(4)).digest != atoll.simulate(agreed, clients(4)).digest
    monkeypatch.setattr(distributed, "discrete_gaussian", lambda sigma, count, stream: np.zeros(count, np.int64))
    quiet, plain = atoll.simulate(agreed, clients(4)), atoll.simulate(plan(aggregation=UNIFORM), clients(4))
    np.testing.assert_allclose(quiet.model["parameters"].values, plain.model["parameters"].values, atol=0.01)
    four = quiet.rounds[-1]["epsilon"]
    assert four == pytest.approx(account(agreed).spent_by([math.sqrt(4 / 3)] * 3))
    assert not quiet.rounds[-1]["nodes"]


def test_rows_noise_goes_into_secure_sums_and_a_node_s_own_would_be_cut_there():
    rows = {"example_noise": {"multiplier": 1.0, "delta": 1e-3, "clip": 1.0}}
    assert atoll.simulate(plan(privacy={"secure_aggregation": True, **rows}), clients(4)).rounds
    own = {"clip": 1.0, "local_noise": {"multiplier": 0.5, "delta": 1e-5}}
    for guard in ("secure_aggregation", "encryption"):
        with pytest.raises(PlanError, match="take distributed_noise, or no sums"):
            plan(privacy={guard: True, **own})
    for noise in ({"clip": 1.0, "local_noise": own["local_noise"]}, rows):
        with pytest.raises(PlanError, match="its weight would tell of rows: leave largest_weight out"):
            plan(privacy={**noise, "largest_weight": 5.0})


def test_shares_are_not_compressed():
    with pytest.raises(PlanError, match="compression"):
        atoll.simulate(plan(privacy=SHARED, aggregation=UNIFORM, compression={"up": ["8bit"]}), clients(4))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"secure_aggregation": False}, "add secure_aggregation"),
        ({"clip": None}, "give clip"),
        ({"bits": 32, "largest_weight": 5.0}, "leave bits out"),
        ({"largest_weight": 5.0}, "one voice"),
        ({"distributed_noise": None, "central_noise": {"multiplier": 1.0, "delta": 1e-5}}, "take distributed_noise"),
        ({"distributed_noise": {"multiplier": 1e-9, "delta": 1e-5}}, "can't be written exactly"),
        ({"distributed_noise": {"multiplier": 1.0, "delta": 0.4}}, "cohort.minimum"),
        ({"clip": "adaptive"}, "central_noise"),
    ],
)
def test_what_doesn_t_go_together(change, said):
    with pytest.raises((PlanError, AtollError), match=said):
        atoll.simulate(plan(privacy={**SHARED, **change}, aggregation=UNIFORM), clients(4))
