"""Closing a round: one total for one set of bodies, and numpy's own sums as the oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from atoll.algorithms.algorithm import Algorithm
from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.folds import BLOCK, mean
from atoll.algorithms.median import median
from atoll.algorithms.newton import newton
from atoll.errors import PlanError, WireError
from atoll.server.close import Accepted, _Bodies, close
from atoll.vector import Group, Layout, Tensor, Update
from atoll.wire import encode

SIZE = 3 * BLOCK + 17
LAYOUTS = {
    "parameters": Layout((Tensor("w", (SIZE,)),)),
    "buffers": Layout((Tensor("m", (5,)),), "float64"),
}
MODEL = "0" * 64


def updates(count: int = 4) -> list[Update]:
    rng = np.random.default_rng(0)
    return [
        Update({name: Group(one, rng.normal(size=one.size).astype(one.dtype)) for name, one in LAYOUTS.items()}, 10.0 + k)
        for k in range(count)
    ]


def start() -> dict[str, Group]:
    return {name: Group(layout, np.ones(layout.size, layout.dtype)) for name, layout in LAYOUTS.items()}


def test_fedavg_is_the_weighted_mean():
    made = updates()
    accepted = [Accepted(str(k), lambda one=one: b"".join(encode(one, MODEL))) for k, one in enumerate(made)]
    after = close(fedavg(), start(), LAYOUTS, MODEL, accepted, registered=4)
    for name in LAYOUTS:
        exact = sum(one.weight * one.groups[name].values.astype(np.float64) for one in made) / sum(one.weight for one in made)
        np.testing.assert_allclose(after[name].values, 1 + exact, rtol=1e-5, atol=1e-6)
    again = close(fedavg(), start(), LAYOUTS, MODEL, accepted, registered=4)
    assert after == again


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_fold_is_numpys_running_sum_to_the_last_bit(count):
    """Whatever the number of threads: blocks are independent, and inside one the order is that of the nodes."""
    made = updates(count)
    weights = [one.weight for one in made]
    total = mean(_Bodies([str(k) for k in range(count)], made, LAYOUTS), weights, 9)
    for name, layout in LAYOUTS.items():
        dtype = layout.dtype
        running = made[0].groups[name].values * np.asarray(weights[0], dtype)
        for one, weight in itertools.islice(zip(made, weights, strict=True), 1, None):
            running = running + one.groups[name].values * np.asarray(weight, dtype)
        np.testing.assert_array_equal(total.groups[name].values, running)
    assert (total.weight, total.participants, total.registered) == (sum(weights), count, 9)


def test_plain_groups_are_summed_without_weights():
    layout = Layout((Tensor("sum", (3,)),), "float64", "plain")
    made = [Update({"g": Group(layout, np.array([k, 2.0 * k, 1.0]))}, 100.0 * k + 1) for k in range(1, 4)]
    total = mean(_Bodies(["a", "b", "c"], made, {"g": layout}), [one.weight for one in made], 3)
    assert total.groups["g"].values.tolist() == [6.0, 12.0, 3.0]


def test_a_body_the_disk_altered_stops_the_close():
    body = b"".join(encode(updates(1)[0], MODEL))
    with pytest.raises(WireError):
        close(fedavg(), start(), LAYOUTS, MODEL, [Accepted("n", lambda: body[:-4])], registered=1)


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"damping": 1.5}, {"ridge": -1.0}])
def test_newtons_options_have_ranges(options):
    with pytest.raises(PlanError, match="damping lies in"):
        newton(**options)


def folded(late: dict[str, int], rule: Algorithm, made: list[Update]) -> dict[str, np.ndarray]:
    """What a round moves the model by."""
    accepted = [
        Accepted(str(k), lambda one=one: b"".join(encode(one, MODEL)), late.get(str(k), 0), MODEL if str(k) in late else "")
        for k, one in enumerate(made)
    ]
    after = close(rule, start(), LAYOUTS, MODEL, accepted, registered=len(made))
    return {name: after[name].values - start()[name].values for name in LAYOUTS}


def test_a_late_update_makes_a_shorter_step_and_its_weight_stays():
    made = updates(3)
    found = folded({"1": 3}, fedavg(), made)
    for name in LAYOUTS:
        exact = sum(
            one.weight * one.groups[name].values.astype(np.float64) * (0.5 if k == 1 else 1.0) for k, one in enumerate(made)
        ) / sum(one.weight for one in made)
        np.testing.assert_allclose(found[name], exact, rtol=1e-5, atol=1e-6)


def test_a_round_of_late_updates_only_moves_less_far():
    on_time, late = folded({}, fedavg(), updates()), folded(dict.fromkeys("0123", 3), fedavg(), updates())
    for name in LAYOUTS:
        np.testing.assert_allclose(late[name], on_time[name] / 2, rtol=1e-4, atol=1e-6)


def test_robust_rules_see_late_updates_as_they_are_shortened():
    made = updates(3)
    found = folded({"2": 3}, median(), made)
    for name in LAYOUTS:
        rows = np.array([one.groups[name].values * (0.5 if k == 2 else 1.0) for k, one in enumerate(made)])
        np.testing.assert_allclose(found[name], np.median(rows, axis=0), rtol=1e-5, atol=1e-6)


def test_counts_are_added_up_whole_however_late():
    layout = Layout((Tensor("n", (2,)),), "int64", "plain")
    bodies = _Bodies(["a"], [Update({"counts": Group(layout, np.array([3, 5]))}, 1.0)], {"counts": layout}, None, {"a": 0.5})
    assert bodies.block("counts", 0, 2)[0].tolist() == [3, 5]
