"""What a node does for itself: its own noise, answers by chance, and steps by noisy sums of clipped gradients."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
from tests.federation import clients, plan, rows, run

import atoll
from atoll import algorithms, learners, method
from atoll.cli import privacy as command  # noqa: F401  it adds itself
from atoll.errors import AtollError, PlanError, PrivacyError
from atoll.keys import new_secret
from atoll.learner import PerExample, Rows
from atoll.messages import StartTraining
from atoll.node.gate import Gate
from atoll.node.runtime import Node
from atoll.preprocess import prepare
from atoll.privacy.dp.account import account
from atoll.privacy.dp.accountant import composed, epsilon
from atoll.privacy.dp.clip import STEPS
from atoll.privacy.dp.example import Private
from atoll.privacy.dp.local import estimated, noisy, randomised
from atoll.server.runtime import Server
from atoll.store.ledger import Ledger, Spent
from atoll.vector import Group, Layout, Tensor
from atoll.wire import Address, Envelope

LOCAL = {"clip": 1.0, "local_noise": {"multiplier": 0.5, "delta": 1e-5}}
EXAMPLE = {"example_noise": {"multiplier": 1.0, "delta": 1e-3, "clip": 1.0}}


def test_local_noise_has_twice_the_bound_s_size_and_lies_on_the_grid():
    layout = Layout((Tensor("w", (100_000,)),), "float64")
    update = {"parameters": Group(layout, np.full(100_000, 5.0))}
    values = noisy(update, 0.2, 1.5, new_secret())["parameters"].values
    assert abs(values.std() / (2 * 1.5 * 0.2) - 1) < 5 / math.sqrt(2 * values.size)
    assert np.abs(values * (STEPS / 0.2) - np.rint(values * (STEPS / 0.2))).max() < 1e-6


class Failing:
    """A learner that some rows break, or whose numbers they let overflow."""

    def __init__(self, learner, gives=None):
        self._learner, self._gives = learner, gives

    def __getattr__(self, name):
        return getattr(self._learner, name)

    def fit(self, groups, *given, **named):
        if self._gives is None:
            raise ValueError("patient 4711 is 97 years old")
        fitted = self._learner.fit(groups, *given, **named)
        return fitted._replace(groups={name: one.with_values(one.values * self._gives) for name, one in fitted.groups.items()})


@pytest.mark.parametrize(
    "own", [{"local_noise": {"multiplier": 1e-3, "delta": 1e-5}}, {"distributed_noise": {"multiplier": 1e-3, "delta": 1e-5}}]
)
@pytest.mark.parametrize("gives", [None, math.nan, math.inf])
def test_rows_that_make_training_fail_are_hidden_by_zeros_under_the_noise(own, gives):
    agreed = plan(privacy={"clip": 1.0, "secure_aggregation": "distributed_noise" in own, **own})
    learner = learners.build(agreed)
    data, brief = prepare(rows(0), agreed), learner.initial(1)
    right, wrong = (
        algorithms.work(agreed, method.find(agreed, learner), one, brief, {}, data, 1, "n")[1]
        for one in (learner, Failing(learner, gives))
    )
    length = {name: np.abs(one.groups["parameters"].values).max() for name, one in (("right", right), ("wrong", wrong))}
    assert length["wrong"] < 0.05 < length["right"]
    assert wrong.groups["parameters"].values.any(), "no noise is on it"
    assert (wrong.weight, wrong.metrics) == (right.weight, right.metrics)


def test_nobody_learns_that_training_failed_under_noise_of_the_nodes_own(tmp_path):
    agreed, seen = plan(privacy=LOCAL), []

    async def together():
        server = Server(agreed, store=tmp_path / "store", port=0, watch=seen.append)
        nodes = [
            Node(server.url, one, name=name, directory=tmp_path / name, learner=Failing(learners.build(agreed)) if last else None)
            for (name, one), last in zip(clients().items(), (False, False, True))
        ]
        history, *_ = await asyncio.gather(server.serve_async(), *(node.start_async() for node in nodes))
        return history

    history = asyncio.run(asyncio.wait_for(together(), 60))
    assert [len(row["answered"]) for row in history["rounds"]] == [3, 3, 3]
    assert not [event for event in seen if event["what"] in ("declined", "rejected")]
    assert "4711" not in str(seen)


def test_a_node_adds_its_own_noise_writes_what_it_costs_and_stops_by_itself(tmp_path):
    privacy = {"clip": 1.0, "local_noise": {"multiplier": 5.0, "delta": 1e-5, "budget": 1.5}}
    agreed = plan(privacy=privacy, plan={"rounds": 6}, cohort={"deadline": 5})
    most = account(agreed).most
    assert 1 < most < 6
    history = run(agreed, clients(), tmp_path)
    assert "privacy budget is spent" in history["reason"]
    assert len(history["rounds"]) == most
    for name in clients():
        ledger = Ledger(tmp_path / name)
        entries = ledger.entries()
        ledger.close()
        assert len(entries) == most
        assert [one["guard"] for one in entries] == ["local noise"] * most
        assert [one["epsilon"] for one in entries] == [epsilon(5.0, k + 1, 1e-5) for k in range(most)]


def test_a_node_declines_what_its_budget_doesn_t_allow_whatever_the_server_asks(tmp_path):
    privacy = {"clip": 1.0, "local_noise": {"multiplier": 5.0, "delta": 1e-5, "budget": 1.5}}
    agreed = plan(privacy=privacy, plan={"rounds": 6})
    ledger, mine = Ledger(tmp_path), account(agreed)
    gate = Gate(None, ledger)
    assert gate.meets(agreed) is None
    gate.account = mine
    for attempt in range(1, mine.most + 1):  # tries of one round: each let an update out
        task = StartTraining(run="r", round=1, attempt=attempt, model="0" * 64, deadline=9.0)
        gate.check(task)
        assert gate.spent(task).epsilon == mine.spent(attempt)
        envelope = Envelope(Address("r", 1, attempt, "ab"), agreed.digest, f"{attempt:064x}", 1, b"", b"")
        ledger.leaving(envelope, 1.0, "local noise", gate.spent(task))
    with pytest.raises(AtollError, match="privacy budget is spent"):
        gate.check(task.model_copy(update={"attempt": mine.most + 1}))
    gate.check(task)  # what left already may be sent again
    ledger.close()


def test_what_left_costs_what_it_did_however_many_rows_there_are_today(tmp_path):
    """A table that grows makes later steps cheaper, and earlier ones no cheaper than they were."""
    privacy = {"example_noise": {"multiplier": 1.0, "delta": 1e-3, "clip": 1.0, "budget": 6.0}}
    agreed = plan(privacy=privacy, plan={"rounds": 1})
    small, large = account(agreed, 40).release, account(agreed, 400).release
    assert small != large
    run(agreed, clients(), tmp_path)
    (tmp_path / "store").rename(tmp_path / "first")
    run(agreed, {f"node-{k}": rows(k, 400) for k in range(3)}, tmp_path)
    ledger = Ledger(tmp_path / "node-0")
    told = [one["epsilon"] for one in ledger.entries()]
    assert told == [composed(some, 1e-3) for some in ([small], [small, large])]
    assert told[-1] > account(agreed, 400).spent(2) * 1.1, "the first is counted by today's rows"
    assert ledger.releases(agreed.digest, ("", 0, 0)) == [small, large]
    ledger.close()


def test_an_update_of_other_rows_that_never_left_is_made_anew(tmp_path):
    """Its noise was of the rows that there were when it was made, and would be noted by today's."""
    agreed = plan(privacy=EXAMPLE, plan={"rounds": 1})

    class Dying(Node):
        async def send_updates(self, _):
            raise ConnectionAbortedError("the machine is switched off")

    async def together():
        server = Server(agreed, store=tmp_path / "store", port=0)
        serving, data = asyncio.create_task(server.serve_async()), clients()
        others = [Node(server.url, data[name], name=name, directory=tmp_path / name) for name in ("node-0", "node-1")]
        work = [asyncio.create_task(node.start_async()) for node in others]
        dying = Dying(server.url, data["node-2"], name="node-2", directory=tmp_path / "node-2")
        await asyncio.gather(dying.start_async(), return_exceptions=True)
        (kept,) = (tmp_path / "node-2" / "outbox").glob("*.safetensors")
        before = kept.read_bytes()
        again = Node(server.url, rows(2, 200), name="node-2", directory=tmp_path / "node-2")
        await asyncio.gather(again.start_async(), serving, *work)
        (came,) = (tmp_path / "store" / "log" / server.run).glob(f"1-1-{again.identity.node}-*")
        return before != came.read_bytes()

    assert asyncio.run(asyncio.wait_for(together(), 60))
    ledger = Ledger(tmp_path / "node-2")
    assert ledger.releases(agreed.digest, ("", 0, 0)) == [account(agreed, 200).release]
    ledger.close()


