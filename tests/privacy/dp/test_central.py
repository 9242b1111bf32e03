"""Central differential privacy through whole runs: clip, exact sums, noise of the right size, budget, replay."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import numpy as np
import pytest
from tests.federation import clients, plan, rows, run

import atoll
from atoll import method
from atoll.cli.show import round_line
from atoll.errors import PlanError
from atoll.keys import new_secret
from atoll.privacy.dp import central
from atoll.privacy.dp.account import account
from atoll.privacy.dp.accountant import epsilon
from atoll.privacy.dp.clip import STEPS, clipped, length, whole
from atoll.server import events
from atoll.server.audit import verify
from atoll.server.machine import begin, transition
from atoll.server.page.past import Past
from atoll.server.replay import replay
from atoll.server.state import Phase
from atoll.store.sql import SqlStore
from atoll.vector import Group, Layout, Tensor, Total

NOISE = {"multiplier": 0.5, "delta": 1e-5}
UNIFORM = {"options": {"weighted": False}}
CAPPED = {"clip": 1.0, "largest_weight": 9.0, "central_noise": NOISE}


def private(privacy=None, **sections):
    return plan(privacy=privacy or {"clip": 1.0, "central_noise": NOISE}, aggregation=UNIFORM, **sections)


def groups(seed: int, size: int = 1000, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    return {
        "parameters": Group(Layout((Tensor("w", (size,)),)), (scale * rng.normal(size=size)).astype(np.float32)),
        "buffers": Group(Layout((Tensor("m", (7,)),), "float64"), scale * rng.normal(size=7)),
    }


def bodies(updates):
    layouts = (
        {name: group.layout for name, group in updates[0].items()} if updates else {"parameters": Layout((Tensor("w", (5,)),))}
    )
    return SimpleNamespace(
        ids=[str(k) for k in range(len(updates))],
        layouts=layouts,
        block=lambda name, lo, hi: [one[name].values[lo:hi] for one in updates],
    )


@pytest.mark.parametrize("scale", [1e-6, 0.01, 1.0, 1e10])
def test_an_update_is_clipped_over_all_groups_together(scale):
    found, norm = clipped(groups(0, scale=scale), 1.0)
    assert norm == pytest.approx(
        math.sqrt(sum(float(np.sum(g.values.astype(float) ** 2)) for g in groups(0, scale=scale).values()))
    )
    assert length(found) <= 1.0 + 1e-6
    if norm <= 1:
        assert found == groups(0, scale=scale)
    else:
        assert length(found) == pytest.approx(1.0, rel=1e-5)


def test_no_update_moves_the_sum_further_than_the_bound_to_the_last_step():
    """In whole numbers, so that there is nothing to round: what a node adds is at most 2²⁰ steps long."""
    for seed in range(30):
        update = groups(seed, size=5000, scale=10.0 ** (seed % 7 - 3))
        total = central.summed(0.7)(bodies([update]), [123.0], 1)
        square = sum(int(value) ** 2 for group in total.groups.values() for value in group.values)
        assert square <= STEPS**2
        alone = central.summed(0.7)(bodies([]), [], 1)
        assert not any(group.values.any() for group in alone.groups.values())


def test_the_sum_is_exact_whatever_the_order():
    updates = [groups(k, scale=0.03) for k in range(9)]
    one, other = (central.summed(1.0)(bodies(some), [1.0] * 9, 9) for some in (updates, updates[::-1]))
    assert one.groups == other.groups
    mean = sum(clipped(u, 1.0)[0]["parameters"].values.astype(float) for u in updates)
    np.testing.assert_allclose(one.groups["parameters"].values / STEPS, mean, atol=9 / STEPS + 1e-6)


def test_a_weight_counts_up_to_the_largest():
    update = groups(1, scale=0.01)
    whole_voice, half, more = (central.summed(1.0, 100.0)(bodies([update]), [w], 1) for w in (100.0, 50.0, 1e9))
    assert more.groups == whole_voice.groups
    np.testing.assert_allclose(half.groups["parameters"].values, whole_voice.groups["parameters"].values / 2, atol=1)


def test_noise_has_the_size_that_was_planned_and_lies_on_the_grid():
    layouts = {"parameters": Layout((Tensor("w", (200_000,)),), "float64")}
    zero = Total({"parameters": Group(layouts["parameters"], np.zeros(200_000))}, 1.0, 5, 5)
    found = central.noised(zero, layouts, 0.3, 2.0, central.fresh(new_secret()), 4.0)
    values = found.groups["parameters"].values
    assert abs(values.std() / (0.3 * 2.0) - 1) < 5 / math.sqrt(2 * values.size)
    steps = values * (STEPS / 0.3)
    assert np.abs(steps - np.rint(steps)).max() < 1e-6
    assert found.weight == 4.0
    assert whole(np.array([1.9, -1.9, 0.0]), 1.0).tolist() == [1.0, -1.0, 0.0]


def test_count_and_sum_together_cost_what_was_planned():
    shares = central.shares(1.3, ["parameters", central.WITHIN])
    assert shares["parameters"] ** -2 + (2 * shares[central.WITHIN]) ** -2 == pytest.approx(1.3**-2)


def test_a_deployed_run_is_noised_stops_in_budget_and_is_replayed_to_the_same_bits(tmp_path):
    noise = {"multiplier": 2.0, "delta": 1e-5, "budget": 4.0}
    agreed = private({"clip": 0.5, "central_noise": noise}, plan={"rounds": 30})
    history = run(agreed, clients(), tmp_path, holdout=atoll.learner.Rows(*rows(9)))
    done = len(history["rounds"])
    assert 1 < done < 30
    assert "privacy budget is spent" in history["reason"]
    assert history["outcome"] == "completed"
    spent = [one["epsilon"] for one in history["rounds"]]
    assert spent == sorted(spent)
    assert spent[-1] == epsilon(2.0, done, 1e-5) <= 4.0 < epsilon(2.0, done + 1, 1e-5)
    assert "key" not in str(history["rounds"])
    store = SqlStore(tmp_path / "store")
    past = Past(store, store.find())
    past.refresh()
    assert past.epsilon == spent[-1]
    assert f"ε {spent[-1]:.3g}" in round_line(history["rounds"][-1] | {"judged": {}}, 30)
    updates = store.updates(store.find().run)
    assert {one.cosine for one in updates} == {None}
    assert {(one.weight, one.norm) for one in updates} == {(1.0, None)}
    assert not any(one.metrics for one in updates)

    async def again():
        return [one async for one in replay(tmp_path / "store", store, store.find())]

    found = asyncio.run(again())
    assert len(found) == done
    assert all(one.stored == one.found for one in found)
    verify(tmp_path / "store", store, store.find())
    with store.pruning([store.find().run], 1.0):
        pass
    assert all(row.noise["key"] is None and row.noise["digest"] for row in store.rounds(store.find().run))
    verify(tmp_path / "store", store, store.find())
    store.close()


def test_noise_differs_from_run_to_run():
    one, other = (atoll.simulate(private(), clients()) for _ in range(2))
    assert one.digest != other.digest
    none, same = (atoll.simulate(plan(privacy={"clip": 1.0}, aggregation=UNIFORM), clients()) for _ in range(2))
    assert none.digest == same.digest
    assert one.rounds[-1]["epsilon"] == epsilon(0.5, 3, 1e-5)
    assert "epsilon" not in none.rounds[-1]


def test_without_noise_the_private_sum_is_the_plain_mean(monkeypatch):
    """The whole path, with noise of nothing: clip, grid and denominators change no more than a grid's step."""
    monkeypatch.setattr(central, "discrete_gaussian", lambda sigma, count, stream: np.zeros(count, np.int64))
    noiseless = atoll.simulate(private({"clip": 100.0, "central_noise": NOISE}), clients())
    plain = atoll.simulate(plan(aggregation=UNIFORM), clients())
    np.testing.assert_allclose(noiseless.model["parameters"].values, plain.model["parameters"].values, atol=1e-3)


