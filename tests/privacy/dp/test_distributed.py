"""Noise in shares inside secure sums: as much as was promised, exact, counted by who survived, refused where it falls short."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
from tests.federation import clients, plan, rows, run
from tests.server.test_retention import replayed

import atoll
from atoll import learners, method
from atoll.errors import AtollError, LayoutError, PlanError, PrivacyError
from atoll.keys import new_secret
from atoll.learner import Rows
from atoll.node.runtime import Node
from atoll.privacy.choose import link
from atoll.privacy.dp import central, distributed
from atoll.privacy.dp.account import account
from atoll.privacy.dp.accountant import epsilon
from atoll.privacy.fixed import Fixed
from atoll.privacy.secagg.update import Code
from atoll.server.runtime import Server
from atoll.store.sql import SqlStore
from atoll.vector import Group, Layout, Tensor, Total, Update

SHARED = {"secure_aggregation": True, "clip": 1.0, "distributed_noise": {"multiplier": 1.0, "delta": 1e-5}}
UNIFORM = {"options": {"weighted": False}}
ADAPTIVE = {**SHARED, "clip": "adaptive"}


@pytest.fixture
def quiet(monkeypatch):
    """Noise of nothing, so that what is under it can be compared."""
    monkeypatch.setattr(distributed, "discrete_gaussian", lambda sigma, count, stream: np.zeros(count, np.int64))


def bounded(**sections):
    """A plan with an adaptive bound under masks, and four nodes in each round."""
    return plan(privacy=ADAPTIVE, aggregation=UNIFORM, **{"cohort": {"minimum": 4}, **sections})


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
        ({"distributed_noise": None, "central_noise": SHARED["distributed_noise"]}, "central_noise .* take distributed"),
        ({"distributed_noise": None, "tree_noise": SHARED["distributed_noise"]}, "tree_noise .* take distributed"),
        ({"distributed_noise": None, "clip": "adaptive"}, "give one, or a number"),
        ({"distributed_noise": {"multiplier": 1e-9, "delta": 1e-5}}, "can't be written exactly"),
        ({"distributed_noise": {"multiplier": 1.0, "delta": 0.4}}, "cohort.minimum"),
    ],
)
def test_what_doesn_t_go_together(change, said):
    with pytest.raises((PlanError, AtollError), match=said):
        atoll.simulate(plan(privacy={**SHARED, **change}, aggregation=UNIFORM), clients(4))


def test_the_count_within_a_bound_has_noise_of_its_own_and_both_cost_what_was_planned():
    size, noise, nodes = 20_000, 1.5, 9
    zero = {
        "parameters": Group(Layout((Tensor("w", (size,)),)), np.zeros(size, np.float32)),
        central.WITHIN: Group(Layout((Tensor("within", (size,)),)), np.full(size, 0.5, np.float32)),
    }
    noisy = [distributed.noisy(zero, 1.0, noise, nodes, new_secret()) for _ in range(nodes)]
    spread = {}
    for name in zero:
        total = np.sum([one[name].values for one in noisy], axis=0, dtype=np.float64)
        steps = total / distributed.step(1.0)
        assert np.array_equal(steps, np.rint(steps))
        spread[name] = total.std()
        assert total.mean() == pytest.approx(4.5 if name == central.WITHIN else 0.0, abs=5 * spread[name] / math.sqrt(size))
    both = spread["parameters"] ** -2 + (2 * spread[central.WITHIN]) ** -2  # a node moves the sum by 1, the count by a half
    assert both**-0.5 == pytest.approx(noise, rel=0.03)


def test_an_adaptive_bound_s_words_are_exact_and_cannot_run_over_whatever_the_bound_is():
    """Updates are sent in units of the bound, so the words' range never has to follow it."""
    agreed = bounded(cohort={"minimum": 2048})
    mine, layouts = account(agreed), {"parameters": Layout((Tensor("w", (3,)),)), central.WITHIN: central.WITHIN_LAYOUT}
    most = distributed.widest(1.0, central.shares(mine.multiplier, layouts)["parameters"], 2048)
    code = Code(layouts, (), most, 1.0, 2048, 64)
    assert code.masked == {**link(agreed, layouts).updates(layouts), "hidden": code.masked["hidden"]}
    for values, within in (([most, -most, distributed.step(1.0)], 50.0), ([-most] * 3, -50.0)):
        groups = {
            name: Group(layouts[name], np.array(v, np.float32)) for name, v in zip(layouts, (values, [within]), strict=True)
        }
        one = code.encode(Update(groups, 1.0))
        summed = {name: group.with_values(group.values * group.values.dtype.type(2048)) for name, group in one.groups.items()}
        total, _ = code.decode(Total(summed, 1.0, 2048, 2048))
        assert total.weight == 2048
        for name, group in groups.items():
            np.testing.assert_allclose(total.groups[name].values, 2048.0 * group.values, rtol=1e-6)


