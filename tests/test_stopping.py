"""Early stopping: the same decision simulated and deployed, and the best model by the figure that the plan names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.federation import clients, plan, rows, run

from atoll.errors import PlanError
from atoll.learner import Rows
from atoll.simulate import simulate
from atoll.stopping import Course, Stopping, gain

HOLDOUT = Rows(*rows(9))
EARLY = {"plan": {"rounds": 50}, "stopping": {"patience": 2, "min_delta": 0.05}}


@given(st.lists(st.floats(0, 1), min_size=1), st.integers(1, 5), st.floats(0, 0.2))
def test_it_ends_where_the_last_rounds_gained_nothing_on_the_best_before(losses, patience, min_delta):
    stopping = Stopping(patience=patience, min_delta=min_delta)
    course = Course()
    for loss in losses:
        course = course.after(stopping, {"loss": loss})
    best, since = float("inf"), 0
    for loss in losses:
        best, since = (loss, 0) if -loss > -best + min_delta else (best, since + 1)
    assert (course.over(stopping) is not None) == (since >= patience)
    assert course.best == -best


def test_figures_that_rise_figures_that_are_not_there_and_nan():
    rising = Stopping(metric="accuracy", patience=1)
    course = Course().after(rising, {"accuracy": 0.5}).after(rising, {"accuracy": 0.9})
    assert course.over(rising) is None
    assert "no better accuracy than 0.9000 in 1 rounds" in str(course.after(rising, {"accuracy": 0.9}).over(rising))
    assert course.after(rising, {}) == course, "a round in which nobody judged a model says nothing"
    assert "no accuracy was measured in 1 rounds" in str(Course().after(rising, {"loss": 1.0}).over(rising))
    assert gain("loss", {"loss": float("nan")}) == -float("inf")
    r2 = Stopping(metric="r2", patience=1, target=0.5)
    assert "no better r2 than -0.2000 in 1" in str(Course().after(r2, {"r2": -0.2}).after(r2, {"r2": -0.3}).over(r2))
    assert "r2 is 0.5000, and the target 0.5" in str(Course().after(r2, {"r2": 0.5}).over(r2))
    own = Stopping(metric="brier", better="lower", patience=1)
    assert "no better brier than 0.1000" in str(Course().after(own, {"brier": 0.1}).after(own, {"brier": 0.2}).over(own))


@pytest.mark.parametrize(
    ("stopping", "said"),
    [
        ({"metric": "acuracy"}, "metric 'acuracy' is not known; did you mean 'accuracy'?"),
        ({"metric": "mine"}, "for one of model.metrics say better = 'lower' or 'higher'"),
        ({"metric": "rmse"}, "did you mean 'root_mean_squared_error'?"),
        ({"metric": "auc"}, """'auc' is measured only where model.metrics names it: add metrics = ["auc"] to [model]"""),
        ({"metric": "loss", "better": "higher"}, "which way is better for loss is known"),
    ],
)
def test_a_metric_that_is_not_known_says_which_way_is_better(stopping, said):
    with pytest.raises(PlanError) as caught:
        plan(stopping=stopping)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("holdout", [HOLDOUT, None], ids=["holdout", "nodes"])
def test_simulated_and_deployed_end_early_in_the_same_round(tmp_path, holdout):
    agreed = plan(**EARLY)
    simulated = simulate(agreed, clients(), holdout=holdout)
    history = run(agreed, clients(), tmp_path, holdout=holdout)
    done = len(simulated.rounds)
    assert 2 < done < 50
    assert len(history["rounds"]) == done
    assert history["last"] == simulated.digest
    assert history["outcome"] == "completed"
    assert history["reason"] == simulated.reason
    assert "stopped early: no better loss than" in history["reason"]


@pytest.mark.parametrize("holdout", [HOLDOUT, None], ids=["holdout", "nodes"])
def test_simulated_and_deployed_end_at_the_target(tmp_path, holdout):
    agreed = plan(plan={"rounds": 50}, stopping={"target": 0.3, "min_delta": 1.0})
    simulated = simulate(agreed, clients(), holdout=holdout)
    history = run(agreed, clients(), tmp_path, holdout=holdout)
    losses = [row["holdout" if holdout else "nodes"]["loss"] for row in simulated.rounds]
    assert 2 < len(losses) < 50
    assert losses[-1] <= 0.3 < min(losses[:-1])
    assert history["last"] == simulated.digest
    assert len(history["rounds"]) == len(losses)
    assert history["outcome"] == "completed"
    assert history["reason"] == simulated.reason == f"stopped early: loss is {losses[-1]:.4f}, and the target 0.3"


def test_without_patience_all_rounds_are_run():
    simulated = simulate(plan(plan={"rounds": 9}, stopping={"min_delta": 1.0}), clients(), holdout=HOLDOUT)
    assert len(simulated.rounds) == 9
    assert simulated.reason == "all 9 rounds are done"


def test_the_best_model_is_the_one_by_the_plans_figure(tmp_path):
    """The loss falls to the end; the accuracy is at its best before it, and of equals the first counts."""
    agreed = plan(plan={"rounds": 6}, training={"learning_rate": 0.01})
    found = {}
    for metric, pick in (("loss", min), ("accuracy", max)):
        history = run(agreed.with_(stopping={"metric": metric}), clients(), tmp_path / metric, holdout=HOLDOUT)
        judged = [row["holdout"][metric] for row in history["rounds"]]
        found[metric] = judged.index(pick(judged))
        assert history["best"] == history["rounds"][found[metric]]["model"]
    assert found["accuracy"] < found["loss"] == 5
