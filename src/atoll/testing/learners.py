"""What every learner holds to, whatever framework is behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import pairwise
from typing import cast

import numpy as np
import pytest

from atoll.errors import AtollError, LearnerError
from atoll.learner import CAN, Curved, Data, Learner, Rows
from atoll.vector import Flat, Group, Groups, Update, check, layouts_of
from atoll.wire import decode, encode

_BATCH = 16


def check_learner(build: Callable[[], Learner], data: Data, *, steps: int = 60, smallest: int = 1) -> None:
    """Check a learner: the same bits from the same seed, honest sums, and no more claimed than it can.

    Args:
        build: makes the learner; called more than once.
        data: rows it can learn something from in `steps` mini-batches of 16.
        steps: how many to fit for.
        smallest: the fewest rows that it can fit on; PyTorch's batch norm needs 2.

    Raises:
        AssertionError: it breaks one of the rules.
    """
    learner, twin = build(), build()
    assert learner.layouts == twin.layouts, "two learners of one plan have one layout"
    assert learner.can <= CAN.keys()
    start = learner.initial(5)
    check(start, learner.layouts)
    assert _same(start, twin.initial(5)), "one seed, one initial model"
    _fitting(learner, twin, start, data.train, steps)
    _pacing(learner, start, data.train, smallest)
    _judging(learner, start, data.train)
    _travelling(learner, start, data.train)
    if data.train.x.ndim == 2:
        _refusing(learner, start, data.train)
    if "correct" in learner.can:
        _correcting(learner, start, data.train)
    if "curvature" in learner.can:
        _curving(learner, start, data.train)


def _same(ours: Groups, theirs: Groups) -> bool:
    return ours.keys() == theirs.keys() and all(ours[name] == theirs[name] for name in ours)


def _fit(learner: Learner, groups: Groups, rows: Rows, steps: int) -> Groups:
    return learner.fit(groups, rows, steps, _BATCH, np.random.default_rng(3)).groups


def _fitting(learner: Learner, twin: Learner, start: Groups, rows: Rows, steps: int) -> None:
    before = {name: group.values.copy() for name, group in start.items()}
    np.random.seed(1)  # noqa: NPY002  a global generator that must not matter
    fitted = _fit(learner, start, rows, steps)
    assert all((start[name].values == before[name]).all() for name in start), "the groups given stay as they are"
    np.random.seed(2)  # noqa: NPY002
    assert _same(fitted, _fit(learner, start, rows, steps)), "the same again gives the same bits"
    assert _same(fitted, _fit(twin, start, rows, steps)), "and so does another learner of the plan"
    assert layouts_of(fitted) == dict(learner.layouts), "what comes out has the layout of what went in"
    assert not np.array_equal(fitted["parameters"].values, before["parameters"]), "fitting moves the parameters"
    losses = [learner.evaluate(groups, rows)["loss"] for groups in (start, fitted)]
    assert losses[1] < losses[0], "fitting lowers the loss on rows it saw"


def _pacing(learner: Learner, start: Groups, rows: Rows, smallest: int) -> None:
    """One step on as few rows as can be: the step is the learning rate times something that the rate doesn't change."""

    def moved(rate: float) -> Flat:
        fitted = learner.fit(start, rows, 1, smallest, np.random.default_rng(3), rate=rate).groups["parameters"]
        return fitted.values - start["parameters"].values

    whole, half = moved(1.0), None
    with contextlib.suppress(LearnerError):  # one without a learning rate refuses to change it
        half = moved(0.5)
    assert whole.any(), "a step moves the parameters"
    if half is not None:
        np.testing.assert_allclose(half, whole / 2, rtol=1e-3, atol=1e-6, err_msg="half the rate, half the first step")


