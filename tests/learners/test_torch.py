"""PyTorch modules: they pass the suite, and what is special in them is handled rightly in a real federation."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import federation
from tests.learners import torch_models
from tests.learners.pooling import check_judged
from tests.learners.tables import NOTHING, rows

from atoll import learners
from atoll.errors import LearnerError, PlanError
from atoll.learner import Data, Rows
from atoll.learners.torch import OPTIMIZERS
from atoll.plan import Plan
from atoll.simulate import simulate
from atoll.testing import check_learner
from atoll.wire import pack, unpack

MODELS = "tests.learners.torch_models:"
BINARY, CLASSES, NUMBERS = "binary_cross_entropy_with_logits", "cross_entropy", "mse_loss"


def torch_plan(name: str, loss: str | None = BINARY, training: dict | None = None, **options) -> Plan:
    return Plan.of(
        {
            "plan": {"name": "t", "rounds": 2},
            "model": {"torch": MODELS + name, "loss": loss, "options": options},
            "training": {"learning_rate": 0.1, "batch_size": 8, **(training or {})},
            "cohort": {"minimum": 3, "deadline": 20, "grace": 1},
        }
    )


def build(plan: Plan):
    return learners.build(plan, allow=[plan.model.torch, *plan.model.metrics])


TABLE = {
    "linear": (torch_plan("linear"), "binary"),
    "deep": (torch_plan("deep"), "binary"),
    "three classes": (torch_plan("deep", CLASSES, outputs=3), "three"),
    "regression": (torch_plan("linear", NUMBERS), "number"),
    "batch norm, dropout, frozen": (torch_plan("normed"), "binary"),
    "words, tied": (torch_plan("words"), "words"),
    "pictures": (torch_plan("pictures"), "pictures"),
    "a parameter without a part": (torch_plan("unused"), "binary"),
    "a buffer in no state": (torch_plan("forgetful"), "binary"),
    "bfloat16": (torch_plan("deep", training={"precision": "bfloat16"}), "binary"),
}


@pytest.mark.parametrize("name", TABLE)
def test_every_model_passes_the_suite(name):
    plan, kind = TABLE[name]
    check_learner(lambda: build(plan), Data(rows(kind), NOTHING), smallest=2 if "batch norm" in name else 1)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_every_optimizer_moves_the_model(optimizer):
    learner = build(torch_plan("deep", training={"optimizer": optimizer, "learning_rate": 0.01}))
    start = learner.initial(0)
    fitted = learner.fit(start, rows("binary"), 20, 16, np.random.default_rng(0)).groups
    assert learner.evaluate(fitted, rows("binary"))["loss"] < learner.evaluate(start, rows("binary"))["loss"]


def test_steps_and_rate_are_pytorchs_own():
    """The same steps by hand, with momentum and at a tenth of the rate."""
    plan = torch_plan("deep", NUMBERS, training={"learning_rate": 0.1, "options": {"momentum": 0.9}})
    learner, table = build(plan), rows("number")
    start = learner.initial(3)
    fitted = learner.fit(start, table, 5, 120, np.random.default_rng(0), rate=0.1).groups
    torch.manual_seed(3)
    module = torch_models.deep()
    assert np.array_equal(module[0].weight.detach().numpy(), start["parameters"].arrays["0.weight"]), "seeded as PyTorch is"
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(module(torch.tensor(table.x))[:, 0], torch.tensor(table.y).float()).backward()
        optimizer.step()
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(fitted["parameters"].arrays[name], parameter.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_what_travels_in_which_group():
    learner = build(torch_plan("normed"))
    names = {group: [tensor.name for tensor in layout.tensors] for group, layout in learner.layouts.items()}
    assert names == {
        "parameters": ["1.weight", "1.bias", "4.weight", "4.bias"],
        "buffers": ["0.weight", "0.bias", "1.running_mean", "1.running_var"],
        "counts": ["1.num_batches_tracked"],
    }
    assert (learner.layouts["counts"].dtype, learner.layouts["counts"].total) == ("int64", "plain")
    tied = build(torch_plan("words")).layouts
    assert {group: [tuple(tensor) for tensor in layout.tensors] for group, layout in tied.items()} == {
        "parameters": [("places", (6,)), ("embedding.weight", (20, 4))]
    }


@pytest.mark.parametrize("name", ["batch norm, dropout, frozen", "words, tied", "bfloat16"])
def test_a_deployed_run_gives_the_simulated_runs_bits(tmp_path, name):
    """Nodes of one process train at the same time, and draw their dropout from one generator."""
    plan, kind = TABLE[name]
    allow = [plan.model.torch]
    whole = rows(kind)
    data = {f"node-{k}": (whole.x[k::3][: 30 + k], whole.y[k::3][: 30 + k]) for k in range(3)}
    simulated = simulate(plan, data, allow=allow)
    history = federation.run(plan, data, tmp_path, allow=allow)
    assert [row["model"] for row in history["rounds"]] == [row["model"] for row in simulated.rounds]
    if kind == "binary" and "normed" in str(plan.model.torch):
        _counts_buffers_and_frozen(plan, history, tmp_path)


def _counts_buffers_and_frozen(plan, history, place):
    learner = build(plan)
    body = (place / "store" / "models" / f"{history['last']}.safetensors").read_bytes()
    model, start = unpack(body, learner.layouts)[0], learner.initial(plan.plan.seed)
    # 30, 31 and 32 rows in batches of 8 are 4 steps a node and round: the model has seen every batch of every node.
    assert model["counts"].arrays["1.num_batches_tracked"] == 2 * 3 * 4
    for name in ("0.weight", "0.bias"):
        assert model["buffers"].arrays[name].tobytes() == start["buffers"].arrays[name].tobytes(), "frozen, to the bit"
    assert not np.array_equal(model["buffers"].arrays["1.running_mean"], start["buffers"].arrays["1.running_mean"])


def test_counts_stay_exact_where_a_float_would_not(tmp_path):
    """2^60 + 1 has no float64 of its own, and a model may have seen that many."""
    plan = torch_plan("normed").with_(plan={"rounds": 1})
    learner = build(plan)
    groups = learner.initial(0)
    counts = groups["counts"].with_values(np.array([2**60 + 1]))
    whole = rows("binary")
    data = {f"node-{k}": (whole.x[k::3][:32], whole.y[k::3][:32]) for k in range(3)}
    history = federation.run(plan, data, tmp_path, allow=[plan.model.torch], start={**groups, "counts": counts})
    body = (tmp_path / "store" / "models" / f"{history['last']}.safetensors").read_bytes()
    assert unpack(body, learner.layouts)[0]["counts"].values.tolist() == [2**60 + 1 + 3 * 4]


def test_buffers_are_averaged_by_rows():
    plan = torch_plan("normed").with_(plan={"rounds": 1}, cohort={"minimum": 2})
    x, y = rows("binary")
    data = {"a": (x[:40], y[:40]), "b": (x[40:60], y[40:60])}
    learner = build(plan)
    together = simulate(plan, data, learner=learner).model["buffers"].arrays["1.running_mean"]
    one = plan.with_(cohort={"minimum": 1})
    alone = [simulate(one, {name: data[name]}, learner=learner).model["buffers"].arrays["1.running_mean"] for name in data]
    np.testing.assert_allclose(together, (40 * alone[0] + 20 * alone[1]) / 60, rtol=1e-5)


def test_low_precision_is_of_the_arithmetic_only():
    settings = [{"precision": precision, "learning_rate": 1e-4} for precision in ("float32", "bfloat16")]
    exact, rough = (build(torch_plan("deep", training=one)) for one in settings)
    start = exact.initial(0)
    before = start["parameters"].values
    moved = [
        learner.fit(start, rows("binary"), 30, 30, np.random.default_rng(0)).groups["parameters"].values
        for learner in (exact, rough)
    ]
    assert not np.array_equal(*moved), "something was computed at low precision"
    # Steps this small would be lost if the weights were bfloat16 themselves (8 bits: steps of 0.4 %).
    np.testing.assert_allclose(moved[1] - before, moved[0] - before, atol=3e-5)
    assert np.mean(moved[1] != before) > 0.95
    assert rough.evaluate(start, rows("binary")) == exact.evaluate(start, rows("binary")), "judging is exact"


def test_frozen_layers_that_a_node_draws_for_itself_become_the_servers():
    """Each node's function draws other values for the frozen layer; all train on those that the server drew."""
    plan = torch_plan("normed")
    learner, other = build(plan), build(plan)
    server, node = learner.initial(1), other.initial(2)
    assert not np.array_equal(server["buffers"].values, node["buffers"].values)
    table = Rows(*rows("binary"))
    assert other.evaluate(server, table) == learner.evaluate(server, table)
    fitted = other.fit(server, table, 5, 16, np.random.default_rng(0)).groups["buffers"].arrays
    assert fitted["0.weight"].tobytes() == server["buffers"].arrays["0.weight"].tobytes()