def test_a_budget_is_spent_by_what_left_not_by_what_would_leave_today(tmp_path):
    privacy = {"example_noise": {"multiplier": 1.0, "delta": 1e-3, "clip": 1.0, "budget": 6.0}}
    agreed, task = plan(privacy=privacy), StartTraining(run="r", round=3, attempt=1, model="0" * 64, deadline=9.0)
    ledger, then, now = Ledger(tmp_path), account(agreed, 40), account(agreed, 400)
    gate = Gate(None, ledger)
    assert gate.meets(agreed) is None
    gate.account = now
    for number in range(then.most):
        envelope = Envelope(Address("r", number, 1, "ab"), agreed.digest, f"{number:064x}", 1, b"", b"")
        ledger.leaving(envelope, 1.0, "example noise", Spent(then.spent(number + 1), 1e-3), then.release)
    assert not now.over(then.most)  # by today's rows there would be room
    assert gate.spent(task).epsilon > then.spent(then.most)
    for number in range(100):
        envelope = Envelope(Address("q", number, 1, "ab"), agreed.digest, f"{number + 999:064x}", 1, b"", b"")
        if gate.spent(task).epsilon > 6.0:
            break
        gate.check(task)
        ledger.leaving(envelope, 1.0, "example noise", gate.spent(task), gate.release)
    with pytest.raises(AtollError, match="privacy budget is spent: ε"):
        gate.check(task)
    assert ledger.entries()[-1]["epsilon"] <= 6.0
    ledger.close()


