"""Curves of runs as pictures, a shell's completion, and the sign that something is going on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.cli.test_commands import atoll, one_line
from tests.federation import clients, plan, rows, run

from atoll.cli.plot import curves, plot
from atoll.cli.show import working
from atoll.learner import Rows
from atoll.store.sql import SqlStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one plan, the first with a holdout, and one of another plan."""
    place = tmp_path_factory.mktemp("runs")
    for name, holdout in (("tiny", Rows(*rows(9))), ("tiny", None), ("other", None)):
        run(plan(plan={"name": name, "rounds": 2}), clients(), place, holdout=holdout)
    return place / "store"


def complete(*words: str | Path) -> list[str]:
    env = {"_ATOLL_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(map(str, ["atoll", *words])), "COMP_CWORD": str(len(words))}
    code = "import sys; sys.argv = ['atoll']; from atoll.cli import main; main()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | env, check=False)
    assert not done.stderr, done.stderr
    return done.stdout.split()


def test_a_shell_completes_commands_options_and_runs(store):
    assert complete("se") == ["serve"]
    assert "--start" in complete("serve", "--st")
    runs = [row.run for row in SqlStore(store).runs()]
    for command in ("export", "prune"):
        assert complete(command, "--store", store, "2") == runs
    assert complete("history", "--store", store, runs[0]) == [runs[0]]
    assert complete("history", "--store", store / "none", "2") == []


def test_completion_is_shown_for_installing(monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # whatever runs the tests may be no shell
    done = atoll("--show-completion", "bash")
    assert "complete -o default -F" in done.stdout


def test_each_curve_has_a_label_that_tells_it_apart(store):
    base = SqlStore(store)
    newest, second, first = (base.history(row.run) for row in base.runs())
    assert list(curves([first])) == ["holdout", "nodes' own rows"]
    assert list(curves([second])) == ["nodes' own rows"]
    assert list(curves([first, newest])) == ["tiny, holdout", "tiny, nodes' own rows", "other, nodes' own rows"]
    assert list(curves([first, second]))[-1] == f"tiny {second['run']}, nodes' own rows"
    assert [at for at, _ in curves([first])["holdout"]] == [1, 2]


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_of_each_kind(store, tmp_path, ending, begins):
    base = SqlStore(store)
    picture = tmp_path / f"curves.{ending}"
    plot(curves([base.history(row.run) for row in base.runs()]), picture)
    assert picture.read_bytes().startswith(begins)
    if ending == "svg":
        assert "<!-- loss -->" in picture.read_text()
        assert "<!-- accuracy -->" in picture.read_text()


def test_several_runs_by_command(store, tmp_path):
    runs = [row.run for row in SqlStore(store).runs()]
    done = atoll("history", *runs, "--store", store, "--plot", tmp_path / "curves.svg")
    assert all(f"run {one} of plan" in done.stdout for one in runs)
    assert "plot: " in done.stdout
    said = one_line(atoll("history", "--store", store, "--plot", tmp_path / "curves.xyz"))
    assert "the ending says the kind of picture: use .png, .svg or .pdf" in said
    assert "can't be written" in one_line(atoll("history", "--store", store, "--plot", tmp_path / "none" / "curves.png"))


def test_a_spinner_is_for_people_only(monkeypatch, capfd):
    with working("drawing"):
        pass
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal
    monkeypatch.setenv("TERM", "xterm")
    with working("drawing"):
        time.monotonic()
    out, err = capfd.readouterr()
    assert "drawing …" in err
    assert out == ""
    with working("drawing", quiet=True):
        pass
    assert capfd.readouterr() == ("", "")


def test_a_start_that_does_not_fit_is_one_line(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(plan().to_json())
    (tmp_path / "start.safetensors").write_bytes(b"none")
    said = one_line(atoll("serve", path, "--port", "0", "--store", tmp_path / "store", "--start", tmp_path / "start.safetensors"))
    assert "start.safetensors: no model of this plan" in said


def test_many_curves_are_explained_beside_the_panels(tmp_path):
    def wide(count: int) -> int:
        picture = tmp_path / f"{count}.png"
        plot({f"run {k}": [(1, {"loss": 1.0 + k}), (2, {"loss": 0.5 + k})] for k in range(count)}, picture)
        return int.from_bytes(picture.read_bytes()[16:20], "big")

    assert wide(3) == 690
    assert wide(12) == 990
