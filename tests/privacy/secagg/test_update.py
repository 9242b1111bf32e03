"""A whole update under masks: the mean, the weights' sum and the metrics' sums are those of plain updates."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from atoll.errors import LayoutError
from atoll.keys import Identity
from atoll.privacy.secagg.terms import Terms
from atoll.privacy.secagg.together import secure_sum
from atoll.privacy.secagg.update import CUT, Code, parts_of
from atoll.vector import Group, Layout, Tensor, Total, Update

LAYOUTS = {
    "parameters": Layout((Tensor("kernel", (30, 20)), Tensor("bias", (20,)))),
    "buffers": Layout((Tensor("variance", (20,)),)),
    "counts": Layout((Tensor("seen", (3,)),), "int64", "plain"),
}
CODE = Code(LAYOUTS, ("samples", "loss"), clip=0.5, weight=1000, nodes=8, bits=32)


def update(number: int) -> Update:
    rng = np.random.default_rng(number)
    groups = {
        "parameters": Group(LAYOUTS["parameters"], rng.normal(0, 0.1, 620).astype(np.float32).clip(-0.5, 0.5)),
        "buffers": Group(LAYOUTS["buffers"], rng.gamma(2, 900, 20).astype(np.float32)),
        "counts": Group(LAYOUTS["counts"], np.array([number, -number, 10**5 * number])),
    }
    return Update(groups, float(100 + 37 * number), {"samples": 10.0 + number, "loss": 3.25 * number})


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_a_masked_total_is_the_plain_one(bits):
    code = replace(CODE, bits=bits)
    nodes = [Identity.of(f"u{number}") for number in range(8)]
    updates = {node.node: update(number) for number, node in enumerate(nodes)}
    terms = Terms("r", 1, 0, "00" * 32, 3, 0.2, 0)
    words = {one: parts_of(code.encode(each).groups) for one, each in updates.items()}
    summed = secure_sum(terms, nodes, words, {"masked": [nodes[3].node]})
    groups = {name: Group(code.masked[name], part) for name, part in zip(sorted(code.masked), summed.parts)}
    total, metrics = code.decode(Total(groups, 7.0, 7, 8))
    left = [updates[one] for one in summed.survivors]
    assert total.weight == sum(one.weight for one in left)
    assert metrics["samples"] == sum(one.metrics["samples"] for one in left)
    assert metrics["loss"] == pytest.approx(sum(one.metrics["loss"] for one in left), abs=1e-6)
    assert metrics[CUT] == 0
    assert (total.groups["counts"].values == sum(one.groups["counts"].values for one in left)).all()
    for name, tolerance in (("parameters", {16: 5e-3, 32: 2e-6, 64: 1e-7}[bits]), ("buffers", 2e-3)):
        exact = sum(one.groups[name].values.astype(np.float64) * one.weight for one in left) / total.weight
        assert np.abs(total.mean(name) - exact).max() < tolerance, name
    assert (total.participants, total.registered) == (7, 8)


def test_what_is_cut_is_counted():
    given = update(1)
    values = given.groups["parameters"].values.copy()
    values[:7] = [0.6, -0.6, 0.5, -0.5, 0.4, 3, -3]
    wide = replace(given, groups={**given.groups, "parameters": Group(LAYOUTS["parameters"], values)})
    total, metrics = CODE.decode(Total(CODE.encode(wide).groups, 1.0, 1, 1))
    assert metrics[CUT] == 4
    assert total.mean("parameters")[:7].tolist() == pytest.approx([0.5, -0.5, 0.5, -0.5, 0.4, 0.5, -0.5], abs=1e-6)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weight": 1001.0}, "a weight of 1001: up to 1000"),
        ({"weight": 0.0}, "a weight of 0"),
        ({"weight": math.nan}, "a weight of nan"),
        ({"metrics": {"rows": 1.0}}, "metric 'rows' is none"),
        ({"metrics": {"loss": 1e12}}, "a metric beyond"),
        ({"metrics": {"loss": math.nan}}, "NaN or infinity"),
    ],
)
def test_what_cannot_be_hidden_is_refused(changed, words):
    with pytest.raises(LayoutError, match=words):
        CODE.encode(replace(update(1), **changed))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("buffers", np.full(20, 2e6, np.float32)),
        ("counts", np.array([0, 0, np.iinfo(np.int64).min])),
        ("counts", np.array([np.iinfo(np.int64).max, 0, 0])),
    ],
)
def test_a_buffer_that_cannot_be_hidden_is_refused(name, values):
    given = update(1)
    with pytest.raises(LayoutError, match=f"group '{name}' holds a number beyond"):
        CODE.encode(replace(given, groups={**given.groups, name: Group(LAYOUTS[name], values)}))


def test_the_same_training_gives_the_same_words_and_another_other_ones():
    given, odd = update(1), update(1)
    assert all((one == other).all() for one, other in zip(parts_of(CODE.encode(given).groups), parts_of(CODE.encode(odd).groups)))
    odd.groups["buffers"].values[3] += 1
    name = "parameters"
    assert (CODE.encode(given).groups[name].values != CODE.encode(odd).groups[name].values).mean() > 0.05
