"""The plan: strict, one line for each mistake, and one digest for one agreement. And the messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atoll.errors import PlanError, WireError
from atoll.messages import PROTOCOL, FlUpdate, Message, StartTraining
from atoll.plan import Plan

GOOD = """
[plan]
name = "heart"
rounds = 3
[model]
logistic = true
[data]
features = ["age", "cp"]
target = "y"
categories = { cp = [1, 2, 3] }
[cohort]
deadline = "10m"
grace = "500ms"
"""


def load(tmp_path: Path, text: str) -> Plan:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    return Plan.load(path)


def test_a_good_plan(tmp_path):
    plan = load(tmp_path, GOOD)
    assert plan.inputs == 3
    assert (plan.cohort.deadline, plan.cohort.grace) == (600.0, 0.5)
    assert Plan.from_json(plan.to_json()) == plan
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert Plan.load(tmp_path / "plan.json").digest == plan.digest


def test_a_default_written_out_is_no_other_plan(tmp_path):
    """Only what differs from the defaults is in the canonical JSON, so a later version may add keys."""
    plan = load(tmp_path, GOOD)
    out = Plan.of(plan.model_dump(mode="json"))
    assert out == plan
    assert out.digest == plan.digest
    assert json.loads(out.to_json()).keys() == {"plan", "model", "data", "cohort"}
    assert json.loads(plan.with_(training={"schedule": {"kind": "constant", "warmup": 2}}).to_json())["training"] == {
        "schedule": {"warmup": 2}
    }
    assert Plan.from_json(plan.with_(training={"batch_size": 8}).to_json()).training.batch_size == 8


def test_the_digest_is_of_what_is_agreed_not_of_how_it_is_written(tmp_path):
    plan = load(tmp_path, GOOD)
    head, data, cohort = GOOD.partition("[data]")[0], GOOD.partition("[data]")[2], ""
    data, _, cohort = data.partition("[cohort]")
    again = load(tmp_path, f"[cohort]\ngrace = 0.5\ndeadline = 600\n# a comment\n[data]{data}\n{head}")
    assert again.digest == plan.digest
    assert load(tmp_path, GOOD.replace("rounds = 3", "rounds = 4")).digest != plan.digest
    assert cohort


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("rounds = 3", "round = 3", "plan.rounds: is missing"),
        ('name = "heart"', 'name = "heart"\nrouns = 1', "plan.rouns: unknown key; did you mean 'rounds'?"),
        ("[cohort]", "[cohor]", "cohor: unknown key; did you mean 'cohort'?"),
        ("rounds = 3", 'rounds = "3"', "plan.rounds: Input should be a valid integer (it is '3')"),
        ("rounds = 3", "rounds = 0", "plan.rounds: Input should be greater than or equal to 1 (it is 0)"),
        ('name = "heart"', 'name = "../x"', "plan.name: String should match pattern"),
        ("logistic = true", "", "exactly one of logistic, keras, sklearn, torch, jax, trees names the model; none is given"),
        ("logistic = true", 'logistic = true\nsklearn = "SGDClassifier"', "logistic and sklearn are given"),
        ("logistic = true", "logistic = true\nclasses = [1, 0]", "classes are at least two different labels in rising order"),
        ('target = "y"', "", "features and target go together"),
        ("cp = [1", "cq = [1", "categories.cq is no feature; did you mean 'cp'?"),
        ('["age", "cp"]', '["cp", "cp"]', "a feature is named twice"),
        ('target = "y"', 'target = "y"\ncolumns = ["age", "cp", "yy"]', "'y' is not among columns; did you mean 'yy'?"),
        ('"10m"', '"10 minutes"', 'a duration is a number of seconds, or text such as "500ms"'),
        ("[cohort]", "[cohort]\nquorum = 1.5", "cohort.quorum: Input should be less than or equal to 1 (it is 1.5)"),
        ("[cohort]", "[training]\nepochs = 1\nsteps = 2\n[cohort]", "epochs and steps exclude each other: keep one"),
        ("[cohort]", "[training]\nschedule = { kind = 'cosin' }\n[cohort]", "training.schedule.kind: Input should be"),
        ("[cohort]", "[training]\nschedule = { knd = 'cosine' }\n[cohort]", "schedule.knd: unknown key; did you mean 'kind'?"),
        ("[cohort]", "[training]\nschedule = { kind = 'step', factor = 0.5 }\n[cohort]", "kind = 'step' needs every"),
        (
            "[cohort]",
            "[training]\nschedule = { kind = 'cosine', factor = 0.5 }\n[cohort]",
            "factor means nothing to kind = 'cosine'; it goes with exponential and step",
        ),
        ("[cohort]", "[training]\nschedule = {}\n[cohort]", "a schedule that changes nothing"),
        ("[cohort]", "[privacy]\nsecret = true\n[cohort]", "privacy.secret: unknown key"),
        ("[cohort]", "[privacy]\nsecure_aggregation = true\n[cohort]", "raise cohort.minimum to 3 or more"),
        ("logistic = true", "keras = {}", "exactly one of"),
        ("logistic = true", 'keras = "none.json"', "none.json can't be read"),
    ],
)
def test_each_mistake_is_one_line_with_file_key_and_the_right_name(tmp_path, old, new, said):
    assert old in GOOD
    with pytest.raises(PlanError) as caught:
        load(tmp_path, GOOD.replace(old, new))
    assert said in str(caught.value)
    assert str(tmp_path / "plan.toml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_plan(tmp_path):
    for text, said in (("[plan", "no TOML"), ("", "plan: is missing")):
        with pytest.raises(PlanError, match=said):
            load(tmp_path, text)
    with pytest.raises(PlanError, match="`atoll new DIR` writes a plan to start from"):
        Plan.load(tmp_path / "none.toml")
    for text in ("{", "[]", '{"plan": 1}'):
        with pytest.raises(PlanError):
            Plan.from_json(text)


def test_a_keras_file_becomes_part_of_the_plan(tmp_path):
    text = GOOD.replace("logistic = true", 'keras = "model.json"\nloss = "mean_squared_error"')
    (tmp_path / "model.json").write_text(json.dumps({"class_name": "Sequential", "config": {"a": 1}}))
    one = load(tmp_path, text)
    assert one.model.keras == {"class_name": "Sequential", "config": {"a": 1}}
    (tmp_path / "model.json").write_text(json.dumps({"class_name": "Sequential", "config": {"a": 2}}))
    assert load(tmp_path, text).digest != one.digest
    (tmp_path / "model.json").write_text("no json")
    with pytest.raises(PlanError, match=r"is no JSON .* write it with model.to_json\(\)"):
        load(tmp_path, text)


def test_a_changed_copy_is_checked_like_any_plan(tmp_path):
    plan = load(tmp_path, GOOD)
    assert plan.with_(plan={"rounds": 9}).plan.rounds == 9
    with pytest.raises(PlanError, match="unknown key"):
        plan.with_(plan={"rnds": 9})
    with pytest.raises(PlanError, match="a plan holds text, numbers, true or false, lists and tables"):
        plan.with_(plan={"rounds": object()})


TASK: dict[str, Any] = {"v": PROTOCOL, "run": "r", "round": 1, "attempt": 1, "model": "a" * 64, "deadline": 1.5}


def test_a_message_travels():
    message = StartTraining.read(TASK)
    assert StartTraining.read(message.payload()) == message


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (TASK | {"v": 1}, f"'start_training' of protocol version 1: this side speaks {PROTOCOL}; upgrade the older one"),
        (TASK | {"model": "short"}, "no 'start_training' message: model"),
        (TASK | {"more": 1}, "no 'start_training' message: more"),
        (TASK | {"deadline": float("nan")}, "no 'start_training' message"),
        (TASK | {"run": "../r"}, "no 'start_training' message: run"),
        (None, "no 'start_training' message"),
        ([], "no 'start_training' message"),
        (b"\xff", "no 'start_training' message"),
    ],
)
def test_what_is_no_message_is_one_line(payload, said):
    with pytest.raises(WireError) as caught:
        StartTraining.read(payload)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_message_has_an_event_of_its_own():
    names = [kind.event for kind in Message.__subclasses__()]
    assert len(set(names)) == len(names)
    assert FlUpdate.event == "fl_update"
