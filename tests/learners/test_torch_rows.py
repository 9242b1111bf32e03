"""PyTorch modules row by row: gradients under a bound, and training with noise for each row."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from tests import federation
from tests.learners.tables import rows
from tests.learners.test_torch import BINARY, CLASSES, NUMBERS, build, torch_plan
from typer.testing import CliRunner

from atoll.cli import app
from atoll.cli import privacy as command  # noqa: F401  it adds itself
from atoll.errors import LearnerError, PlanError
from atoll.learner import PerExample, Rows
from atoll.learners.torch import gradients
from atoll.method import find
from atoll.privacy.dp.clip import STEPS, shortened
from atoll.privacy.dp.example import Private
from atoll.simulate import simulate
from atoll.store.ledger import Ledger

NOISE = {"example_noise": {"multiplier": 1.0, "delta": 1e-3, "clip": 0.5}}
MODELS = {
    "linear": (torch_plan("linear"), "binary"),
    "three classes": (torch_plan("deep", CLASSES, outputs=3), "three"),
    "numbers": (torch_plan("deep", NUMBERS), "number"),
    "an embedding, tied": (torch_plan("words"), "words"),
    "convolutions": (torch_plan("convolved"), "pictures"),
    "a last layer alone": (torch_plan("tuned"), "binary"),
    "GRU": (torch_plan("heard"), "words"),
    "LSTM": (torch_plan("heard", kind="LSTM"), "words"),
    "RNN": (torch_plan("heard", kind="RNN"), "words"),
    "a parameter without a part": (torch_plan("unused"), "binary"),
    "parameters in a list": (torch_plan("hoard"), "binary"),
    "a buffer that rows write into": (torch_plan("gossip"), "binary"),
}


def reference(learner, groups, table: Rows) -> np.ndarray:
    """Each row's gradient `[rows, p]` by PyTorch's own backward, of a batch of one, in a module as it was made."""
    found = []
    for k in range(len(table)):
        moved = learner.fit(groups, Rows(table.x[k : k + 1], table.y[k : k + 1]), 1, 1, np.random.default_rng(0)).groups
        found.append((groups["parameters"].values.astype(float) - moved["parameters"].values) / 0.1)
    return np.array(found)


def few(kind: str, count: int = 20) -> Rows:
    table = rows(kind)
    return Rows(table.x[:count], table.y[:count])


@pytest.mark.parametrize("name", MODELS)
def test_the_sum_of_clipped_gradients_is_that_of_single_rows(name, caplog):
    plan, kind = MODELS[name]
    learner, table = build(plan), few(kind)
    assert isinstance(learner, PerExample)
    groups = learner.initial(0)
    single = reference(learner, groups, table)
    bound = float(np.median(np.linalg.norm(single, axis=1)))  # half of them are too long
    expected = sum(row * shortened(float(np.linalg.norm(row)), bound) for row in single)
    with caplog.at_level(logging.WARNING, logger="atoll"):
        found = learner.clipped(groups, table, bound, STEPS) * bound / STEPS
    room = 1e-4 * bound * len(table)  # of the bound, a little is left free
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 + room)
    slow = ["rows go one by one" in record.message for record in caplog.records]
    if "NN" not in name and "LSTM" not in name:  # newer versions can
        assert slow == [True] * (name in ("GRU", "parameters in a list", "a buffer that rows write into"))


@pytest.mark.parametrize("name", MODELS)
def test_whatever_a_row_is_it_moves_the_sum_by_no_more_than_the_bound(name):
    plan, kind = MODELS[name]
    learner, table, bound = build(plan), few(kind, 8), 1e-3
    groups = learner.initial(0)
    sums = [learner.clipped(groups, Rows(table.x[:many], table.y[:many]), bound, STEPS) for many in (8, 7)]
    assert 0.9 * STEPS < np.linalg.norm(sums[0] - sums[1]) <= STEPS
    if kind != "words":
        huge = table.x.copy()
        huge[3] *= 1e6
        outlier = learner.clipped(groups, Rows(huge, table.y), bound, STEPS)
        kept = learner.clipped(groups, Rows(np.delete(huge, 3, 0), np.delete(table.y, 3)), bound, STEPS)
        assert np.linalg.norm(outlier - kept) <= STEPS, "no other row knows of it"
        huge[3] = np.nan
        nothing = learner.clipped(groups, Rows(huge, table.y), bound, STEPS)
        np.testing.assert_allclose(nothing, kept, atol=len(table), err_msg="what is no number counts as nothing")


def test_no_rounding_of_a_long_gradient_s_length_lets_it_pass_the_bound():
    """A large number hides small ones where their squares are added up in float32; in whole steps nothing is rounded."""
    long = torch.full((1, 1 << 20), 169.0 / STEPS)
    long[0, 0] = 1.0
    total = gradients.summed([long], 1.0, STEPS).numpy()
    assert 0.999 * STEPS**2 < sum(int(value) ** 2 for value in total) <= STEPS**2


def test_parameters_with_one_gradient_each_have_it_once():
    """The biases of an LSTM have one tensor for both of their gradients."""
    one = torch.tensor([[3.0, 4.0], [0.3, 0.4], [float("inf"), 0.0]])
    found = gradients.summed([one, one], 1.0, 1000).numpy()
    np.testing.assert_allclose(found, np.tile([424.0 + 300, 565.0 + 400], 2), atol=2)
    assert one[0].tolist() == [3.0, 4.0]


def test_more_rows_than_fit_at_once_are_all_there():
    learner = build(torch_plan("deep"))
    table = rows("binary")
    many = Rows(np.tile(table.x, (5, 1)), np.tile(table.y, 5))
    assert np.array_equal(
        learner.clipped(learner.initial(0), many, 0.5, STEPS), 5 * learner.clipped(learner.initial(0), table, 0.5, STEPS)
    )


def test_low_precision_and_dropout_go_with_it():
    table = few("binary")
    exact, rough = (build(torch_plan("deep", training={"precision": one})) for one in ("float32", "bfloat16"))
    groups = exact.initial(0)
    sums = [one.clipped(groups, table, 0.5, STEPS) / STEPS for one in (exact, rough)]
    assert not np.array_equal(*sums)
    np.testing.assert_allclose(sums[1], sums[0], atol=0.3)
    dropping = build(torch_plan("dropping"))
    groups = dropping.initial(0)
    state = torch.random.get_rng_state()
    drawn = [dropping.clipped(groups, table, 0.5, STEPS) for _ in range(2)]
    assert not np.array_equal(*drawn), "each time other units drop out"
    assert torch.equal(state, torch.random.get_rng_state())


def test_training_with_noise_differs_from_run_to_run_and_without_noise_it_doesn_t():
    plan = torch_plan("tuned", training={"batch_size": 20}).with_(privacy=NOISE)
    table = rows("binary")
    data = {f"node-{k}": (table.x[k::3], table.y[k::3]) for k in range(3)}
    learner = build(plan)
    runs = [simulate(one, data, learner=learner) for one in (plan, plan, torch_plan("tuned"), torch_plan("tuned"))]
    assert runs[0].digest != runs[1].digest
    assert runs[2].digest == runs[3].digest
    for run in runs:  # frozen layers are in the model, and stay the server's
        assert run.model["buffers"] == learner.initial(plan.plan.seed)["buffers"]


def test_a_step_without_noise_is_the_plain_step_of_all_rows(monkeypatch):
    """All rows drawn, a bound that none reaches, no noise: DP-SGD is SGD."""
    from atoll.privacy.dp import example

    monkeypatch.setattr(example, "discrete_gaussian", lambda sigma, count, stream: np.zeros(count, np.int64))
    loud = {"example_noise": {"multiplier": 1.0, "delta": 1e-3, "clip": 100.0}}
    plan = torch_plan("deep", training={"batch_size": 120, "epochs": 5}).with_(privacy=loud)
    learner, table = build(plan), rows("binary")
    start = learner.initial(0)
    private = Private(learner, plan).fit(start, table, 5, 120, np.random.default_rng(0)).groups["parameters"]
    plain = learner.fit(start, table, 5, 120, np.random.default_rng(0)).groups["parameters"]
    assert np.abs(plain.values - start["parameters"].values).max() > 0.05
    np.testing.assert_allclose(private.values, plain.values, atol=2e-5)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (torch_plan("normed"), "training changes '1.running_mean' of the model, .* by layer or group instead of by batch"),
        (torch_plan("deep", training={"optimizer": "adam"}), "plain steps.*'torch' as planned can't: training.optimizer = 'sgd'"),
        (torch_plan("deep").with_(aggregation={"rule": "moon"}), "'moon'"),
    ],
)
def test_what_noise_can_t_cover_is_refused_by_the_plan(plan, said):
    plan = plan.with_(privacy=NOISE)
    with pytest.raises(PlanError, match=said) as caught:
        find(plan, build(plan))
    assert "\n" not in str(caught.value)


def test_rows_that_the_module_can_t_take_are_one_line(caplog):
    learner = build(torch_plan("deep"))
    with pytest.raises(LearnerError, match=r"can't take rows of shape \(4,\)"):
        learner.clipped(learner.initial(0), Rows(np.zeros((3, 4)), np.zeros(3)), 0.5, STEPS)
    assert not caplog.records, "it isn't the model that is slow"
    assert learner.clipped(learner.initial(0), few("binary"), 0.5, STEPS).any()


def test_a_deployed_run_costs_what_the_command_says(tmp_path):
    training = {"batch_size": 20, "epochs": 3, "learning_rate": 0.5}
    noise = {"example_noise": {"multiplier": 0.6, "delta": 1e-3, "clip": 1.0}}
    plan = torch_plan("deep", BINARY, training).with_(privacy=noise)
    table = rows("binary")
    big = Rows(np.tile(table.x, (5, 1)), np.tile(table.y, 5))
    data = {f"node-{k}": (big.x[k::3], big.y[k::3]) for k in range(3)}
    history = federation.run(plan, data, tmp_path, holdout=table, allow=[plan.model.torch])
    assert history["rounds"][-1]["holdout"]["accuracy"] > 0.75
    (tmp_path / "plan.json").write_text(plan.to_json())
    done = CliRunner().invoke(app, ["privacy", str(tmp_path / "plan.json"), "--rows", "200", "--json"])
    promised = [one["epsilon"] for one in json.loads(done.stdout.splitlines()[-1])["by_round"]]
    assert len(promised) == 2
    for name in data:
        ledger = Ledger(tmp_path / name)
        assert [one["epsilon"] for one in ledger.entries()] == promised
        ledger.close()
