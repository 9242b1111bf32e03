"""The two examples of text as their READMEs tell them: split, then simulated, on what they bring along."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.federation import run_processes

from atoll.learners.networks import lstm
from atoll.plan import Plan

EXAMPLES = Path(__file__).parents[2] / "examples"


def done(*words: str | Path) -> str:
    ran = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def simulated(plan: Path, rows: Path, *more: str) -> list[dict]:
    out = done("-m", "atoll", "simulate", plan, "--data", rows, "--holdout", rows / "holdout.csv", "--json", *more)
    return [row["holdout"] for row in json.loads(out.splitlines()[-1])["rounds"]]


def test_two_shops_learn_what_is_kind(tmp_path):
    done(EXAMPLES / "sentiment/split.py", EXAMPLES / "sentiment/sample", tmp_path)
    found = simulated(EXAMPLES / "sentiment/plan.toml", tmp_path)
    assert len(found) == 20
    assert found[-1]["accuracy"] > 0.8


def test_the_shops_nodes_do_it_as_processes(tmp_path):
    rows = tmp_path / "rows"
    done(EXAMPLES / "sentiment/split.py", EXAMPLES / "sentiment/sample", rows)
    shops = {name: rows / f"{name}.csv" for name in ("kettles", "rooms")}
    history = run_processes(EXAMPLES / "sentiment/plan.toml", shops, tmp_path, ["--holdout", rows / "holdout.csv"])
    assert len(history["rounds"]) == 20
    assert history["rounds"][-1]["holdout"]["accuracy"] == simulated(EXAMPLES / "sentiment/plan.toml", rows)[-1]["accuracy"]


def test_three_speakers_foretell(tmp_path):
    done(EXAMPLES / "typing/split.py", EXAMPLES / "typing/sample/play.txt", tmp_path, "--speakers", "3")
    assert {path.stem for path in tmp_path.iterdir()} == {"ferryman", "merchant", "child", "holdout"}
    found = simulated(EXAMPLES / "typing/plan.toml", tmp_path, "--allow", "atoll.learners.networks:lstm", "--strategy", "scan")
    assert found[-1]["loss"] < found[0]["loss"] - 0.2


def test_the_models_symbols_are_those_of_the_plans_alphabet():
    plan = Plan.load(EXAMPLES / "typing/plan.toml")
    import jax

    symbols = jax.eval_shape(lstm().init, jax.random.key(0))["embedding"].shape[0]
    assert symbols == len(plan.data.alphabet) + 2, "the end, and any other character"


@pytest.mark.parametrize(
    ("example", "said"), [("sentiment", "holds no file NAME_labelled.txt"), ("typing", "holds no line NAME:")]
)
def test_without_data_they_say_so(tmp_path, example, said):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "play.txt").write_text("nobody speaks\n")
    words = [empty] if example == "sentiment" else [tmp_path / "play.txt"]
    ran = subprocess.run(
        [sys.executable, EXAMPLES / example / "split.py", *words, tmp_path / "rows"], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, said in ran.stderr) == (1, True), ran.stderr