@pytest.mark.parametrize("rule", ["fedavg", "fedadam", "fedprox", "scaffold", "feddyn"])
def test_methods_learn_with_little_noise(rule):
    noise = {"multiplier": 0.01, "delta": 1e-5}
    options = {} if rule == "feddyn" else {"weighted": False}
    agreed = plan(
        privacy={"clip": 2.0, "central_noise": noise}, aggregation={"rule": rule, "options": options}, plan={"rounds": 8}
    )
    found = atoll.simulate(agreed, clients(), holdout=atoll.learner.Rows(*rows(9)))
    assert found.holdout["accuracy"] > 0.8


def test_an_adaptive_bound_follows_the_median_length():
    noise = {"multiplier": 0.05, "delta": 1e-5}
    agreed = private({"clip": "adaptive", "central_noise": noise}, plan={"rounds": 40}, training={"learning_rate": 0.5})
    agreed = agreed.with_(training={"epochs": 1}, cohort={"minimum": 2})
    data = clients(10)
    bounds = []
    built = method.find(agreed, atoll.learners.build(agreed))
    found = atoll.simulate(agreed, data, holdout=atoll.learner.Rows(*rows(9)))
    assert found.holdout["accuracy"] > 0.8
    state = built.init({"parameters": found.model["parameters"]})
    assert state["clip"].values.tolist() == [method.FIRST]
    for share, up in ((0.5, False), (-0.5, True)):  # all within: it falls; all beyond: it rises
        layout = central.WITHIN_LAYOUT
        total = Total(
            {"parameters": found.model["parameters"], "within": Group(layout, np.array([share], np.float32))}, 1.0, 1, 1
        )
        bounds.append(float(built.step(state, total)["clip"].values[0]) > method.FIRST)
        assert bounds[-1] is up