def test_pytorchs_own_generator_stays_where_it_was():
    learner = build(torch_plan("normed"))
    start = learner.initial(0)
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    learner.fit(start, rows("binary"), 3, 16, np.random.default_rng(0))
    learner.evaluate(learner.initial(4), rows("binary"))
    assert torch.equal(torch.rand(3), wanted)


def test_own_metrics():
    plan = torch_plan("linear").with_(model={"metrics": [MODELS + "brier"]})
    whole = rows("binary")
    data = {f"node-{k}": (whole.x[k::3], whole.y[k::3]) for k in range(3)}
    run = simulate(plan, data, holdout=whole, learner=build(plan))
    assert 0 < run.holdout["brier"] < 0.25


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize(
    ("plan", "kind", "said"),
    [
        (torch_plan("no_module"), PlanError, "returned a str: it returns a torch.nn.Module"),
        (torch_plan("linear", None), PlanError, "model.loss: 'None' is not known; it is one of cross_entropy"),
        (torch_plan("linear", training={"optimizer": "sgdd"}), PlanError, "training.optimizer: 'sgdd' is not known"),
        (torch_plan("linear", training={"optimizer": "lbfgs"}), PlanError, "training.optimizer: 'lbfgs' is not known"),
        (torch_plan("linear", training={"options": {"momentun": 1}}), PlanError, "momentun"),
        (torch_plan("linear", width=3), PlanError, "linear(width=3) failed: TypeError"),
        (torch_plan("lazy"), LearnerError, "'weight' has no shape yet: give lazy layers their sizes"),
        (torch_plan("double"), LearnerError, "'weight' is float64; weights travel as float32"),
        (torch_plan("flags"), LearnerError, "'flag' is bool, which has no sum"),
    ],
)
def test_what_it_cannot_do_is_said_by_the_plan(plan, kind, said):
    with pytest.raises(kind) as caught:
        build(plan)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_does_not_do_its_part_is_one_line():
    with pytest.raises(LearnerError, match=r"another model than the first time: .*'weight' \(\d+, 6\) instead of 'weight'"):
        build(torch_plan("fickle")).initial(0)
    learner = build(torch_plan("no_tensor"))
    with pytest.raises(LearnerError, match="the module returned a tuple: it returns one tensor"):
        learner.evaluate(learner.initial(0), rows("binary"))
    learner = build(torch_plan("normed"))
    with pytest.raises(LearnerError, match="Expected more than 1 value per channel"):
        learner.fit(learner.initial(0), rows("binary"), 1, 1, np.random.default_rng(0))


