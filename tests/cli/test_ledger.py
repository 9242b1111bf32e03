"""What left a node, as its owner reads it: written before it leaves, whole, and readable from an older node's directory."""

from __future__ import annotations

import json
import sqlite3

import pytest
from tests.cli.test_commands import atoll, one_line
from tests.federation import clients, plan, run

from atoll.store.ledger import Ledger, Spent
from atoll.wire import Address, Envelope


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Nodes that took part in two runs."""
    place = tmp_path_factory.mktemp("ward")
    for rounds in (3, 2):
        run(plan(plan={"rounds": rounds}), clients(), place)
    return place


def test_each_update_that_left_and_the_figures_at_the_end_are_listed_with_totals(place):
    found = json.loads(atoll("ledger", "--dir", place / "node-0", "--json").stdout)
    assert [entry["round"] for entry in found["entries"]] == [1, 2, 3, 1, 2]
    assert {entry["guard"] for entry in found["entries"]} == {"none"}
    assert all(entry["verdict"] == "accepted" for entry in found["entries"])
    assert found["totals"]["bytes"] == sum(entry["bytes"] for entry in found["entries"]) > 0
    assert (found["totals"]["updates"], found["totals"]["runs"], found["totals"]["epsilon"]) == (5, 2, None)
    assert [figures["figures"]["samples"] for figures in found["figures"]] == [40.0, 40.0]


def test_a_person_reads_one_runs_lines(place):
    run_, *_ = [entry["run"] for entry in json.loads(atoll("ledger", "--dir", place / "node-0", "--json").stdout)["entries"]]
    said = atoll("ledger", "--dir", place / "node-0", "--run", run_, COLUMNS="160").stdout
    assert "3 updates of 1 runs left" in said
    assert "no bound" in said
    assert f"how the final model of run {run_} does on this node's rows: loss 0." in said


def test_a_run_or_a_directory_that_is_not_there_is_one_line(place, tmp_path):
    assert (
        one_line(atoll("ledger", "--dir", tmp_path))
        == f"atoll: {tmp_path}: no ledger is there; name the node's directory with --dir"
    )
    assert not list(tmp_path.iterdir())
    assert one_line(atoll("ledger", "--dir", place / "node-0", "--run", "x")).startswith(
        "atoll: --run: nothing left for a run 'x'"
    )


@pytest.mark.parametrize(("guard", "epsilon", "delta"), [("central noise", 1.25, 2e-5), ("local noise", 0.75, 1e-5)])
def test_epsilon_adds_up_over_runs_or_goes_on_over_them(tmp_path, guard, epsilon, delta):
    """Noise of the node's own is counted over all updates of a plan already; another's by run."""
    ledger = Ledger(tmp_path)
    for run_, round_, spent in (("a", 1, 0.5), ("a", 2, 0.75), ("b", 1, 0.5)):
        envelope = Envelope(Address(run_, round_, 1, "n"), "p" * 64, f"{run_}{round_}", 10, b"", b"")
        ledger.leaving(envelope, 10.0, guard, Spent(spent, 1e-5))
        ledger.leaving(envelope, 11.0, guard, Spent(spent, 1e-5))  # it was sent again, as it was
    ledger.close()
    totals = json.loads(atoll("ledger", "--dir", tmp_path, "--json").stdout)["totals"]
    assert totals == {"updates": 3, "runs": 2, "bytes": 30, "epsilon": epsilon, "delta": delta}


def test_a_ledger_of_an_older_atoll_is_read_and_goes_on(tmp_path):
    """As schema 5 had it: no ε, no figures, no plans that an owner agreed to."""
    with sqlite3.connect(tmp_path / "ledger.sqlite") as base:
        base.execute("CREATE TABLE schema (version INTEGER)")
        base.execute("INSERT INTO schema VALUES (5)")
        base.execute(
            "CREATE TABLE ledger (id INTEGER PRIMARY KEY, run VARCHAR, node VARCHAR, digest VARCHAR, "
            "plan VARCHAR, guard VARCHAR, verdict VARCHAR, reason VARCHAR, round INTEGER, attempt INTEGER, "
            "bytes INTEGER, at FLOAT, judged_at FLOAT)"
        )
        base.execute("INSERT INTO ledger VALUES (1, 'r', 'n', 'd', 'p', 'none', 'accepted', '', 1, 1, 500, 10.0, 11.0)")
    base.close()
    ledger = Ledger(tmp_path)
    ledger.agree("q", "other", 12.0)
    ledger.leaving(Envelope(Address("r", 2, 1, "n"), "p", "e", 10, b"", b""), 13.0, "local noise", Spent(1.0, 1e-5))
    assert (ledger.left("p"), ledger.left("p", ("r", 2, 1)), ledger.agreed("q"), ledger.agreed("p")) == (2, 1, True, False)
    ledger.close()
    found = json.loads(atoll("ledger", "--dir", tmp_path, "--json").stdout)
    assert [(entry["bytes"], entry["epsilon"]) for entry in found["entries"]] == [(500, None), (10, 1.0)]
    assert found["totals"]["epsilon"] is None  # of the first one nothing is known