def test_secret_draws_ask_each_for_itself_and_may_ask_nobody():
    agreed = plan(cohort={"draw": "poisson", "fraction": 0.3, "minimum": 3}, plan={"rounds": 200})
    data = {f"n{k}": f"n{k}" for k in range(5)}
    seen = []
    for secret in (b"one", b"one", b"two"):
        state, _ = begin("r", agreed, "m", 0.0, late=False, secret=secret)
        state, commands = transition(state, events.Joined(0.0, data))
        asked = []
        for _ in range(150):
            train = next((c for c in commands if isinstance(c, events.Train)), None)
            assert train is not None
            asked.append(frozenset(train.nodes))
            for node in train.nodes:
                address = events.Address("r", train.round, train.attempt, node)
                state, commands = transition(state, events.Appended(0.0, address, "d"))
            (close,) = (c for c in commands if isinstance(c, events.Close))
            assert set(close.accepted) == set(train.nodes)
            state, commands = transition(state, events.Closed(0.0, "m"))
        seen.append(asked)
    assert seen[0] == seen[1] != seen[2]
    sizes = [len(one) for one in seen[2]]
    assert 0 in sizes
    assert abs(np.mean(sizes) - 1.5) < 5 * math.sqrt(5 * 0.3 * 0.7 / 150)
    pairs = np.mean([{"n0", "n1"} <= one for one in seen[0] + seen[2]])
    assert abs(pairs - 0.09) < 5 * math.sqrt(0.09 * 0.91 / 300)


def test_a_sampled_run_costs_less_and_divides_by_what_was_expected(tmp_path):
    agreed = private({"clip": 1.0, "central_noise": NOISE}, cohort={"draw": "poisson", "fraction": 0.3, "minimum": 3})
    history = run(agreed, clients(4), tmp_path, holdout=atoll.learner.Rows(*rows(9)))
    assert len(history["rounds"]) == 3
    assert history["rounds"][-1]["epsilon"] == pytest.approx(epsilon(0.5, 3, 1e-5, 0.3), rel=1e-2)
    assert history["rounds"][-1]["epsilon"] < epsilon(0.5, 3, 1e-5)
    store = SqlStore(tmp_path / "store")
    for row in store.rounds(store.find().run):
        assert row.noise["voices"] == pytest.approx(0.3 * row.registered)

    async def again():
        return [one async for one in replay(tmp_path / "store", store, store.find())]

    assert all(one.stored == one.found for one in asyncio.run(again()))
    store.close()


