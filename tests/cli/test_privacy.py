"""`atoll privacy`: what a plan's noise promises, what another promise takes, and what it can't say."""

from __future__ import annotations

import json

import pytest
from tests.federation import plan
from typer.testing import CliRunner

from atoll.cli import app
from atoll.cli import privacy as command  # noqa: F401  it adds itself
from atoll.errors import AtollError
from atoll.privacy.dp.accountant import epsilon

LOCAL = {"clip": 1.0, "local_noise": {"multiplier": 0.5, "delta": 1e-5}}
EXAMPLE = {"example_noise": {"multiplier": 1.0, "delta": 1e-3, "clip": 1.0}}


def atoll_privacy(tmp_path, *words, **sections):
    agreed = plan(aggregation={"options": {"weighted": False}}, **sections)
    path = tmp_path / "plan.json"
    path.write_text(agreed.to_json())
    return CliRunner().invoke(app, ["privacy", str(path), *words])


def test_the_command_says_what_a_plan_promises_and_what_another_promise_takes(tmp_path):
    central = {"clip": 1.0, "central_noise": {"multiplier": 2.0, "delta": 1e-5}}
    done = atoll_privacy(tmp_path, "--json", "--epsilon", "2", "--solve", "noise", privacy=central, plan={"rounds": 10})
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["epsilon"] == epsilon(2.0, 10, 1e-5)
    assert found["by_round"][-1] == {"round": 10, "epsilon": found["epsilon"]}
    assert "neighbours" in found["neighbours"]
    assert epsilon(found["solved"]["multiplier"], 10, 1e-5) == found["solved"]["epsilon"] <= 2.0
    done = atoll_privacy(tmp_path, "--epsilon", "9", "--solve", "rounds", privacy=central)
    assert "for that: rounds" in done.stdout
    assert "who was asked is known" in done.stdout


def test_the_command_solves_for_a_tree_by_trees(tmp_path):
    tree = {"clip": 1.0, "tree_noise": {"multiplier": 4.0, "delta": 1e-5}}
    about = {"privacy": tree, "plan": {"rounds": 16}, "cohort": {"turns": 4}}
    found = {}
    for what in ("noise", "rounds"):
        done = atoll_privacy(tmp_path, "--json", "--epsilon", "3", "--solve", what, **about)
        found[what] = json.loads(done.stdout.splitlines()[-1])["solved"]
    assert found["noise"]["epsilon"] == pytest.approx(epsilon(found["noise"]["multiplier"], 4 * 3, 1e-5))  # 4 trees, 3 levels
    assert 2.99 < found["noise"]["epsilon"] <= 3
    assert found["rounds"]["rounds"] % 4 == 0
    assert found["rounds"]["epsilon"] <= 3 < epsilon(4.0, (found["rounds"]["rounds"] // 4 + 1) * 3, 1e-5)


def test_the_command_needs_no_rows_where_the_plan_names_them(tmp_path):
    noise = {**EXAMPLE["example_noise"], "rows": 80}
    done = atoll_privacy(tmp_path, "--json", privacy={"example_noise": noise})
    assert json.loads(done.stdout.splitlines()[-1])["rate"] == 0.1


def test_a_cohort_is_solved_for_where_the_draw_is_secret(tmp_path):
    central = {"clip": 1.0, "central_noise": {"multiplier": 1.0, "delta": 1e-5}}
    cohort = {"draw": "poisson", "fraction": 0.5}
    done = atoll_privacy(tmp_path, "--json", "--epsilon", "2", "--solve", "cohort", privacy=central, cohort=cohort)
    found = json.loads(done.stdout.splitlines()[-1])["solved"]
    assert 0 < found["fraction"] < 0.5
    assert epsilon(1.0, 3, 1e-5, found["fraction"]) <= found["epsilon"] <= 2.0


@pytest.mark.parametrize(
    ("words", "privacy", "said"),
    [
        ((), {}, "adds no noise"),
        ((), EXAMPLE, "--rows"),
        (("--epsilon", "1"), LOCAL, "go together"),
        (("--epsilon", "1", "--solve", "luck"), LOCAL, "noise, rounds, cohort"),
        (("--epsilon", "1", "--solve", "cohort"), LOCAL, "a known draw hides nobody"),
        (("--epsilon", "0.001", "--solve", "rounds"), LOCAL, "raise the noise"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, words, privacy, said):
    done = atoll_privacy(tmp_path, *words, privacy=privacy)
    assert isinstance(done.exception, AtollError)
    assert said in str(done.exception)
