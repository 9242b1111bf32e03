"""What a data's owner does before taking part: read a plan in words, write a policy, be asked, and say no."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.test_commands import atoll, one_line
from tests.federation import atoll as process
from tests.federation import events, plan, rows

from atoll.cli.owner import check_policy, new_policy, show_
from atoll.cli.taking import taken, words
from atoll.errors import AtollError
from atoll.node.policy import Policy
from atoll.store.ledger import Ledger

TABLE = {"features": ["age", "dose", "sex", "cp"], "target": "ill", "split": "part"}
ASKING = plan(model={"inputs": None}, data=TABLE, plan={"rounds": 1}, cohort={"minimum": 1})


def said(agreed, allow=()):
    return dict(words(taken(agreed, allow)))


def test_a_plan_in_plain_words():
    found = said(plan(model={"inputs": None}, data=TABLE, training={"epochs": 1}))
    assert found["It reads"].startswith(
        "of each row the columns age, dose, sex, cp; and ill, which the model learns to tell; and part,"
    )
    assert "a model (logistic) of 5 numbers, 40 B, by the method fedavg, in each round once over your rows." in found["It trains"]
    assert found["What leaves"].startswith(
        "about 1.0 kB a round: how training changed the model (5 numbers 'parameters'). Beside it how"
    )
    assert found["How often"].startswith(
        "3 rounds, an update in each; a round that fails is tried up to 3 times, so that at most 9 "
    )
    assert "at most 6 minutes" in found["How often"]  # 3 rounds, 3 tries, 20 s to wait for nodes and 20 s to train
    assert found["Protected by"].startswith("nothing but the way it is sent: the server reads your update")
    assert found["ε"].startswith("no noise is added")
    assert found["It runs here"].startswith("no function of this machine")


def test_what_is_unusual_is_said():
    table = {**TABLE, "columns": ["age", "dose", "sex", "cp", "ill", "part"]}
    found = said(plan(model={"inputs": None}, data=table, log={"kafka": "hub:9092"}, training={"epochs": None, "steps": 7}))
    assert "Careful: the plan itself says which column of a file has which name" in found["It reads"]
    assert "The operator of the Kafka at hub:9092" in found["Who sees it"]
    assert "in each round on 7 batches of 8 of your rows" in found["It trains"]
    assert said(plan())["It reads"].startswith("whole arrays: whatever you give the node")
    pictures = plan(model={"inputs": None}, data={"image": [28, 28, 1], "classes": ["cat", "dog"]})
    assert said(pictures)["It reads"].startswith("pictures, each made 28 × 28 × 1 numbers")
    scaffold = taken(plan(aggregation={"rule": "scaffold"}))
    assert sum(scaffold["model"]["update"].values()) == 10  # of a model of 5 numbers: twice as much as of fedavg


def test_what_guards_change_is_said():
    hidden = said(plan(privacy={"secure_aggregation": True}))
    assert "the server learns the sum of at least 3 nodes' updates, and no single one" in hidden["Protected by"]
    assert "Under the same guard how many rows you have" in hidden["What leaves"]
    assert hidden["Who sees it"].startswith("The server's operator: that you take part, when, and the sums. Nobody: your update.")
    buckets = {"privacy": {"secure_aggregation": True, "buckets": 4}, "cohort": {"minimum": 14}}
    assert "hides among as few as 2 others, not 13" in said(plan(**buckets, aggregation={"rule": "median"}))["Protected by"]
    local = said(plan(privacy={"clip": 1.0, "local_noise": {"epsilon": 8.0, "delta": 1e-5}}))
    assert "noise that this node adds itself" in local["Protected by"]
    assert "ε 8 at δ 1e-05, all 3 rounds together" in local["ε"]
    assert "no figures" in local["What leaves"]
    rows_ = said(plan(privacy={"example_noise": {"clip": 1.0, "multiplier": 1.0, "delta": 1e-5}}))
    assert "ε follows from how many rows you have" in rows_["ε"]


def test_what_makes_updates_and_models_smaller_is_said():
    wide = {"inputs": 3000}
    assert said(plan(model=wide))["Made smaller"] == (
        "updates: as they are; about 25.0 kB a round. Models on their way here: as they are; about 25.0 kB a round."
    )
    found = said(plan(model=wide, compression={"up": ["topk:0.05", "8bit"], "down": ["rotate", "4bit"]}))["Made smaller"]
    assert found == (
        "updates: only the largest 5 % of the numbers, then each number in 8 bits, rounded up or down by chance; what is left "
        "out is kept here, and a later update brings it; about 1.3 kB a round, in place of 25.0 kB. Models on their way here: "
        "all numbers spread over each other, then each number in 4 bits, rounded up or down by chance; about 2.5 kB a round."
    )
    by_steps = said(plan(model=wide, compression={"down": ["topk:0.1"]}))["Made smaller"]
    assert "kept at the server, and a later model brings it; about 2.5 kB a round, or 24.0 kB whole where the one" in by_steps
    hidden = said(plan(model=wide, privacy={"secure_aggregation": True}, compression={"up": ["randomk:0.1"]}))["Made smaller"]
    assert "only 10 % of the numbers, at places drawn for all nodes" in hidden
    assert "about 3.5 kB a round, in place of 25.1 kB" in hidden


def test_a_function_that_is_not_allowed_is_named_and_not_run():
    model = {"logistic": False, "jax": "ours.models:huge", "metrics": ["ours.metrics:rows"]}
    found = said(plan(model=model))
    assert "whose size isn't known here (the plan asks to run 'ours.models:huge' and 'ours.metrics:rows'" in found["It trains"]
    assert "the results of ours.models:huge, ours.metrics:rows" in found["What leaves"]
    assert found["It runs here"].startswith("ours.models:huge, ours.metrics:rows: functions of this machine, which see your rows")


def test_a_plan_is_shown_from_a_file(tmp_path, capsys):
    (tmp_path / "plan.json").write_text(ASKING.to_json())
    show_(str(tmp_path / "plan.json"))
    assert ASKING.digest in "".join(capsys.readouterr().out.split())
    with pytest.raises(AtollError, match="no server answers there"):
        show_("http://127.0.0.1:1")
    assert "can't be read" in one_line(atoll("plan", "show", tmp_path / "none.toml"))


def test_a_policy_is_written_checked_and_held_against_a_plan(tmp_path, capsys):
    file = tmp_path / "policy.toml"
    (tmp_path / "plan.json").write_text(ASKING.to_json())
    new_policy(file)
    with pytest.raises(AtollError, match="is there already"):
        new_policy(file)
    assert Policy.load(file).plans == "ask"
    check_policy(file)
    assert f"{file}: is a policy" in capsys.readouterr().out
    done = atoll("policy", "check", file, tmp_path / "plan.json")
    assert one_line(done) == f"atoll: {file}: minimum_cohort: the plan adds up as few as 1 updates, it takes 3"
    file.write_text("minimum_cohort = 1")
    check_policy(file, str(tmp_path / "plan.json"), as_json=True)
    assert json.loads(capsys.readouterr().out)["refused"] is None


def ask(server: str, place: Path, answer: str) -> subprocess.CompletedProcess[str]:
    """Run `atoll join` with a policy that asks, at a terminal where somebody answers."""
    table = "\n".join(["age,dose,sex,cp,ill,part", *(f"{a},{b},{c},{d},{int(y)},train" for (a, b, c, d), y in zip(*rows(0)))])
    (place / "rows.csv").write_text(table)
    (place / "policy.toml").write_text('plans = "ask"')
    words = ["join", server, "--data", place / "rows.csv", "--policy", place / "policy.toml", "--dir", place / "node"]
    ours, theirs = pty.openpty()
    try:
        os.write(ours, answer.encode())
        command = [sys.executable, "-m", "atoll", *map(str, words)]
        return subprocess.run(command, stdin=theirs, capture_output=True, text=True, timeout=60, check=False)
    finally:
        for end in (ours, theirs):
            with contextlib.suppress(OSError):
                os.close(end)


def test_whoever_sits_there_is_asked_once(tmp_path, capsys):
    (tmp_path / "plan.json").write_text(ASKING.to_json())
    words = ["serve", tmp_path / "plan.json", "--port", "0", "--store", tmp_path / "store", "--json"]
    with process(*words, log=tmp_path / "log") as running:
        server = next(event["url"] for event in events(running) if event["what"] == "listening")
        show_(server, as_json=True)
        assert json.loads(capsys.readouterr().out) == taken(ASKING)
        no = ask(server, tmp_path, "n\n")
        assert no.returncode == 2
        assert "of each row the columns age, dose, sex, cp" in " ".join(no.stderr.split())
        assert no.stderr.strip().splitlines()[-1].endswith("its owner said no; nothing was sent")
        assert not Ledger(tmp_path / "node").agreed(ASKING.digest)
        yes = ask(server, tmp_path, "y\n")
        assert yes.returncode == 0, yes.stderr
        assert "final model" in yes.stdout
        assert Ledger(tmp_path / "node").agreed(ASKING.digest)