def test_simulated_nodes_add_noise_too():
    agreed = plan(privacy=LOCAL)
    assert atoll.simulate(agreed, clients()).digest != atoll.simulate(agreed, clients()).digest
    robust = agreed.with_(aggregation={"rule": "median"})  # what is noisy already may be looked at
    assert atoll.simulate(robust, clients()).rounds


@pytest.mark.parametrize(("choices", "eps"), [(2, 1.0), (5, 0.5), (3, 3.0)])
def test_randomised_answers_have_their_chances_and_add_up_on_average(choices, eps):
    count = 100_000
    truth = np.arange(count) % choices
    found = randomised(truth, choices, eps, new_secret())
    true = math.exp(eps) / (math.exp(eps) + choices - 1)
    assert abs((found == truth).mean() - true) < 5 * math.sqrt(true * (1 - true) / count)
    lies = (found - truth) % choices
    counts = np.bincount(lies, minlength=choices)[1:]
    assert counts.max() - counts.min() < 10 * math.sqrt(count)
    guessed = estimated(randomised(np.zeros(count, np.int64), choices, eps, new_secret()), choices, eps)
    assert abs(guessed[0] / count - 1) < 0.1
    assert guessed.sum() == pytest.approx(count)


def test_bad_answers_are_refused():
    for answers, choices, eps in (([2], 2, 1.0), ([-1], 2, 1.0), ([0], 1, 1.0), ([0], 2, 0.0)):
        with pytest.raises(PrivacyError):
            randomised(np.array(answers), choices, eps, new_secret())


