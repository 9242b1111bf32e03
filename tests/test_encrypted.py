"""Encrypted sums by one line of the plan: deployed over both logs, and simulated."""

from __future__ import annotations

import pytest
from tests.federation import clients, plan, run

from atoll.simulate import simulate

ENCRYPTED = {"encryption": True}


def test_one_line_of_the_plan_encrypts_every_update(tmp_path):
    history = run(plan(privacy=ENCRYPTED), clients(), tmp_path)
    assert history["outcome"] == "completed", history["reason"]
    plain = run(plan(), clients(), tmp_path / "plain")
    assert [row["answered"] for row in history["rounds"]] == [row["answered"] for row in plain["rounds"]]
    for ours, theirs in zip(history["rounds"][:-1], plain["rounds"][:-1], strict=True):
        assert ours["nodes"] == pytest.approx(theirs["nodes"], rel=1e-5)
        assert not ours["by_node"]


def test_a_simulation_goes_through_the_same(tmp_path):
    agreed = plan(privacy=ENCRYPTED)
    encrypted, plain = simulate(agreed, clients()), simulate(plan(), clients())
    for ours, theirs in zip(encrypted.rounds, plain.rounds, strict=True):
        assert ours["nodes"] == pytest.approx(theirs["nodes"], rel=1e-5)
        assert ours["answered"] == theirs["answered"]
