"""An ensemble of local models from one round, and one model that learns what it says."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from tests.algorithms.test_methods import ETA, SIZES, Vector, average, descend, sites
from tests.federation import plan, rows, run

from atoll.algorithms import find
from atoll.algorithms.one_shot import guess, members
from atoll.errors import LearnerError, PlanError
from atoll.learner import Rows, scores
from atoll.learners import build
from atoll.plan import Plan
from atoll.server.replay import replay
from atoll.simulate import simulate
from atoll.store.sql import SqlStore

STEPS = 6
HELD = Rows(*rows(9, 60))


def agreed(**options: Any) -> Plan:
    return plan(
        plan={"rounds": 1},
        training={"epochs": None, "steps": STEPS, "batch_size": max(SIZES), "learning_rate": ETA},
        aggregation={"rule": "one_shot", "options": options},
        cohort={"minimum": 3, "quorum": 1.0, "deadline": 20},
    )


PEOPLE = {f"node-{k}": site for k, site in enumerate(sites())}


def chances(w: Vector, x: Vector) -> Vector:
    return 1 / (1 + np.exp(-np.column_stack([x, np.ones(len(x))]) @ w))


@pytest.mark.parametrize("weighted", [True, False])
def test_the_ensemble_is_every_nodes_own_model(weighted):
    found = simulate(agreed(weighted=weighted), PEOPLE)
    alone = [descend(np.zeros(5), site, STEPS) for site in sites()]
    for one, own in zip(members(found.state), alone, strict=True):
        np.testing.assert_allclose(one["parameters"].values, own, rtol=1e-9)
    mean = average([chances(own, HELD.x) for own in alone], weighted)
    assert (guess(build(agreed()), found.state, HELD, weighted=weighted) == (mean >= 0.5)).all()


def test_of_many_the_nodes_with_the_most_rows_are_kept():
    found = members(simulate(agreed(models=2), PEOPLE).state)
    alone = [descend(np.zeros(5), site, STEPS) for site in sites()]
    assert len(found) == 2
    for one, own in zip(found, alone[:2], strict=True):
        np.testing.assert_allclose(one["parameters"].values, own, rtol=1e-9)


def test_a_student_learns_what_the_ensemble_says_and_sees_no_label():
    made = agreed(distil=True, epochs=200, share=False)
    found = simulate(made, PEOPLE, holdout=HELD)
    blind = simulate(made, PEOPLE, holdout=Rows(HELD.x, 1 - HELD.y))
    assert found.digest == blind.digest
    whole = simulate(agreed(), PEOPLE)
    learner = build(made)
    said = guess(learner, whole.state, HELD)
    assert np.mean((scores(learner, found.model, HELD) >= 0) == said) > 0.95
    losses = [learner.evaluate(model, Rows(HELD.x, said))["loss"] for model in (found.model, whole.model)]
    assert losses[0] < losses[1], "nearer to the ensemble than the mean of its members is"


def test_a_deployed_run_has_the_bits_of_a_simulated_one_and_replays(tmp_path):
    made = agreed(distil=True)
    history = run(made, PEOPLE, tmp_path, holdout=HELD)
    assert history["last"] == simulate(made, PEOPLE, holdout=HELD).digest
    store = SqlStore(tmp_path / "store")

    async def again() -> list[bool]:
        return [one.found == one.stored async for one in replay(tmp_path / "store", store, store.find())]

    assert asyncio.run(again()) == [True], "from its stored model of the holdout, which nobody needs to have"
    store.close()


def test_what_does_not_fit_is_named():
    with pytest.raises(PlanError, match=r"'one_shot' trains on the server's own rows too: give it a holdout"):
        simulate(agreed(distil=True), PEOPLE)
    learner = build(agreed())
    empty = find(agreed(), learner).init(learner.initial(0))
    with pytest.raises(PlanError, match="ensemble of 'one_shot' is empty"):
        guess(learner, empty, HELD)
    with pytest.raises(LearnerError, match="can't be had row by row"):
        scores(Mute(), {}, HELD)


class Mute:
    """A learner that counts nothing."""

    def evaluate(self, groups: object, rows: Rows) -> dict[str, float]:
        return {"samples": float(len(rows))}


@pytest.mark.parametrize(
    ("model", "task"), [("SGDClassifier", "classes"), ("SGDRegressor", "numbers"), ("MLPClassifier", "classes")]
)
def test_any_kind_of_output_has_a_mean(model, task):
    made = agreed(distil=True).with_(
        model={"logistic": False, "sklearn": model, "classes": [0, 1, 2], "options": {}}, training={"learning_rate": 0.02}
    )
    x, _ = rows(3, 90)
    y = np.digitize(x.sum(axis=1), [-1, 1]).astype(float)
    people = {f"n{k}": (x[k::3], y[k::3]) for k in range(3)}
    found = simulate(made, people, holdout=Rows(x, y))
    assert build(made).task == task  # type: ignore[attr-defined]
    said = guess(build(made), found.state, Rows(x, y))
    assert np.mean(np.abs(said - y) < 0.5) > 0.5
