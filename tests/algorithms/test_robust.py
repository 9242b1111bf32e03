"""Robust rules: a table of rules, and what each of them holds to."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import federation

import atoll
from atoll.algorithms import find, known
from atoll.algorithms.median import ordered
from atoll.errors import PlanError
from atoll.learner import Rows
from atoll.learners import build
from atoll.vector import Group, Layout, Tensor, Total

Matrix = np.ndarray
"""Updates `[nodes, parameters]`."""


class Updates(NamedTuple):
    """Updates in memory, as a fold wants them: three groups, cut from each row."""

    rows: Matrix
    counts: Matrix
    cut: int

    @property
    def ids(self) -> list[str]:
        return [f"node-{k:02}" for k in range(len(self.rows))]

    @property
    def layouts(self) -> dict[str, Layout]:
        dtype: Any = str(self.rows.dtype)
        return {
            "parameters": Layout((Tensor("all", (self.cut,)),), dtype),
            "buffers": Layout((Tensor("more", (self.rows.shape[1] - self.cut,)),), dtype),
            "counts": Layout((Tensor("batches", (1,)),), "int64", "plain"),
        }

    @property
    def reference(self) -> dict[str, Group]:
        cut = {"parameters": root(self.rows)[: self.cut], "buffers": root(self.rows)[self.cut :]}
        return {name: Group(self.layouts[name], values.astype(self.rows.dtype)) for name, values in cut.items()} | {
            "counts": Group(self.layouts["counts"], np.array([1]))
        }

    def block(self, group: str, lo: int, hi: int) -> list[Matrix]:
        parts = {"parameters": self.rows[:, : self.cut], "buffers": self.rows[:, self.cut :], "counts": self.counts}[group]
        return [row[lo:hi] for row in parts]


def root(rows: Matrix) -> Matrix:
    """What the server learned, for the rules that ask it."""
    return np.median(rows.astype(np.float64), axis=0)


def fold(rule: str, rows: Matrix, weights: Sequence[float] | None = None, **options: Any) -> Total:
    updates = Updates(rows, np.arange(len(rows))[:, None] + 2**55, rows.shape[1] // 2 + 1)
    return known()[rule](**options).fold(updates, weights or [1.0 + k for k in range(len(rows))], len(rows))


def result(rule: str, rows: Matrix, weights: Sequence[float] | None = None, **options: Any) -> Matrix:
    total = fold(rule, rows, weights, **options)
    return np.concatenate([total.mean("parameters"), total.mean("buffers")])


# What the papers say, written as naively as can be.


def median(x: Matrix) -> Matrix:
    return np.median(x, axis=0)


def trimmed_mean(x: Matrix) -> Matrix:
    out = -(-len(x) // 5)  # a fifth at either end, rounded up
    return np.array([np.mean(sorted(column)[out : len(x) - out]) for column in x.T])


def scores(x: Matrix, f: int) -> list[float]:
    away = [[float(((one - other) ** 2).sum()) for j, other in enumerate(x) if j != i] for i, one in enumerate(x)]
    return [sum(sorted(row)[: max(len(x) - f - 2, 1)]) for row in away]


def krum(x: Matrix) -> Matrix:
    return x[int(np.argmin(scores(x, (len(x) - 3) // 2)))]


def multi_krum(x: Matrix) -> Matrix:
    f = (len(x) - 3) // 2
    return x[np.argsort(scores(x, f), kind="stable")[: len(x) - f]].mean(axis=0)


def bulyan(x: Matrix) -> Matrix:
    f, left, chosen = (len(x) - 3) // 4, list(range(len(x))), []
    while len(chosen) < len(x) - 2 * f:
        chosen.append(left.pop(int(np.argmin(scores(x[left], f)))))
    columns = x[chosen].T
    away = np.abs(columns - np.median(columns, axis=1, keepdims=True))
    return np.array([np.mean(column[np.argsort(off)[: len(x) - 4 * f]]) for column, off in zip(columns, away, strict=True)])


def geometric_median(x: Matrix) -> Matrix:
    point = x.mean(axis=0)
    for _ in range(3000):
        pulls = 1 / np.maximum(np.linalg.norm(x - point, axis=1), 1e-6)
        point = pulls @ x / pulls.sum()
    return point


def norm_clipping(x: Matrix) -> Matrix:
    norms = np.linalg.norm(x, axis=1)
    return np.mean([row * min(1, np.median(norms) / norm) for row, norm in zip(x, norms, strict=True)], axis=0)


def centered_clipping(x: Matrix) -> Matrix:
    centre = np.zeros(x.shape[1])
    for _ in range(3):
        away = np.linalg.norm(x - centre, axis=1)
        centre = centre + np.mean([(row - centre) * min(1, np.median(away) / a) for row, a in zip(x, away, strict=True)], axis=0)
    return centre


def fltrust(x: Matrix) -> Matrix:
    own = root(x)
    length = np.linalg.norm(own)
    trust = [max(0.0, float(row @ own) / (np.linalg.norm(row) * length)) for row in x]
    return sum(one * length / np.linalg.norm(row) * row for one, row in zip(trust, x, strict=True)) / sum(trust)


NAIVE: dict[str, Callable[[Matrix], Matrix]] = {
    function.__name__: function
    for function in (median, trimmed_mean, krum, multi_krum, bulyan, geometric_median, norm_clipping, centered_clipping, fltrust)
}
every_rule = pytest.mark.parametrize("rule", NAIVE)


def some(seed: int, nodes: int, size: int, dtype: str = "float64") -> Matrix:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=size) + 0.3 * rng.standard_normal((nodes, size))).astype(dtype)


def test_every_robust_rule_is_in_the_table():
    assert {name for name, factory in known().items() if ".fedavg" not in factory.__module__} >= NAIVE.keys()


@every_rule
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(7, 16), st.integers(2, 12))
def test_it_is_what_the_paper_says(rule, seed, nodes, size):
    rows = some(seed, nodes, size)
    # Weiszfeld's steps become small before they end: theirs and ours stop a little apart.
    close = 1e-4 if rule == "geometric_median" else 1e-9
    np.testing.assert_allclose(result(rule, rows), NAIVE[rule](rows), rtol=close, atol=close)


@every_rule
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(15)))
def test_names_and_their_order_change_nothing(rule, seed, order):
    rows = some(seed, 15, 6)  # with fewer than 15 Bulyan's last choices are between two, each the other's nearest
    np.testing.assert_allclose(result(rule, rows[order]), result(rule, rows), rtol=1e-9, atol=1e-9)


@every_rule
@pytest.mark.parametrize("size", [1e6, 3e37])
@pytest.mark.parametrize("nodes", [7, 8])
def test_one_outlier_does_not_carry_it_away(rule, size, nodes):
    rows = some(1, nodes, 40, "float32")
    honest = result(rule, rows[:-1]) if nodes > 7 else result(rule, rows)
    rows[-1] = size * np.sign(rows[-1])
    off = np.linalg.norm(result(rule, rows) - honest)
    assert off < np.linalg.norm(rows[:-1] - rows[:-1].mean(axis=0), axis=1).max() + 0.5 * np.linalg.norm(honest)


@every_rule
def test_nor_does_one_that_a_float_cannot_square(rule):
    rows = some(2, 9, 10)
    rows[4] = 1e300
    found = result(rule, rows)
    assert np.linalg.norm(found - rows[0]) < 10


@every_rule
def test_weights_are_a_nodes_own_word_and_count_for_nothing(rule):
    rows = some(3, 8, 10)
    boast = [1.0] * 7 + [1e9]
    assert result(rule, rows, boast).tobytes() == result(rule, rows, [1.0] * 8).tobytes()


@pytest.mark.parametrize("rule", ["geometric_median", "norm_clipping"])
def test_unless_the_plan_says_so(rule):
    rows = some(3, 8, 10)
    weights = [1.0, 2.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    repeated = np.repeat(rows, [int(w) for w in weights], axis=0)
    options: dict[str, Any] = {"bound": 1.0} if rule == "norm_clipping" else {}
    weighted = result(rule, rows, weights, weighted=True, **options)
    np.testing.assert_allclose(weighted, result(rule, repeated, **options), rtol=1e-6)


@every_rule
def test_any_number_of_threads_gives_the_same_bits(rule, monkeypatch):
    rows = some(4, 11, 40_001, "float32")
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        found.append(result(rule, rows).tobytes())
    assert found[0] == found[1] == found[2]


@every_rule
def test_more_than_one_block_and_whole_numbers(rule):
    rows = some(5, 7, 60_000)
    total = fold(rule, rows)
    assert total.mean("counts").tolist() == [sum(range(7)) + 7 * 2**55]
    assert total.groups["parameters"].values.dtype == np.float64
    expected = NAIVE[rule](rows) if rule != "geometric_median" else result(rule, rows)
    np.testing.assert_allclose(result(rule, rows), expected, rtol=1e-8, atol=1e-8)


@every_rule
def test_equal_updates_give_that_update(rule):
    rows = np.repeat(some(6, 1, 10, "float32"), 8, axis=0)
    np.testing.assert_allclose(result(rule, rows), rows[0], rtol=1e-6)
    assert not result(rule, np.zeros((8, 10))).any()


@given(st.integers(1, 40), st.integers(0, 10**6))
def test_columns_are_sorted(nodes, seed):
    rows = np.random.default_rng(seed).integers(-5, 5, (nodes, 7)).astype(np.float32)
    assert (np.array(ordered(rows.copy())) == np.sort(rows, axis=0)).all()


def test_krum_gives_one_of_the_updates_and_bulyan_stays_among_them():
    rows = some(7, 11, 30, "float32")
    assert result("krum", rows).tobytes() in {row.tobytes() for row in rows}
    found = result("bulyan", rows)
    assert ((found >= rows.min(axis=0)) & (found <= rows.max(axis=0))).all()


def test_hostile_nodes_who_agree_with_each_other_are_not_the_nearest():
    for seed, f in itertools.product(range(5), (1, 2, 3)):
        rows = some(seed, 4 * f + 3, 30)
        rows[:f] = 50.0
        for rule in ("krum", "multi_krum", "bulyan"):
            assert np.abs(result(rule, rows, f=f)).max() < 10, rule


def plan(rule: str, minimum: int = 20, **options: Any) -> atoll.Plan:
    return federation.plan(aggregation={"rule": rule, "options": options}, cohort={"minimum": minimum})


@pytest.mark.parametrize(
    ("rule", "minimum", "options", "said"),
    [
        ("krum", 4, {}, "cohort.minimum: 'krum' with these options needs at least 5 nodes in every round; it is 4"),
        ("krum", 8, {"f": 3}, "needs at least 9 nodes"),
        ("multi_krum", 8, {"f": 1, "m": 10}, "needs at least 10 nodes"),
        ("multi_krum", 8, {"m": 0}, "aggregation.options.m"),
        ("bulyan", 10, {"f": 2}, "needs at least 11 nodes"),
        ("bulyan", 10, {"f": -1}, "aggregation.options.f"),
        ("krum", 20, {"f": 1.5}, "aggregation.options.f"),
        ("median", 2, {}, "needs at least 3 nodes"),
        ("trimmed_mean", 20, {"trim": 0.5}, "aggregation.options.trim"),
        ("trimmed_mean", 20, {"trim": "much"}, "can't take"),
        ("trimmed_mean", 20, {"trimm": 0.1}, "did you mean 'trim'"),
        ("norm_clipping", 20, {"bound": 0}, "aggregation.options.bound"),
        ("centered_clipping", 20, {"radius": -1.0}, "aggregation.options.radius"),
        ("centered_clipping", 20, {"iterations": 0}, "aggregation.options.iterations"),
        ("geometric_median", 20, {"smoothing": 0}, "aggregation.options"),
        ("medain", 20, {}, "did you mean 'median'"),
    ],
)
def test_a_mistake_is_said_in_one_line(rule, minimum, options, said):
    agreed = plan(rule, minimum, **options)
    with pytest.raises(PlanError) as caught:
        find(agreed, build(agreed))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("rule", "minimum"), [("median", 3), ("multi_krum", 5)])
def test_deployed_equals_simulated(rule, minimum, tmp_path):
    agreed, data = plan(rule, minimum), federation.clients(minimum)
    history = federation.run(agreed, data, tmp_path)
    assert history["rounds"][-1]["model"] == atoll.simulate(agreed, data).digest


class Alone(Updates):
    """Updates of which none points where the server's own does."""

    @property
    def reference(self) -> dict[str, Group]:
        return {name: group.with_values(-group.values) for name, group in super().reference.items()}


