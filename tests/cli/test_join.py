"""`atoll join` with each kind of data: the commands that the how-to shows, and mistakes as a person sees them."""

from __future__ import annotations

import re
import shlex
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.cli.test_commands import atoll, one_line
from tests.federation import atoll as process
from tests.federation import events, plan

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
    return place


@pytest.fixture(scope="module")
def url(place: Path) -> Iterator[str]:
    """A server that waits for nodes."""
    agreed = plan(
        cohort={"deadline": 600},
        plan={"name": "ward"},
        model={"inputs": None},
        data={"features": ["age", "dose"], "target": "ill", "standardise": "node"},
    )
    (place / "plan.json").write_text(agreed.to_json())
    words = ["serve", place / "plan.json", "--port", "0", "--store", place / "store", "--json"]
    with process(*words, log=place / "log") as server:
        yield next(event["url"] for event in events(server) if event["what"] == "listening")


SHOWN = re.findall(r"`(atoll join http[^`]*--data[^`]*)`", PAGE.read_text())
assert len(SHOWN) >= 7
RUN = [command for command in SHOWN if "postgresql" not in command]


@pytest.mark.parametrize("command", RUN)
def test_the_commands_of_the_how_to(place, url, command):
    words = [url if word.startswith("http") else word for word in shlex.split(command)[1:]]
    done = atoll(*words, "--check", cwd=place)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    left_out = 0 if "npz" in command else 2
    expected = re.findall(r"^    (plan ward.*?without --check this node takes part)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert done.stdout.strip() == expected[0].replace("\n    ", "\n").replace("2 left out", f"{left_out} left out")


def test_checking_sends_nothing(place, url):
    found = atoll("join", url, "--data", "data/rows.csv", "--check", "--json", "--dir", "quiet", cwd=place)
    assert '"what": "checked", "train": 38, "test": 0, "shape": [2]' in found.stdout.splitlines()[-1]
    assert "0 of at least 3 nodes are here" in atoll("status", url).stdout
    assert not list((place / "quiet" / "outbox").iterdir())


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