def test_the_how_to_is_true(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "torch.md").read_text()
    code, away = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (plan,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "models.py").write_text(code)
    (tmp_path / "plan.toml").write_text(plan)
    monkeypatch.syspath_prepend(tmp_path)
    data = {"a": federation.rows(1), "b": federation.rows(2)}
    learner = learners.build(agreed := Plan.load(tmp_path / "plan.toml"), allow=["models:network"])
    run = simulate(agreed, data, learner=learner)
    assert run.rounds[-1]["nodes"]["loss"] < run.rounds[0]["nodes"]["loss"]
    (tmp_path / "model.safetensors").write_bytes(b"".join(pack(run.model)))
    monkeypatch.chdir(tmp_path)
    exec(compile(away, "docs/how-to/torch.md", "exec"), {})
    start = learners.first(agreed, learner, tmp_path / "start.safetensors")
    assert start == dict(run.model)


def test_real_processes_give_the_simulated_runs_bits(tmp_path, monkeypatch):
    """Dropout and all: `atoll serve` and `atoll join` end with the model of a simulation in this process."""
    name = MODELS + "normed"
    sections = {"model": {"options": {"inputs": 4}}, "data": {"features": [*"abcd"], "target": "y"}, "cohort": {"deadline": 90}}
    agreed = torch_plan("normed").with_(**sections)
    (tmp_path / "plan.json").write_text(agreed.to_json())
    files = {}
    for one, (x, y) in federation.clients().items():
        files[one] = tmp_path / f"{one}.csv"
        np.savetxt(files[one], np.column_stack([x, y]), delimiter=",", header="a,b,c,d,y", comments="")
    monkeypatch.setenv("ATOLL_JOIN_ALLOW", name)
    history = federation.run_processes(tmp_path / "plan.json", files, tmp_path, ["--allow", name])
    assert history["last"] == simulate(agreed, files, allow=[name]).digest


@pytest.mark.parametrize("plan", [torch_plan("deep"), torch_plan("deep", CLASSES, outputs=2)], ids=["one logit", "two"])
def test_it_is_judged_as_scikit_learn_judges_its_outputs(plan):
    check_judged(plan, logits=True)