def test_noise_is_solved_for_the_planned_rounds():
    found = account(private({"clip": 1.0, "central_noise": {"epsilon": 3.0, "delta": 1e-5}}, plan={"rounds": 7}))
    assert epsilon(found.multiplier, 7, 1e-5) <= 3.0 < epsilon(found.multiplier * 0.99, 7, 1e-5)
    assert not found.over(6)
    assert "ε" in found.over(7)


@pytest.mark.parametrize(
    ("privacy", "sections", "said"),
    [
        ({"clip": 0.0}, {}, "clip: the longest that an update may be"),
        ({"clip": -1.0, "central_noise": NOISE}, {}, "clip: the longest"),
        ({"clip": "adapted", "central_noise": NOISE}, {}, 'above 0, or "adaptive"'),
        ({"clip": "adaptive"}, {}, "central_noise"),
        ({"central_noise": NOISE}, {}, "give clip"),
        ({"clip": 1.0, "central_noise": {"delta": 1e-5}}, {}, "epsilon, or multiplier"),
        ({"clip": 1.0, "central_noise": {"delta": 1e-5, "epsilon": 1.0, "multiplier": 1.0}}, {}, "both are given"),
        ({"clip": 1.0, "central_noise": {"delta": 1e-5, "epsilon": 1.0, "budget": 1.0}}, {}, "leave budget out"),
        ({"clip": 1.0, "central_noise": {"epsilon": 1.0}}, {}, "delta: is missing"),
        ({"clip": 1.0, "central_noise": {"epsilon": 0.0, "delta": 0.1}}, {}, "epsilon"),
        ({"clip": 1.0, "central_noise": {"multiplier": 1.0, "delta": 0.4}}, {}, "cohort.minimum"),
        ({"clip": 1.0, "central_noise": {"multiplier": 1.0, "delta": 1e-5, "budget": 0.1}}, {}, "one round takes ε"),
        ({"clip": 1.0, "central_noise": NOISE}, {"aggregation": {"options": {"weighted": True}}}, "weighted = false"),
        ({"clip": 1.0, "central_noise": NOISE}, {"aggregation": {"rule": "median", "options": {}}}, "no mean of updates"),
        ({"clip": 1.0, "central_noise": NOISE}, {"aggregation": {"rule": "newton", "options": {}}}, "whole"),
        (CAPPED, {"aggregation": {"rule": "newton", "options": {}}}, "whole"),
        (CAPPED, {"aggregation": {"rule": "fednova", "options": {}}}, "beside"),
        ({"clip": 1.0, "central_nois": NOISE}, {}, "did you mean 'central_noise'"),
        ({"clip": 1.0}, {"cohort": {"draw": "poisson", "buffer": 3}}, "leave cycle and buffer out"),
    ],
)  # fmt: skip
def test_what_doesn_t_go_together_is_refused_in_one_line(privacy, sections, said):
    with pytest.raises(PlanError) as caught:
        atoll.simulate(plan(**{"privacy": privacy, "aggregation": UNIFORM, **sections}), clients())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_that_spent_its_budget_doesn_t_go_on():
    agreed = private({"clip": 1.0, "central_noise": NOISE})
    past = events.Past(1, 1, {}, {"n": "n"}, "m", atoll.server.state.Course(), ())
    from atoll.server.machine import resume

    state, commands = resume("r", agreed, past, 0.0, spent="the privacy budget is spent")
    assert state.phase in (Phase.ENDING, Phase.ENDED)
    assert any("budget" in one.reason for one in commands if isinstance(one, events.Finish | events.End))
