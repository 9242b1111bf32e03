"""The learning rate by round: a pure function of the plan, and the same for a simulated and a deployed node."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.federation import clients, plan, run

from atoll import learners
from atoll.errors import PlanError
from atoll.plan import Plan
from atoll.simulate import simulate
from atoll.training import Schedule, Training

COSINE = {"schedule": {"kind": "cosine", "warmup": 1}}

schedules = st.builds(
    lambda own, warmup: Schedule(**own, warmup=warmup),
    st.one_of(
        st.fixed_dictionaries({"kind": st.just("cosine"), "end": st.floats(0, 1)}),
        st.fixed_dictionaries({"kind": st.just("exponential"), "factor": st.floats(0.01, 1)}),
        st.fixed_dictionaries({"kind": st.just("step"), "factor": st.floats(0.01, 1), "every": st.integers(1, 9)}),
    ),
    st.integers(0, 9),
)


@given(schedules, st.integers(1, 200))
def test_a_rate_rises_to_one_and_never_rises_again(schedule, rounds):
    rates = [schedule.rate(round_, rounds) for round_ in range(1, rounds + 1)]
    top = schedule.warmup
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert all(0 <= rate <= 1 for rate in rates)
    assert rounds <= top or rates[top] == 1


def test_each_kind_by_its_formula():
    assert [Schedule(kind="exponential", factor=0.5).rate(k, 9) for k in (1, 2, 3)] == [1, 0.5, 0.25]
    assert [Schedule(kind="step", factor=0.1, every=2).rate(k, 9) for k in (1, 2, 3)] == [1, 1, 0.1]
    assert [Schedule(kind="cosine", end=0.5).rate(k, 2) for k in (1, 2, 3)] == pytest.approx([1, 0.75, 0.5])
    assert [Schedule(warmup=3).rate(k, 9) for k in (1, 2, 3, 4, 5)] == [0.25, 0.5, 0.75, 1, 1]


def test_the_pace_of_a_round():
    training = Training(epochs=2, batch_size=10, learning_rate=0.5, schedule=Schedule(kind="exponential", factor=0.5))
    assert training.pace(25, 2, 9) == (6, 10, 0.5, 0.25)
    assert Training(steps=7).pace(25, 1, 9).steps == 7


def test_each_round_is_fitted_at_its_own_rate():
    """One client, one step a round over all its rows: the moves of later rounds shrink as the schedule says."""
    data = {"only": clients()["node-0"]}
    small = {"epochs": None, "steps": 1, "batch_size": 40, "learning_rate": 1e-6}
    halving = small | {"schedule": {"kind": "exponential", "factor": 0.5}}

    def reached(training, rounds):
        agreed = plan(training=training, plan={"rounds": rounds}, cohort={"minimum": 1})
        return simulate(agreed, data).model["parameters"].values

    # The gradient hardly changes over such small steps: 1 + 1/2 + 1/4 of one step.
    assert reached(halving, 3) == pytest.approx(1.75 * reached(small, 1), rel=1e-4)


def test_deployed_and_simulated_follow_the_schedule_alike(tmp_path):
    agreed = plan(training=COSINE)
    simulated = simulate(agreed, clients())
    assert run(agreed, clients(), tmp_path)["last"] == simulated.digest
    assert simulate(plan(), clients()).digest != simulated.digest


def test_a_model_without_a_learning_rate_takes_no_schedule():
    solver = Plan.of(
        {
            "plan": {"name": "s", "rounds": 2},
            "model": {"sklearn": "LogisticRegression", "inputs": 4},
            "training": {"steps": 5, **COSINE},
        }
    )
    with pytest.raises(PlanError, match=r"training\.schedule: LogisticRegression has no learning rate"):
        learners.build(solver)


def test_the_how_tos_example_runs_and_its_tables_are_plans():
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "steer.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    subprocess.run([sys.executable, "-c", code], check=True)
    tables = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert len(tables) == 2
    for text in tables:
        assert plan(**tomllib.loads(text)).digest != plan().digest
    others = re.findall(r"^# (schedule = \{.*?\})", tables[0], re.MULTILINE)
    assert [plan(training=tomllib.loads(one)).training.schedule.kind for one in others] == ["step", "exponential"]