def test_a_row_s_gradient_is_clipped_exactly_as_one_by_one():
    agreed = plan(privacy=EXAMPLE)
    learner = learners.build(agreed)
    assert isinstance(learner, PerExample)
    x, y = rows(3)
    data, vector = Rows(x * 20, y), np.array([0.3, -0.2, 0.1, 0.4, 0.0])
    groups = {"parameters": learner.initial(0)["parameters"].with_values(vector)}
    together = learner.clipped(groups, data, 0.5, STEPS)
    private = Private(learner, agreed)
    private._inner = type("Slow", (), {"fit": learner.fit})()  # without the quick way
    slowly = private._summed(groups, vector, data, 0.5, np.random.default_rng(0))
    assert np.abs(together - slowly).max() <= len(data)  # a step each
    for k in range(len(data)):
        one = learner.clipped(groups, Rows(data.x[k : k + 1], data.y[k : k + 1]), 0.5, STEPS)
        assert sum(int(v) ** 2 for v in one) <= STEPS**2


def test_example_noise_learns_and_tells_nothing_else(tmp_path):
    privacy = {"example_noise": {"multiplier": 0.6, "delta": 1e-3, "clip": 1.0}}
    agreed = plan(privacy=privacy, plan={"rounds": 2}, training={"epochs": 3, "batch_size": 20})
    data = {f"node-{k}": rows(k, 200) for k in range(3)}
    history = run(agreed, data, tmp_path, holdout=Rows(*rows(9, 200)))
    assert history["rounds"][-1]["holdout"]["accuracy"] > 0.75
    mine = account(agreed, 200)
    assert (mine.rate, mine.steps) == (0.1, 30)
    ledger = Ledger(tmp_path / "node-0")
    assert [one["epsilon"] for one in ledger.entries()] == [mine.spent(k + 1) for k in range(2)]
    assert mine.spent(2) == pytest.approx(epsilon(0.6, 60, 1e-3, 0.1), rel=1e-2)
    ledger.close()
    assert all(one["epsilon"] is None for one in history["rounds"])  # each node's own


def test_a_public_number_of_rows_hides_how_many_there_are(tmp_path):
    privacy = {"example_noise": {**EXAMPLE["example_noise"], "rows": 80}}
    agreed = plan(privacy=privacy, plan={"rounds": 2})
    mine = account(agreed)
    assert mine == account(agreed, 17) == account(agreed, 300)
    assert (mine.rate, mine.steps) == (0.1, 20)
    assert "one row more" in mine.relation
    with pytest.raises(PlanError, match="one in 1000 rows"):
        account(agreed, 1000)
    history = run(agreed, {f"node-{k}": rows(k, count) for k, count in enumerate((17, 80, 300))}, tmp_path)
    assert [one["epsilon"] for one in history["rounds"]] == [mine.spent(1), mine.spent(2)]
    for name in ("node-0", "node-2"):
        ledger = Ledger(tmp_path / name)
        assert [one["epsilon"] for one in ledger.entries()] == [mine.spent(1), mine.spent(2)]
        ledger.close()


@pytest.mark.parametrize("public", [None, 40])
def test_a_step_divides_by_what_is_known(monkeypatch, public):
    """With every row drawn and no noise, a step is the mean over the node's rows, or their sum over the plan's number."""
    from atoll.privacy.dp import example

    monkeypatch.setattr(example, "discrete_gaussian", lambda sigma, count, stream: np.zeros(count, np.int64))
    agreed = plan(
        privacy={"example_noise": {**EXAMPLE["example_noise"], "rows": public}},
        training={"steps": 1, "epochs": None, "batch_size": 40, "learning_rate": 1.0},
    )
    learner, (x, y) = learners.build(agreed), rows(0, 40)
    data = Rows(np.concatenate([x, x]), np.concatenate([y, y])) if public else Rows(x, y)
    moved = (
        method.find(agreed, learner)
        .local(learner, learner.initial(0), {}, data, agreed.training.pace(80, 1, 1), np.random.default_rng(0))[1]
        .groups["parameters"]
        .values
    )
    mean = learner.clipped(learner.initial(0), Rows(x, y), 1.0, STEPS) / STEPS / 40
    np.testing.assert_allclose(moved, -mean * (2 if public else 1), atol=1e-5)