def test_what_points_away_from_the_server_has_no_say():
    rows = some(9, 9, 30)
    rows[:4] = -100 * root(rows)
    found = result("fltrust", rows)
    honest = np.linalg.norm(root(rows))
    assert float(found @ root(rows)) > 0.9 * np.linalg.norm(found) * honest
    assert np.linalg.norm(found) <= honest * (1 + 1e-9)
    alone = known()["fltrust"]().fold(Alone(np.repeat(rows[-1:], 5, axis=0), np.ones((5, 1), int), 16), [1.0] * 5, 5)
    assert not alone.mean("parameters").any(), "where nobody is trusted, nothing moves"
    assert alone.mean("counts").tolist() == [5], "the server's own counts aren't the nodes'"


def test_a_step_moves_the_model_by_the_result():
    algorithm = known()["median"]()
    rows = some(8, 5, 4, "float32")
    layout = Layout((Tensor("all", (4,)),))
    state = {"parameters": Group(layout, np.ones(4, np.float32))}
    total = Total({"parameters": Group(layout, np.median(rows, axis=0).astype(np.float32))}, 1.0, 5, 5)
    np.testing.assert_allclose(algorithm.step(state, total)["parameters"].values, 1 + np.median(rows, axis=0), rtol=1e-6)


def test_a_federation_with_a_liar_learns_by_the_median_and_not_by_the_mean():
    data = federation.clients(5)
    x, y = data["node-4"]
    data["node-4"] = (x * 1e3, 1 - y)
    holdout = Rows(*federation.rows(99, 400))
    accuracy = {rule: atoll.simulate(plan(rule, 5), data, holdout=holdout).holdout["accuracy"] for rule in ("fedavg", "median")}
    assert accuracy["median"] > 0.9 > 0.7 > accuracy["fedavg"]
