"""Secure aggregation by one line of the plan: deployed and simulated."""

from __future__ import annotations

import pytest
from tests.federation import clients, plan, run

from atoll.simulate import simulate

SECURE = {"secure_aggregation": True}


def test_one_line_of_the_plan_hides_every_update(tmp_path):
    history = run(plan(privacy=SECURE), clients(), tmp_path)
    assert history["outcome"] == "completed", history["reason"]
    plain = run(plan(), clients(), tmp_path / "plain")
    assert [row["answered"] for row in history["rounds"]] == [row["answered"] for row in plain["rounds"]]
    for ours, theirs in zip(history["rounds"][:-1], plain["rounds"][:-1], strict=True):
        assert ours["nodes"] == pytest.approx(theirs["nodes"], rel=1e-6)
        assert not ours["by_node"]


def test_simulated_is_deployed_bit_for_bit(tmp_path):
    agreed = plan(privacy=SECURE)
    deployed, simulated = run(agreed, clients(), tmp_path), simulate(agreed, clients())
    assert [row["model"] for row in deployed["rounds"]] == [row["model"] for row in simulated.rounds]
    assert deployed["rounds"][0]["nodes"] == simulated.rounds[1]["nodes"]
