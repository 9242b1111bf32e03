"""A simulation that was stopped goes on to the bits of one that never was."""

from __future__ import annotations

import pytest
from tests.federation import clients, plan

import atoll
from atoll.errors import StoreError


class StoppedError(Exception):
    """As by Ctrl-C."""


def stopped(agreed, place, after: int, **options) -> None:
    def watch(event) -> None:
        if event.get("round") == after:
            raise StoppedError

    with pytest.raises(StoppedError):
        atoll.simulate(agreed, clients(), store=place, watch=watch, **options)


@pytest.mark.parametrize("rule", ["fedavg", "scaffold", "fedadam"])
@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, rule, after):
    agreed = plan(plan={"rounds": 5}, aggregation={"rule": rule}, cohort={"minimum": 2, "fraction": 0.5})
    whole = atoll.simulate(agreed, clients())
    stopped(agreed, tmp_path, after)
    if after == 1:  # no round was kept
        with pytest.raises(StoreError, match="no run is there to go on with"):
            atoll.simulate(agreed, clients(), store=tmp_path, resume=True)
        return
    again = atoll.simulate(agreed, clients(), store=tmp_path, resume=True)
    assert again.digest == whole.digest
    assert again.rounds == whole.rounds
    assert atoll.simulate(agreed, clients(), store=tmp_path, resume=True).digest == whole.digest  # it is done


def test_what_cannot_go_on_is_one_line(tmp_path):
    agreed = plan()
    stopped(agreed, tmp_path, 2)
    for said, other, options in (
        ("a run is there already", agreed, {}),
        ("is of another plan", plan(plan={"seed": 5}), {"resume": True}),
    ):
        with pytest.raises(StoreError, match=said):
            atoll.simulate(other, clients(), store=tmp_path, **options)
    with pytest.raises(StoreError, match="with another clients, 3"):
        atoll.simulate(agreed, clients(4), store=tmp_path, resume=True)
    with pytest.raises(atoll.AtollError, match="name the folder"):
        atoll.simulate(agreed, clients(), resume=True)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(StoreError, match="is damaged"):
        atoll.simulate(agreed, clients(), store=tmp_path, resume=True)
