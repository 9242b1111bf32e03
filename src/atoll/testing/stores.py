"""What every store of histories holds to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from atoll.errors import StoreError
from atoll.store import EvaluationRow, NodeRow, RoundRow, RunRow, UpdateRow
from atoll.store.sql import SqlStore

_RUN = RunRow("r1", "heart", "d" * 64, "{}", 100.0, "m0")
_NODES = [NodeRow("r1", node, name, "k", 100.0, 100.0) for node, name in (("n2", "beta"), ("n1", "alpha"))]


def check_store(store: SqlStore) -> None:
    """Check an empty store: what goes in comes out, a round is stored whole or not at all.

    Raises:
        AssertionError: it breaks one of the rules.
    """
    with pytest.raises(StoreError, match="no run is stored here"):
        store.find()
    store.begin_run(_RUN)
    store.begin_run(replace(_RUN, run="r2-later", started=200.0))
    for row in _NODES:
        store.saw_node(row)
    store.saw_node(replace(_NODES[0], last_seen=150.0))
    assert [(row.name, row.last_seen) for row in store.nodes("r1")] == [("alpha", 100.0), ("beta", 150.0)]
    assert store.find().run == "r2-later"
    assert store.find("r1") == _RUN
    for wrong, said in (("r", "several runs start with 'r'"), ("x", "no run starts with 'x'")):
        with pytest.raises(StoreError, match=said):
            store.find(wrong)
    _rounds(store)
    opened = {"round": 3, "attempt": 1, "cohort": ["n1", "n2"], "late": {"n3": [2, 1]}}
    store.open_round("r1", opened)
    assert store.find("r1").opened == opened
    store.end_run("r1", "completed", "all rounds are done", 300.0)
    _history(store)


def _round(number: int, model: str) -> tuple[RoundRow, list[UpdateRow], list[EvaluationRow]]:
    row = RoundRow("r1", number, 1, 100.0 + number, 0.5, model, model, 2, 2, 80)
    updates = [
        UpdateRow("r1", number, 1, node, "accepted", "u" + node, 40, 0.1, 7.0, "", "0", place, {"samples": 7.0, "loss": 3.5})
        for place, node in enumerate(("n1", "n2"))
    ]
    if number == 2:
        updates[1] = replace(updates[1], round=1, attempt=2, folded=2)
    return row, updates, [EvaluationRow("r1", number, "holdout", {"samples": 10.0, "loss": 5.0 / number, "correct": 9.0})]


def _rounds(store: SqlStore) -> None:
    for number, model in ((1, "m1"), (2, "m2")):
        store.close_round(*_round(number, model))
    store.record_update(UpdateRow("r1", 2, 1, "n3", "rejected", "u", 4, reason="holds NaN"))
    with pytest.raises(StoreError):
        store.close_round(*_round(2, "again"))
    assert [row.model for row in store.rounds("r1")] == ["m1", "m2"], "a round is closed once"
    assert len(store.updates("r1")) == 5, "and the second try left nothing behind"
    assert [one.node for one in store.updates("r1", 2) if one.status == "accepted"] == ["n1", "n2"], "a late one counts there"
    assert [one.node for one in store.updates("r1", 1)] == ["n1", "n2"], "and not in its own round"
    assert store.late("r1", 1, 2) == {2: 1}
    store.record_evaluation(EvaluationRow("r1", 2, "n1", {"samples": 1.0, "loss": 9.0}))
    store.record_evaluation(EvaluationRow("r1", 2, "n1", {"samples": 7.0, "loss": 3.5}))
    assert [row.metrics["samples"] for row in store.evaluations("r1") if row.place == "n1"] == [7.0], "the later word counts"
    with store.pruning(["r2-later"], 400.0):
        pass
    assert [row.run for row in store.runs() if row.pruned == 400.0] == ["r2-later"]


def _history(store: SqlStore) -> None:
    history = store.history("r1")
    assert (history["outcome"], history["best"], history["last"]) == ("completed", "m2", "m2")
    first, second = history["rounds"]
    assert first["answered"] == second["answered"] == ["alpha", "beta"]
    assert (first["late"], second["late"]) == ({}, {"beta": 1})
    assert first["holdout"] == {"loss": 0.5, "accuracy": 0.9}
    assert second["refused"] == [{"name": "n3", "status": "rejected", "reason": "holds NaN"}]
    assert second["by_node"] == {"alpha": {"loss": 0.5}}
