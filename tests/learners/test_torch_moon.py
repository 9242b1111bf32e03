"""MOON with PyTorch modules: against a program that knows its paper's equations alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import federation
from tests.learners.tables import rows
from tests.learners.test_torch import build, torch_plan

from atoll.algorithms import find
from atoll.errors import AtollError
from atoll.preprocess import prepare
from atoll.simulate import simulate
from atoll.testing import check_algorithm

MU, TAU, ETA, STEPS, ROUNDS = 5.0, 0.5, 0.3, 4, 3
SIZES = (24, 24, 8)
TABLE = rows("binary")
PEOPLE = {
    f"node-{k}": (TABLE.x[start : start + size], TABLE.y[start : start + size])
    for k, (start, size) in enumerate(zip((0, 24, 48), SIZES, strict=True))
}


def agreed(rule="moon", name="deep", **options):
    training = {"steps": STEPS, "batch_size": max(SIZES), "learning_rate": ETA}
    aggregation = {"rule": rule, "options": {"mu": MU, "temperature": TAU, **options} if rule == "moon" else options}
    return torch_plan(name, training=training).with_(
        plan={"rounds": ROUNDS}, training={"epochs": None}, aggregation=aggregation, cohort={"quorum": 1.0}
    )


def oracle(start: list[torch.Tensor], layer: str | None) -> list[torch.Tensor]:
    """Algorithm 1 of the paper, on all of a node's rows at a time; the first layer stands for a row, before or after its tanh."""

    def seen(w, x):
        hidden = x @ w[0].T + w[1]
        return hidden if layer == "0" else torch.tanh(hidden)

    def loss(w, whole, before, x, y):
        z = seen(w, x)
        logits = (torch.tanh(x @ w[0].T + w[1]) @ w[2].T + w[3])[:, 0]
        own = torch.mean(torch.logaddexp(torch.zeros(()), logits) - y * logits)
        if before is None:
            return own
        near, far = (torch.cosine_similarity(z, seen(other, x), dim=1) / TAU for other in (whole, before))
        return own - MU * torch.mean(torch.log(torch.exp(near) / (torch.exp(near) + torch.exp(far))))

    w, mine = start, [None] * len(SIZES)
    for _ in range(ROUNDS):
        for k, (x, y) in enumerate(PEOPLE.values()):
            end = [one.clone().requires_grad_() for one in w]
            for _ in range(STEPS):
                down = torch.autograd.grad(loss(end, w, mine[k], torch.tensor(x), torch.tensor(y).float()), end)
                end = [(one - ETA * slope).detach().requires_grad_() for one, slope in zip(end, down, strict=True)]
            mine[k] = [one.detach() for one in end]
        w = [sum(size * one[part] for size, one in zip(SIZES, mine, strict=True)) / sum(SIZES) for part in range(4)]
    return w


@pytest.mark.parametrize("layer", [None, "0", "1"])
def test_it_is_what_its_paper_says(layer):
    plan = agreed(**({} if layer is None else {"layer": layer}))
    learner = build(plan)
    start = [torch.tensor(one) for one in learner.initial(plan.plan.seed)["parameters"].arrays.values()]
    expected = torch.cat([one.reshape(-1) for one in oracle(start, layer)]).numpy()
    found = simulate(plan, PEOPLE, learner=learner).model["parameters"].values
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
    plain = simulate(agreed("fedavg"), PEOPLE, learner=learner).model["parameters"].values
    assert np.abs(plain - expected).max() > 0.01, "the contrast did something"


@pytest.mark.parametrize("name", ["deep", "normed"])
def test_it_passes_the_suite_and_without_mu_it_is_fedavg(name):
    plan = agreed(name=name)
    learner = build(plan)
    data = [prepare(one, plan) for one in PEOPLE.values()]
    check_algorithm(lambda: find(plan, learner), learner, data, rounds=2, training=plan.training)
    digests = [simulate(one, PEOPLE, learner=learner).digest for one in (agreed(name=name, mu=0.0), agreed("fedavg", name))]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["words", "heard"])
def test_layers_that_are_tied_or_recurrent_represent_rows_too(name):
    plan, table = agreed(name=name), rows("words")
    learner = build(plan)
    run = simulate(plan, {name: (table.x[k::3], table.y[k::3]) for k, name in enumerate("abc")}, learner=learner)
    represent = learner.represent(run.model, None)
    assert represent(table.x).shape == (120, 4)
    assert np.array_equal(represent(table.x)[:5], represent(table.x)[:5])


def test_a_deployed_run_has_the_bits_of_a_simulated_one(tmp_path):
    """The last model of each node lies on its disk; dropout, and rows that are judged by batch norm's running figures."""
    plan = agreed(name="normed")
    simulated = simulate(plan, PEOPLE, allow=[plan.model.torch])
    history = federation.run(plan, PEOPLE, tmp_path, allow=[plan.model.torch])
    assert [row["model"] for row in history["rounds"]] == [row["model"] for row in simulated.rounds]


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (agreed(layer="2.weight"), "the model has no layer '2.weight'; it has 0, 1, 2"),
        (agreed(name="linear"), "the model has one layer with weights, so none that represents a row"),
        (agreed(name="heard", layer="read"), r"what stands for 24 rows is a tuple and no tensor with as many rows; name another"),
    ],
)
def test_a_layer_that_stands_for_no_row_is_one_line(plan, said):
    table = rows("words" if "heard" in plan.model.torch else "binary")
    data = {name: (table.x[k::5], table.y[k::5]) for k, name in enumerate("abc")}
    with pytest.raises(AtollError, match=said) as caught:
        simulate(plan, data, learner=build(plan))
    assert "\n" not in str(caught.value)
