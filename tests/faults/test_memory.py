"""A node that remembers, killed at any instant of a round: what it remembers is what it would have been."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.federation import atoll, clients, events, plan

from atoll.simulate import simulate

KILLS = [("connected", 1), ("trained", 1), ("sent", 2), ("trained", 3), ("verdict", 3), ("verdict", 5)]
"""Each life of a node ends right after it told of this, of this round or a later one."""


def live(place: Path, url: str, name: str, kills: Sequence[tuple[str, int]]) -> None:
    """Be a node to the end of the run, killed on the way and started again each time."""
    words = ["join", url, "--data", place / f"{name}.npz", "--name", name, "--dir", place / name, "--json"]
    for number, (what, first) in enumerate([*kills, ("nothing", 0)]):
        with atoll(*words, log=place / f"{name}-{number}.log", patience=200) as node:
            for event in events(node):
                if event["what"] == what and event["round"] >= first:
                    node.kill()
                    break
            if node.wait() == 0:
                return


@pytest.mark.timeout(240)
def test_a_killed_node_goes_on_with_what_it_remembered(tmp_path):
    agreed = plan(
        plan={"rounds": 6},
        aggregation={"rule": "scaffold", "options": {}},
        cohort={"quorum": 1.0, "deadline": 60},
        training={"learning_rate": 0.1},
    )
    people = clients()
    (tmp_path / "plan.json").write_text(agreed.to_json())
    for name, (x, y) in people.items():
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
    history, lives = {}, []
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [one.join() for one in lives])
        serve = ["serve", tmp_path / "plan.json", "--port", "0", "--store", tmp_path / "store", "--json"]
        server = stack.enter_context(atoll(*serve, log=tmp_path / "server.log", patience=200))
        for event in events(server):
            if event["what"] == "listening":
                for name in people:
                    kills = KILLS if name == "node-1" else []
                    lives.append(threading.Thread(target=live, args=(tmp_path, event["url"], name, kills)))
                    lives[-1].start()
            if event["what"] == "history":
                history = event
                break
    assert [len(row["answered"]) for row in history["rounds"]] == [3] * 6
    assert history["last"] == simulate(agreed, people).digest
    forgetful = agreed.with_(aggregation={"rule": "fedavg"})
    assert history["last"] != simulate(forgetful, people).digest
    assert [path for name in people for path in (tmp_path / name / "memory").iterdir()] == [], "a run that is over is forgotten"
