"""`atoll join` with each kind of data: the commands that the how-to shows, and mistakes as a person sees them."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import sqlite3
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.cli.test_commands import atoll, one_line
from tests.federation import atoll as process
from tests.federation import events, plan

from atoll.plan import Plan

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "node-data.md"
TABLE = {"age": [30 + k for k in range(40)], "dose": [k % 7 for k in range(40)], "ill": [k % 2 for k in range(40)]}
TABLE["dose"][3] = TABLE["dose"][8] = None  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data of the how-to."""
    place = tmp_path_factory.mktemp("ward")
    for folder in ("csv", "parquet"):
        (place / "data" / folder).mkdir(parents=True)
    data = place / "data"
    lines = [",".join("" if value is None else str(value) for value in row) for row in zip(*TABLE.values(), strict=True)]
    for path, some in ((data / "rows.csv", lines), (data / "csv" / "1.csv", lines[:20]), (data / "csv" / "2.csv", lines[20:])):
        path.write_text("\n".join([",".join(TABLE), *some]))
    for path in (data / "rows.parquet", data / "parquet" / "1.parquet"):
        pq.write_table(pa.table(TABLE), path)
    kept = [row for row in zip(*TABLE.values(), strict=True) if row[1] is not None]
    np.savez(data / "rows.npz", x=np.array(kept)[:, :2], y=np.array(kept)[:, 2])
    with sqlite3.connect(data / "rows.db") as base:
        base.execute("CREATE TABLE patients (age, dose, ill)")
        base.executemany("INSERT INTO patients VALUES (?, ?, ?)", list(zip(*TABLE.values(), strict=True)))
    base.close()
    for k in range(6):
        path = data / "pictures" / ("cat", "dog")[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (30, 30), 40 * k).save(path)
    (place / "ward.py").write_text(WARD)
    return place


WARD = """
def rows():
    yield {"age": [30, 31, 32], "dose": [1, 2, None], "ill": [0, 1, 1]}
    yield {"age": [40], "dose": [5], "ill": [0]}


def endless():
    while True:
        yield {"age": range(5000), "dose": range(5000), "ill": [0, 1] * 2500}
"""


@contextlib.contextmanager
def serving(agreed: Plan, place: Path) -> Iterator[str]:
    """A server that waits for nodes."""
    (place / "plan.json").write_text(agreed.to_json())
    with process("serve", place / "plan.json", "--port", "0", "--store", place / "store", "--json", log=place / "log") as server:
        yield next(event["url"] for event in events(server) if event["what"] == "listening")


@pytest.fixture(scope="module")
def url(place: Path) -> Iterator[str]:
    agreed = plan(
        cohort={"deadline": 600},
        plan={"name": "ward"},
        model={"inputs": None},
        data={"features": ["age", "dose"], "target": "ill", "standardise": "node"},
    )
    with serving(agreed, place) as url:
        yield url


SHOWN = re.findall(r"`(atoll join http[^`]*--data[^`]*)`", PAGE.read_text())
assert len(SHOWN) == 9
RUN = [command for command in SHOWN if not re.search("postgresql|pictures|python:", command)]


@pytest.mark.parametrize("command", RUN)
def test_the_commands_of_the_how_to(place, url, command):
    words = [url if word.startswith("http") else word for word in shlex.split(command)[1:]]
    done = atoll(*words, "--check", cwd=place)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    left_out = 0 if "npz" in command else 2
    expected = re.findall(r"^    (plan ward.*?without --check this node takes part)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert done.stdout.strip() == expected[0].replace("\n    ", "\n").replace("2 left out", f"{left_out} left out")


def said_of(shown: str, url: str, place: Path) -> str:
    (command,) = [command for command in SHOWN if shown in command]
    words = [url if word.startswith("http") else word for word in shlex.split(command)[1:]]
    done = atoll(*words, "--check", cwd=place, PYTHONPATH=str(place))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pictures_and_functions_of_the_how_to(place, url, tmp_path):
    said = said_of("python:", url, place)
    assert "rows: 3 to train on, 0 to judge by, 1 left out" in said
    assert "target: 0 in 2 rows, 1 in 1 rows" in said
    (shown,) = re.findall(r"    \[data\]\n    image = .*\n    classes = .*\n", PAGE.read_text())
    agreed = plan(cohort={"deadline": 600}, model={"inputs": 784}, data=tomllib.loads(textwrap.dedent(shown))["data"])
    with serving(agreed, tmp_path) as other:
        assert "rows: 6 to train on, 0 to judge by, 0 left out\neach: 784 numbers" in said_of("pictures", other, place)


def test_stopping_a_node_that_reads_leaves_nothing(place, url, tmp_path):
    words = ["join", url, "--data", "python:ward:endless", "--dir", tmp_path / "node", "--json"]
    os.environ["PYTHONPATH"] = str(place)
    try:
        with process(*words, log=tmp_path / "log") as node:
            seen = events(node)
            assert next(seen)["what"] == "reading"
            while not list((tmp_path / "node").glob("spool-*")):
                next(seen)
            node.send_signal(signal.SIGINT)
            assert node.wait(10) == 3
    finally:
        del os.environ["PYTHONPATH"]
    assert (tmp_path / "log").read_text().startswith("atoll: stopped by its owner")
    assert not list((tmp_path / "node").glob("spool*"))


def test_checking_sends_nothing(place, url):
    found = atoll("join", url, "--data", "data/rows.csv", "--check", "--json", "--dir", "quiet", cwd=place)
    assert '"what": "checked", "train": 38, "test": 0, "shape": [2]' in found.stdout.splitlines()[-1]
    assert "0 of at least 3 nodes are here" in atoll("status", url).stdout
    assert not list((place / "quiet" / "outbox").iterdir())


def test_an_address_that_is_none_is_said_at_once(place):
    line = one_line(atoll("join", "somewhere", "--data", "data/rows.csv", cwd=place))
    assert "'somewhere' is no address of a server; write it as http://host:port" in line


def test_mistakes_as_a_person_sees_them(place, url):
    cases = {
        ("--data", "data"): "data: this folder holds both .parquet and .csv files",
        ("--data", "postgresql+psycopg2://u:secret@h/b", "--query", "SELECT 1"): "pip install 'psycopg2-binary'",
        ("--data", "sqlite:///data/rows.db", "--query", "DELETE FROM patients"): "only a SELECT",
    }
    for words, said in cases.items():
        line = one_line(atoll("join", url, *words, cwd=place))
        assert said in line
        assert "secret" not in line
