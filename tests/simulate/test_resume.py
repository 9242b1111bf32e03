"""A simulation that was stopped goes on to the bits of one that never was."""

from __future__ import annotations

import json

import pytest
from tests.federation import clients, plan, rows

import atoll
from atoll.errors import StoreError
from atoll.simulate import choose


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


KINDS = """
[[kind]]
share = 0.5
step = "20ms"
spread = 0.5

[[kind]]
share = 0.5
step = "2s"
jitter = 0.5
drop = 0.2
online = "60s"
offline = "20s"
"""


@pytest.mark.parametrize(
    ("cohort", "devices"),
    [
        ({"minimum": 2, "buffer": 2}, False),
        ({"minimum": 2, "quorum": 0.5, "grace": 0}, False),
        ({"minimum": 2, "buffer": 3, "deadline": 60}, True),
        ({"minimum": 2, "quorum": 0.7, "grace": 1, "deadline": 60}, True),
    ],
    ids=["buffer", "late", "buffer in virtual time", "quorum in virtual time"],
)
@pytest.mark.parametrize("rule", ["fedavg", "apfl"])
def test_updates_that_are_under_way_and_what_is_to_come_are_kept_too(tmp_path, rule, cohort, devices):
    options = {"alpha": 0.5} if rule == "apfl" else {}
    agreed = plan(
        plan={"rounds": 12}, aggregation={"rule": rule, "options": options}, cohort=cohort, compression={"up": ["topk:0.5"]}
    )
    many = {f"node-{k}": rows(k, 10 * k + 10) for k in range(6)}
    more = {}
    if devices:
        (tmp_path / "devices.toml").write_text(KINDS)
        more["devices"] = tmp_path / "devices.toml"
    whole = atoll.simulate(agreed, many, **more)
    assert any(row["late"] for row in whole.rounds)
    for after in (3, 8):  # stopped twice

        def watch(event, after=after) -> None:
            if event.get("round") == after:
                raise StoppedError

        with pytest.raises(StoppedError):
            atoll.simulate(agreed, many, store=tmp_path / "run", resume=after > 3, watch=watch, **more)
    again = atoll.simulate(agreed, many, store=tmp_path / "run", resume=True, **more)
    assert again.rounds == whole.rounds
    assert again.digest == whole.digest
    assert again.by_node == whole.by_node
    if devices:
        with pytest.raises(StoreError, match="is on other devices"):
            atoll.simulate(agreed, many, store=tmp_path / "run", resume=True)


def test_what_was_the_fastest_strategy_is_not_measured_again(tmp_path, monkeypatch):
    stopped(plan(), tmp_path, 2, strategy="auto")
    monkeypatch.setattr(choose, "_fastest", None)
    assert atoll.simulate(plan(), clients(), store=tmp_path, resume=True, strategy="auto").strategy == "map"


def test_a_line_that_was_cut_off_is_no_round(tmp_path):
    agreed = plan(plan={"rounds": 4})
    whole = atoll.simulate(agreed, clients())
    for after in (3, 4):
        with (tmp_path / "rounds.jsonl").open("a") as lines:  # as by a plug that was pulled
            lines.write('{"round": ')
        stopped(agreed, tmp_path, after, resume=after > 3)
    assert atoll.simulate(agreed, clients(), store=tmp_path, resume=True).rounds == whole.rounds


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


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("run.json", b"[1]", "AttributeError"),
        ("state.1", b"abc", "no safetensors body"),
        ("rounds.jsonl", b"", "tells of 0 of 1 rounds"),
    ],
)
def test_a_folder_that_lost_something_is_refused_in_one_line(tmp_path, file, content, said):
    stopped(plan(), tmp_path, 2)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(StoreError, match=rf"is damaged, or another version's \(.*{said}") as refused:
        atoll.simulate(plan(), clients(), store=tmp_path, resume=True)
    assert len(str(refused.value).splitlines()) == 1


def test_a_folder_of_another_version_is_refused_in_one_line(tmp_path):
    stopped(plan(), tmp_path, 2)
    about = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**about, "server": {}}))
    with pytest.raises(StoreError, match="another version's") as refused:
        atoll.simulate(plan(), clients(), store=tmp_path, resume=True)
    assert len(str(refused.value)) < 300