def _judging(learner: Learner, groups: Groups, rows: Rows) -> None:
    whole = learner.evaluate(groups, rows)
    cut = len(rows.x) // 3
    parts = [learner.evaluate(groups, Rows(rows.x[s], rows.y[s])) for s in (slice(cut), slice(cut, None))]
    assert whole["samples"] == len(rows.x)
    for name, value in whole.items():
        added = sum(part[name] for part in parts)
        counted = name in ("samples", "correct") or name.startswith(("true_", "false_"))
        assert added == value if counted else np.isclose(added, value, rtol=1e-5), f"'{name}' is a sum over rows"


def _travelling(learner: Learner, start: Groups, rows: Rows) -> None:
    fitted = _fit(learner, start, rows, 5)
    body = b"".join(encode(Update(fitted, 1.0), "0" * 64))
    back = decode(body, learner.layouts, "0" * 64).groups
    check(back, learner.layouts)
    assert learner.evaluate(back, rows) == learner.evaluate(fitted, rows), "a model that travelled is the same model"


def _refusing(learner: Learner, groups: Groups, rows: Rows) -> None:
    wide = Rows(np.concatenate([rows.x, rows.x], axis=1), rows.y)
    for act in (lambda: learner.evaluate(groups, wide), lambda: _fit(learner, groups, wide, 1)):
        with pytest.raises(AtollError) as caught:
            act()
        assert "\n" not in str(caught.value), "an error is one line"


def _correcting(learner: Learner, start: Groups, rows: Rows) -> None:
    size, calls = learner.layouts["parameters"].size, []

    def nothing(gradient: Flat, vector: Flat) -> Flat:
        calls.append((gradient.shape, vector.shape))
        return np.zeros_like(gradient)

    still = learner.fit(start, rows, 4, _BATCH, np.random.default_rng(3), nothing).groups
    assert calls == [((size,), (size,))] * 4, "correct is asked once a step, with flat vectors"
    assert np.array_equal(still["parameters"].values, start["parameters"].values), "a zero gradient moves nothing (plain SGD)"
    plain = _fit(learner, start, rows, 4)["parameters"].values
    same = learner.fit(start, rows, 4, _BATCH, np.random.default_rng(3), lambda gradient, _: gradient).groups
    np.testing.assert_allclose(same["parameters"].values, plain, rtol=1e-4, atol=1e-6)
    if "sgd" in learner.can:
        _stepping(learner, start, rows)


def _stepping(learner: Learner, start: Groups, rows: Rows) -> None:
    """Each step is the same part of its gradient, whatever came before it."""
    seen: list[tuple[Flat, Flat]] = []

    def see(gradient: Flat, vector: Flat) -> Flat:
        seen.append((np.array(gradient, np.float64), np.array(vector, np.float64)))
        return gradient

    learner.fit(start, rows, 4, _BATCH, np.random.default_rng(3), see)
    rates = [-(then[1] - now[1]) @ now[0] / (now[0] @ now[0]) for now, then in pairwise(seen)]
    np.testing.assert_allclose(rates, rates[0], rtol=1e-3, err_msg="plain SGD has one rate")
    for now, then in pairwise(seen):
        np.testing.assert_allclose(then[1] - now[1], -rates[0] * now[0], rtol=1e-2, atol=1e-6, err_msg="and no other direction")


def _curving(learner: Learner, start: Groups, rows: Rows) -> None:
    group = _fit(learner, start, rows, 5)["parameters"]
    gradient, hessian = cast("Curved", learner).curvature({"parameters": group}, rows)

    def loss(values: Flat) -> float:
        return learner.evaluate({"parameters": Group(group.layout, values)}, rows)["loss"]

    step = 1e-5
    for k in range(group.layout.size):
        push = np.zeros(group.layout.size)
        push[k] = step
        ups = group.values + push, group.values - push
        assert np.isclose((loss(ups[0]) - loss(ups[1])) / (2 * step), gradient[k], rtol=1e-4, atol=1e-4)
        sides = [cast("Curved", learner).curvature({"parameters": Group(group.layout, up)}, rows)[0] for up in ups]
        np.testing.assert_allclose((sides[0] - sides[1]) / (2 * step), hessian[k], rtol=1e-4, atol=1e-4)