@pytest.mark.parametrize("bound", [1e-18, 1e-3, 1.0, 1e18, 0.0, -1.0, math.inf, math.nan, 1e-40, 1e300])
def test_whatever_bound_a_server_says_an_update_is_no_longer_than_one_unit_of_it_or_none(bound, quiet):
    agreed = bounded()
    learner, (x, y) = learners.build(agreed), rows(0)
    made = method.find(agreed, learner)
    told = made.brief({**made.init(learner.initial(0))})
    told = {**told, method.CLIP: told[method.CLIP].with_values(np.array([bound]))}

    def train():
        pace = agreed.training.pace(len(x), 1, 3)
        return made.local(learner, told, {}, Rows(x, y), pace, np.random.default_rng(0))[1].groups

    if not 2.0**-60 <= bound <= 2.0**60:
        with pytest.raises(LayoutError, match="the server says a bound of"):
            train()
        return
    groups = train()
    steps = groups["parameters"].values.astype(float) / distributed.step(1.0)
    assert sum(int(value) ** 2 for value in steps) <= distributed.step(1.0) ** -2
    assert abs(groups[central.WITHIN].values[0]) == 0.5


@pytest.mark.parametrize("log", ["embedded", "kafka"])
def test_an_adaptive_bound_under_masks_is_the_same_deployed_simulated_and_replayed(tmp_path, log, request, quiet):
    broker = request.getfixturevalue("kafka") if log == "kafka" else None
    agreed = bounded(log={"kafka": broker, "prefix": f"{tmp_path.name}."})
    deployed, simulated = run(agreed, clients(4), tmp_path), atoll.simulate(agreed, clients(4))
    models = [row["model"] for row in deployed["rounds"]]
    assert models == [row["model"] for row in simulated.rounds], "not the same bits"
    assert replayed(tmp_path / "store", deployed["run"]) == models
    assert simulated.state["clip"].values[0] != method.FIRST
    assert [row["epsilon"] for row in deployed["rounds"]] == [account(agreed).spent(k) for k in (1, 2, 3)]


def test_a_noisy_run_that_is_stopped_goes_on_with_its_bound_and_its_spending(tmp_path):
    agreed, told = bounded(plan={"rounds": 4}), []

    def watch(event):
        told.append(server.status()["epsilon"])
        if event.get("round") == 2:
            server.stop()

    async def stopped():
        nonlocal server
        server = Server(agreed, store=tmp_path / "store", port=0, watch=watch)
        nodes = [Node(server.url, one, name=name, directory=tmp_path / name) for name, one in clients(4).items()]
        return (await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes)))[0]

    server = None
    before = asyncio.run(asyncio.wait_for(stopped(), 60))
    assert 0.0 in told
    assert account(agreed).spent(1) in told, "the status doesn't say what is spent"
    assert 0 < len(before["rounds"]) < 4
    after = run(agreed, clients(4), tmp_path, resume=True)
    assert (after["outcome"], len(after["rounds"])) == ("completed", 4)
    assert replayed(tmp_path / "store", after["run"]) == [row["model"] for row in after["rounds"]]
    assert [row["epsilon"] for row in after["rounds"]] == [account(agreed).spent(k) for k in (1, 2, 3, 4)]


def test_a_bound_under_masks_follows_the_median_length(quiet):
    agreed = bounded(plan={"rounds": 60}, training={"learning_rate": 0.5, "epochs": 1})
    data = clients(8)
    found = atoll.simulate(agreed, data, holdout=Rows(*rows(9)))
    assert found.holdout["accuracy"] > 0.8
    free = method.find(
        agreed.with_(privacy={"clip": None, "secure_aggregation": False, "distributed_noise": None}), learners.build(agreed)
    )
    model = {"parameters": found.model["parameters"]}
    lengths = []
    for k, (x, y) in enumerate(data.values()):
        pace = agreed.training.pace(len(x), 60, 60)
        _, update = free.local(learners.build(agreed), model, {}, Rows(x, y), pace, np.random.default_rng(k))
        lengths.append(np.linalg.norm(update.groups["parameters"].values))
    assert min(lengths) * 0.7 < found.state["clip"].values[0] < max(lengths) * 1.4


def test_a_simulation_that_goes_on_counts_on(tmp_path):
    class StoppedError(Exception):
        pass

    def watch(event):
        if event.get("round") == 3:
            raise StoppedError

    agreed = bounded(plan={"rounds": 4})
    with pytest.raises(StoppedError):
        atoll.simulate(agreed, clients(4), store=tmp_path, watch=watch)
    again = atoll.simulate(agreed, clients(4), store=tmp_path, resume=True)
    assert [one["epsilon"] for one in again.rounds] == [account(agreed).spent(k) for k in (1, 2, 3, 4)]
