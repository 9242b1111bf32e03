"""Virtual time: what a run takes on devices of given speeds, against times worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from tests.federation import plan, rows

import atoll
from atoll.errors import AtollError, GaveUpError
from atoll.simulate.clock import Clock
from atoll.simulate.devices import Devices, Kind

SIZES = {"node-0": 16, "node-1": 32, "node-2": 80}
"""Rows: at 8 a batch and one epoch 2, 4 and 10 steps, so the first device of one second a step is done after 2 s."""


def ran(devices: Devices | None, **cohort) -> atoll.Simulated:
    agreed = plan(training={"epochs": 1}, cohort={"minimum": 1, "grace": 0, "deadline": 60, **cohort})
    return atoll.simulate(agreed, {name: rows(k, count) for k, (name, count) in enumerate(SIZES.items())}, devices=devices)


def times(done: atoll.Simulated) -> list[float]:
    return [row["at"] for row in done.rounds]


def test_a_round_takes_as_long_as_the_one_it_waits_for():
    second = Devices([Kind(step=1.0)], seed=1)
    assert times(ran(second, quorum=1.0)) == [10, 20, 30]
    assert times(ran(Devices([Kind(step=1.0, latency=0.5, up=48.0)], 1), quorum=1.0))[0] > 12  # 2 · .5 s, and 48 bytes a second
    done = ran(second, quorum=0.6)  # two of three; the third's update of round 1 comes at 10 s, in the round that is open then
    assert times(done) == [4, 8, 10]
    assert [row["answered"] for row in done.rounds] == [["node-0", "node-1"], ["node-0", "node-1"], ["node-0", "node-2"]]
    assert done.rounds[2]["late"] == {"node-2": 2}


def test_an_asynchronous_run_never_waits_for_the_slowest():
    done = ran(Devices([Kind(step=1.0)], 1), buffer=1)
    assert times(done) == [2, 4, 4]
    assert [row["answered"] for row in done.rounds] == [["node-0"], ["node-1"], ["node-0"]]


def test_devices_that_take_no_time_change_nothing():
    still, timed = ran(None), ran(Devices([Kind()], 1))
    assert timed.digest == still.digest
    assert times(timed) == [0, 0, 0]


def test_what_is_dropped_is_waited_for_until_the_deadline():
    class Forgetful(Devices):
        def drops(self, name, task):
            return name == "node-0" and task == (2, 1)

    done = ran(Forgetful([Kind(step=1.0)], 1), quorum=1.0)
    assert times(done) == [10, 70, 80]
    assert [len(row["answered"]) for row in done.rounds] == [3, 2, 3]


def test_a_device_that_goes_away_is_asked_again_when_it_is_back():
    always = {name: [(0.0, 1e9)] for name in SIZES}
    away = Devices([Kind(step=1.0)], 1, {**always, "node-1": [(0.0, 3.0), (20.0, 1e9)]})
    done = ran(away, quorum=1.0)
    assert times(done) == [24, 34, 44]
    late = Devices([Kind(step=1.0)], 1, {**always, "node-0": [(3.0, 6.0)], "node-2": []})
    done = ran(late, quorum=1.0)
    assert [row["answered"] for row in done.rounds] == [["node-1"], ["node-1"], ["node-1"]]
    assert times(done) == [4, 60 + 4, 60 + 8]  # at 4 s node-0 is asked, at 6 s it is gone
    with pytest.raises(GaveUpError, match="the deadline is over and 0 of at least 1 nodes are here"):
        ran(Devices([Kind()], 1, {}))


def test_kinds_are_shared_out_and_draws_are_of_the_seed():
    kinds = [Kind(share=0.7, step=1.0), Kind(share=0.3, step=10.0, spread=0.5, jitter=0.2, drop=0.25)]
    devices, same, other = Devices(kinds, 1), Devices(kinds, 1), Devices(kinds, 2)
    names = [f"client-{k}" for k in range(2000)]
    slow = [name for name in names if devices.kind(name) is kinds[1]]
    assert len(slow) == pytest.approx(600, abs=80)
    took = np.array([devices.takes(name, (1, 1), 1, 0, 0) for name in slow])
    assert took.tolist() == [same.takes(name, (1, 1), 1, 0, 0) for name in slow]
    assert took.tolist() != [other.takes(name, (1, 1), 1, 0, 0) for name in slow]
    assert np.median(took) == pytest.approx(10, rel=0.1)
    assert np.log(took).std() == pytest.approx(np.hypot(0.5, 0.2), rel=0.15)
    assert np.mean([devices.drops(name, (1, 1)) for name in slow]) == pytest.approx(0.25, abs=0.06)


def test_spells_alternate_with_the_means_that_were_asked_for():
    devices = Devices([Kind(online=100.0, offline=300.0)], 1)
    there = 0.0
    for k in range(200):
        at = 0.0
        for begins, ends in devices.spells(f"client-{k}"):
            assert at <= begins < ends
            there += max(0.0, min(ends, 4000.0) - min(begins, 4000.0))
            at = ends
            if at > 4000:
                break
    assert there / (200 * 4000) == pytest.approx(0.25, abs=0.02)


def test_without_devices_no_time_passes():
    clock = Clock()
    clock.wake(10.0)
    assert not clock
    assert clock.now == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[kind]]\nspeed = 3", "kind.0.speed"),
        ('[[kind]]\nup = "2 parsecs"', "a speed is bytes a second"),
        ('[[kind]]\nonline = "1h"', "online and offline go together"),
        ("[[kind]", "no TOML"),
        ('trace = "nowhere.csv"', "can't be read"),
        ('trace = "trace.csv"', "line 3"),
    ],
)
def test_a_file_that_cannot_be_is_named(tmp_path, text, said):
    (tmp_path / "devices.toml").write_text(text)
    (tmp_path / "trace.csv").write_text("client,from,to\nnode-0,0,10\nnode-0,20,15\n")
    with pytest.raises(AtollError, match=said):
        Devices.load(tmp_path / "devices.toml", 1)


def test_the_command_tells_when_a_target_is_reached(tmp_path):
    (tmp_path / "plan.json").write_text(plan(cohort={"minimum": 1, "grace": 0}).to_json())
    (tmp_path / "devices.toml").write_text('[[kind]]\nstep = "1s"\n')
    x, y = rows(0, 120)
    np.savez(tmp_path / "rows.npz", x=x, y=y)

    def said(*words: str) -> dict:
        common = ["--data", "rows.npz", "--clients", "3", "--strategy", "map", "--devices", "devices.toml", "--json"]
        command = [sys.executable, "-m", "atoll", words[0], "plan.json", *words[1:], *common]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
        return json.loads(done.stdout.splitlines()[-1])

    assert [row["at"] for row in said("simulate")["rounds"]] == [10, 20, 30]  # 40 rows, 5 batches, 2 epochs
    found = said("sweep", "--grid", "training.epochs=1,2", "--target", "loss=0.6")["rows"]
    assert {row["with"]["training.epochs"]: row["reached_at"] for row in found} == {
        row["with"]["training.epochs"]: 5 * row["with"]["training.epochs"] * row["reached"] for row in found
    }


def test_devices_that_come_and_go_are_not_drawn_beside():
    devices = Devices([Kind(online=10.0, offline=10.0)], 1)
    with pytest.raises(AtollError, match="come and go by themselves"):
        atoll.simulate(plan(cohort={"minimum": 2}), {"a": rows(0), "b": rows(1)}, devices=devices, there=lambda _: ["a", "b"])