def test_noise_of_single_rows_is_what_was_planned(monkeypatch):
    """With one step and no rows drawn, the whole move is noise: learning rate · clip · multiplier / (rate · rows)."""
    from atoll.privacy.dp import example

    monkeypatch.setattr(example, "_drawn", lambda rows, rate, stream: np.empty(0, np.intp))
    agreed = plan(
        privacy=EXAMPLE, training={"steps": 1, "epochs": None, "learning_rate": 0.5, "batch_size": 10}, model={"inputs": 4}
    )
    learner, moves = learners.build(agreed), []
    for _ in range(300):
        fit = Private(learner, agreed).fit(learner.initial(0), Rows(*rows(0, 40)), 1, 10, np.random.default_rng(0))
        moves.extend(fit.groups["parameters"].values)
    sigma = 0.5 * 1.0 * 1.0 / 10
    assert abs(np.std(moves) / sigma - 1) < 5 / math.sqrt(2 * len(moves))


def test_rows_are_drawn_each_for_itself():
    from atoll.keys import Keystream
    from atoll.privacy.dp.example import _drawn

    sizes = [len(_drawn(50, 0.2, Keystream(new_secret()))) for _ in range(400)]
    assert abs(np.mean(sizes) - 10) < 5 * math.sqrt(8 / 400)
    assert 4 < np.var(sizes) < 14
    assert len(_drawn(50, 1.0, Keystream(new_secret()))) == 50


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"privacy": {**LOCAL, **EXAMPLE}}, "keep one"),
        ({"privacy": {"local_noise": LOCAL["local_noise"]}}, "give clip"),
        ({"privacy": {**LOCAL, "clip": "adaptive"}}, "central_noise"),
        ({"privacy": {"example_noise": {"multiplier": 1.0, "delta": 1e-3}}}, "clip: is missing"),
        ({"privacy": {"example_noise": {"multiplier": 1.0, "delta": 0.5, "clip": 1.0}}}, "one in 40 rows"),
        ({"privacy": EXAMPLE, "aggregation": {"rule": "scaffold", "options": {"option": "I"}}}, "more often"),
        ({"privacy": EXAMPLE, "aggregation": {"rule": "ifca"}}, "whole"),
        ({"privacy": EXAMPLE, "aggregation": {"rule": "newton"}}, "gradient and Hessian"),
    ],
)
def test_what_noise_can_t_cover_is_refused(sections, said):
    with pytest.raises(AtollError, match=said):
        atoll.simulate(plan(**sections), clients())


@pytest.mark.parametrize(
    ("model", "mend"),
    [
        ({"sklearn": "SGDClassifier"}, r"'SGDClassifier' .* take \[model\] logistic = true, or an MLP"),
        ({"sklearn": "LogisticRegression"}, r"'LogisticRegression' .* take \[model\] logistic = true"),
        ({"sklearn": "MLPClassifier"}, r"'MLPClassifier' .*'sgd', and model.options = { momentum = 0.0 }"),
        ({"sklearn": "SGDRegressor"}, "'SGDRegressor' .* an MLP with options"),
    ],
)
def test_scikit_learn_s_models_that_take_no_rows_by_themselves_are_refused_with_a_way_out(model, mend):
    training = {"epochs": None, "steps": 3}
    with pytest.raises(PlanError, match=f"takes plain steps.*{mend}") as caught:
        atoll.simulate(plan(privacy=EXAMPLE, model={"logistic": False, **model}, training=training), clients())
    assert "\n" not in str(caught.value)


def test_scikit_learn_s_perceptrons_go_row_by_row():
    model = {"logistic": False, "sklearn": "MLPClassifier", "options": {"momentum": 0.0, "hidden_layer_sizes": [3], "alpha": 0.0}}
    agreed = plan(privacy=EXAMPLE, model=model, training={"batch_size": 20})
    learner, data = learners.build(agreed), Rows(*rows(3))
    groups = learner.initial(0)
    vector = groups["parameters"].values
    single = []
    for k in range(len(data)):
        one = Rows(data.x[k : k + 1], data.y[k : k + 1])
        single.append(vector - learner.fit(groups, one, 1, 1, np.random.default_rng(0)).groups["parameters"].values)
    single = np.array(single) / agreed.training.learning_rate
    lengths = np.linalg.norm(single, axis=1, keepdims=True)
    bound = float(np.median(lengths))
    expected = (single * np.minimum(1, bound / lengths)).sum(axis=0)
    found = Private(learner, agreed)._summed(groups, vector, data, bound, np.random.default_rng(0)) * bound / STEPS
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert atoll.simulate(agreed, clients()).rounds


def test_example_noise_is_refused_where_rows_change_each_other():
    data = {"features": [*"abcd"], "target": "y", "standardise": "node"}
    with pytest.raises(PlanError, match="standardise = 'node' has each row change"):
        atoll.simulate(plan(privacy=EXAMPLE, data=data, model={"inputs": None}), clients())


def test_example_noise_is_refused_by_the_name_of_what_training_changes_beside_weights():
    jaxed = {"jax": "tests.learners.jax_models:normed", "loss": "sigmoid_binary_cross_entropy"}
    agreed = plan(privacy=EXAMPLE, model={"logistic": False, "inputs": None, **jaxed})
    with pytest.raises(PlanError, match="training changes 'batches' of the model"):
        method.find(agreed, learners.build(agreed, [agreed.model.jax]))


def test_example_noise_takes_one_client_at_a_time():
    with pytest.raises(AtollError, match="one client at a time"):
        atoll.simulate(plan(privacy=EXAMPLE), clients(), strategy="vmap")


@pytest.mark.parametrize(
    ("model", "loss", "y"), [("deep", "softmax_cross_entropy_with_integer_labels", 3), ("linear", "squared_error", 0)]
)
def test_jax_clips_by_vmap_as_one_by_one(model, loss, y):
    options = {"outputs": 3} if y else {}
    agreed = plan(
        privacy={"example_noise": {"multiplier": 1.0, "delta": 1e-3, "clip": 0.5}},
        model={"logistic": False, "inputs": None, "jax": f"tests.learners.jax_models:{model}", "loss": loss, "options": options},
    )
    learner = learners.build(agreed, [agreed.model.jax])
    rng = np.random.default_rng(0)
    data = Rows(rng.normal(size=(9, 6)), rng.integers(0, 3, 9) if y else rng.normal(size=9))
    groups = learner.initial(0)
    vector = groups["parameters"].values
    together = learner.clipped(groups, data, 0.5, STEPS)
    private = Private(learner, agreed)
    private._inner = type("Slow", (), {"fit": learner.fit})()
    slowly = private._summed(groups, vector, data, 0.5, np.random.default_rng(0))
    assert np.abs(together - slowly).max() <= 1e-3 * STEPS  # float32, and a little less of the bound
    assert np.abs(slowly).max() > 0.1 * STEPS
    for k in range(len(data)):
        one = learner.clipped(groups, Rows(data.x[k : k + 1], data.y[k : k + 1]), 0.5, STEPS)
        assert sum(int(v) ** 2 for v in one) <= STEPS**2
    named = {name: (data.x + k, data.y) for k, name in enumerate("abc")}
    assert atoll.simulate(agreed, named, allow=[agreed.model.jax]).rounds
