"""Every kind of source gives the rows that a CSV file of the same table gives, and one line for each mistake."""

from __future__ import annotations

import contextlib
import re
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from atoll import preprocess
from atoll.errors import DataError
from atoll.learner import Data, Rows
from atoll.plan import Plan
from atoll.preprocess import Query, batch, prepare

COLUMNS: dict[str, Any] = {
    "features": ["age", "kind", "alive"],
    "target": "y",
    "categories": {"kind": ["a", "b", "c"]},
    "missing": ["", "-9"],
    "split": "side",
    "positive": [2, 3],
    "standardise": "node",
}
ROWS = [(k / 3, "abc"[k % 3], k % 2, k % 4, "test" if k % 5 == 0 else "train") for k in range(40)]
ROWS[7] = (-9, "a", 1, 2, "train")
ROWS[8] = (None, "a", 1, 2, "train")  # type: ignore[assignment]
NAMES = ("age", "kind", "alive", "y", "side")


def plan(inputs: int | None = None, **columns: Any) -> Plan:
    return Plan.of({"plan": {"name": "t", "rounds": 1}, "model": {"logistic": True, "inputs": inputs}, "data": columns})


def two(**more: Any) -> Plan:
    return plan(features=["a", "b"], target="y", **more)


def arrow(**changed: Any) -> pa.Table:
    columns = {name: [row[k] for row in ROWS] for k, name in enumerate(NAMES)}
    return pa.table({**columns, **changed})


def as_csv(place: Path) -> Path:
    path = place / "rows.csv"
    path.write_text("\n".join(",".join("" if v is None else str(v) for v in row) for row in [NAMES, *ROWS]))
    return path


def as_csvs(place: Path) -> Path:
    whole, folder = as_csv(place).read_text().splitlines(), place / "csvs"
    folder.mkdir()
    (folder / "1.csv").write_text("\n".join(whole[:20]))
    (folder / "2.csv").write_text("\n".join([whole[0], *whole[20:]]))
    return folder


def as_parquet(place: Path) -> Path:
    pq.write_table(arrow(ignored=[[k] for k in range(40)]), place / "rows.parquet", row_group_size=7)
    return place / "rows.parquet"


def as_parquets(place: Path) -> Path:
    folder = place / "parquets"
    (folder / "deeper").mkdir(parents=True)
    table = arrow(kind=pa.array([row[1] for row in ROWS]).dictionary_encode(), alive=[bool(row[2]) for row in ROWS])
    pq.write_table(table.slice(0, 19), folder / "1.parquet")
    pq.write_table(table.slice(19), folder / "deeper" / "2.parquet")
    return folder


def as_sqlite(place: Path) -> Query:
    with sqlite3.connect(place / "rows.db") as base:
        base.execute("CREATE TABLE t (age, kind, alive, y, side)")
        base.executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?)", ROWS)
    base.close()
    return Query(f"sqlite:///{place / 'rows.db'}", QUERY)


QUERY = "-- what this node gives\nSELECT y, side, age, alive, kind, 'more' AS more FROM t ORDER BY rowid;"
KINDS: dict[str, Callable[[Path], Any]] = {
    "a folder of CSV files": as_csvs,
    "Parquet": as_parquet,
    "a folder of Parquet files": as_parquets,
    "a database": as_sqlite,
}


def same(one: Data, other: Data) -> None:
    for ours, theirs in zip((*one.train, *one.test), (*other.train, *other.test), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("step", [8192, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_bits_of_the_csv_file(tmp_path, monkeypatch, kind, step):
    monkeypatch.setattr(batch, "_VALUES", step * 5)
    source = KINDS[kind](tmp_path)
    seen: list[tuple[str, int, int | None]] = []
    found = prepare(source, plan(**COLUMNS), progress=lambda *at: seen.append(at))
    assert len(found.train) == 30
    assert len(found.test) == 8
    same(found, prepare(as_csv(tmp_path), plan(**COLUMNS)))
    assert seen[0][:2] == ("reading", 0)
    assert seen[-1][:2] == ("reading", 40)
    assert (len(seen) > 5) == (step == 6)


def test_numpy_archives_hold_the_arrays_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "_VALUES", 7)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (20, 3), np.uint8), rng.integers(0, 2, 20)
    side = np.where(np.arange(20) < 15, "train", "test")
    np.savez_compressed(tmp_path / "four.npz", x=x[:15], y=y[:15], x_test=x[15:], y_test=y[15:])
    np.savez(tmp_path / "split.npz", x=x, y=y, split=side)
    np.savez(tmp_path / "two.npz", x=x, y=y)
    expected = prepare((x[:15], y[:15], x[15:], y[15:]), plan(3))
    assert expected.train.x.dtype == np.uint8
    same(prepare(tmp_path / "four.npz", plan(3)), expected)
    same(prepare(tmp_path / "split.npz", plan(3)), expected)
    same(prepare(tmp_path / "two.npz", plan(3)), prepare((x, y), plan(3)))
    named = plan(features=["a", "b", "c"], target="y", standardise="node")
    same(prepare(tmp_path / "four.npz", named), prepare((x[:15], y[:15], x[15:], y[15:]), named))


def test_data_is_taken_as_it_is_and_rows_are_arrays():
    data = Data(Rows(np.ones((3, 2)), np.zeros(3)), Rows(np.ones((0, 2)), np.zeros(0)))
    assert prepare(data, two(standardise="node")) is data
    assert prepare(data.train, two(standardise="node")).train.x.tolist() == [[0, 0]] * 3


def archive(**arrays: Any) -> Callable[[Path], Path]:
    def write(place: Path) -> Path:
        np.savez(place / "a.npz", **arrays)
        return place / "a.npz"

    return write


def parquet(**columns: Any) -> Callable[[Path], Path]:
    def write(place: Path) -> Path:
        pq.write_table(pa.table(columns), place / "a.parquet")
        return place / "a.parquet"

    return write


def two_schemas(place: Path) -> Path:
    pq.write_table(pa.table({"a": [1], "b": [2.0], "y": [0]}), place / "1.parquet")
    pq.write_table(pa.table({"a": [1], "b": ["2"], "y": [0]}), place / "2.parquet")
    return place


def both_kinds(place: Path) -> Path:
    (place / "1.csv").write_text("a,b,y\n1,2,0\n")
    return two_schemas(place)


def cut(size: int) -> Callable[[Path], Path]:
    def write(place: Path) -> Path:
        path = parquet(a=np.arange(9000.0), b=np.random.default_rng(0).normal(size=9000), y=np.zeros(9000))(place)
        content = bytearray(path.read_bytes())
        if size > 0:
            content[2000 : 2000 + size] = bytes(size)  # its end, and so its schema, stays whole
        path.write_bytes(content if size > 0 else content[:size])
        return path

    return write


def short_archive(place: Path) -> Path:
    path = archive(x=np.zeros((9000, 2)), y=np.zeros(9000))(place)
    content = bytearray(path.read_bytes())
    content[90_000:90_010] = b"\1" * 10
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (two_schemas, "2.parquet: column 'b' is string, but in {place}/1.parquet it is double: all files of a folder need"),
        (both_kinds, "holds both .parquet and .csv files: keep one kind"),
        (lambda place: place, "{place}: this folder holds neither .parquet nor .csv files"),
        (parquet(a=[1], bb=[2], y=[0]), "a.parquet: has no column 'b'; did you mean 'bb'?"),
        (parquet(a=[1], b=[[2]], y=[0]), "a.parquet: column 'b' is list<element: int64>: a feature or target is a number"),
        (parquet(a=[1], b=["x"], y=[0]), "a.parquet: row 1, column 'b': 'x' is no number"),
        (parquet(a=[1, 2], b=[3, 4], y=[0, float("nan")]), "row 2, column 'y': nan is no finite number"),
        (parquet(a=[1, 2], b=[None, None], y=[0, 1]), "no rows are left: all 2 have a missing value ('') in a used column"),
        (cut(-40), "a.parquet: no whole Parquet file ("),
        (cut(4000), "a.parquet: no whole Parquet file ("),
        (archive(x=np.array([[1, "a"]], object), y=np.zeros(1)), "'x' holds Python objects, which are never loaded"),
        (archive(z=np.zeros(1)), "a.npz: has arrays z; it holds arrays x and y"),
        (archive(x=np.zeros((2, 2)), y=np.zeros(3)), "x of shape (2, 2) (float64) and y of shape (3,) (float64): give as many"),
        (archive(x=np.zeros((2, 3)), y=np.zeros(2)), "rows of shape (3,), the plan's model takes 2 numbers"),
        (archive(x=np.zeros((2, 2)), y=np.array(["a", "b"])), "give as many rows of numbers as targets"),
        (archive(x=np.zeros((2, 2)), y=np.zeros(2), split=np.array(["train", "dev"])), "something else than 'train' and 'test'"),
        (archive(x=np.zeros((2, 2)), y=np.zeros(2), split=np.array(["train"])), "split has shape (1,)"),
        (archive(x=np.zeros((2, 2), order="F"), y=np.zeros(2)), "'x' is not laid out row by row"),
        (short_archive, "a.npz: can't be read to its end"),
        (lambda place: parquet(a=[1], b=[1], y=[1])(place).rename(place / "a.npz"), "a.npz: no NumPy archive"),
    ],
)
def test_each_mistake_in_a_file_is_one_line(tmp_path, write, said):
    with pytest.raises(DataError) as caught:
        prepare(write(tmp_path), two())
    assert said.format(place=tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_empty_but_not_missing_is_said(tmp_path):
    path = parquet(a=[1, None], b=[3, 4], y=[0, 1])(tmp_path)
    with pytest.raises(DataError, match="row 2, column 'a': '' is no number"):
        prepare(path, two(missing=["?"]))
    with pytest.raises(DataError, match=r"row 2, column 'a': '--' is not in categories.a|row 2, column 'a': '' is not in"):
        prepare(path, two(missing=["?"], categories={"a": [0, 1]}))


def test_words_for_missing_values_are_numbers_where_the_column_is(tmp_path):
    path = parquet(a=[1.0, -9.0, float("nan")], b=[3, 4, 5], y=[0, 1, 1])(tmp_path)
    assert len(prepare(path, two(missing=["-9", "nan"])).train) == 1


def test_an_extra_that_is_not_installed_is_named(tmp_path, monkeypatch):
    def missing(name: str) -> None:
        raise ModuleNotFoundError("no", name="pyarrow")

    monkeypatch.setattr(preprocess, "import_module", missing)
    with pytest.raises(DataError, match=r'pyarrow is not installed; pip install "atoll-fl\[parquet\]"'):
        prepare(parquet(a=[1], b=[1], y=[0])(tmp_path), two())


def test_neither_pyarrow_nor_pillow_is_loaded_without_need():
    code = "import sys, atoll.node.runtime; print([m for m in ('pyarrow', 'PIL', 'keras', 'sklearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# Databases.


@pytest.mark.parametrize(
    ("address", "query", "said"),
    [
        ("{base}", "", '--query: is missing: say what to read from the database, --query "SELECT …"'),
        ("{base}", "DROP TABLE t", "--query: starts with 'DROP': only a SELECT reads"),
        ("{base}", "/* SELECT */ UPDATE t SET y = 1", "--query: starts with 'UPDATE'"),
        ("{base}", "SELECT 1; DELETE FROM t", "--query: is more than one statement"),
        ("{base}", "WITH a AS (SELECT 1) DELETE FROM t", "attempt to write a readonly database"),
        ("{base}", "SELECT * FROM absent", "no such table: absent"),
        ("{base}", "SELECT age AS a, kind AS b, 0 AS y FROM t", "row 1, column 'b': 'a' is no number"),
        ("{base}", "SELECT age AS a, 0 AS y FROM t", "the query's answer: has no column 'b'"),
        ("{base}", "SELECT 1 AS a, 2 AS b, 0 AS y FROM t WHERE 0", "no rows are left: there are none in it"),
        ("sqlite:///nowhere/a.db", "SELECT 1", "there is no file nowhere/a.db"),
        ("postgres://u:secret@h/b", "SELECT 1", "'postgres' is not known here; write postgresql+psycopg://"),
        ("mysql+pymysql://u:secret@h/b", "SELECT 1", "its driver pymysql is not installed; pip install 'pymysql'"),
        ("postgresql+psycopg2://u:secret@h/b", "SELECT 1", "pip install 'psycopg2-binary'"),
        ("postgresql+psycopg://u:secret@h:port/b", "SELECT 1", "--data: no address of a database"),
    ],
)
def test_each_mistake_with_a_database_is_one_line(tmp_path, address, query, said):
    with pytest.raises(DataError) as caught:
        prepare(Query(address.format(base=as_sqlite(tmp_path).address), query), two())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    with sqlite3.connect(tmp_path / "rows.db") as base:
        assert base.execute("SELECT count(*) FROM t").fetchone() == (40,)
    base.close()


def test_a_query_belongs_to_a_database(tmp_path):
    with pytest.raises(DataError, match="--query: is for a database"):
        prepare(Query(str(as_csv(tmp_path)), "SELECT 1"), plan(**COLUMNS))


@contextlib.contextmanager
def dropping(times: int) -> Iterator[None]:
    """Close the connection, so many times, under a query that has just begun to answer."""
    left = [times]

    def drop(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if "SELECT" in statement and left[0]:
            left[0] -= 1
            connection.connection.driver_connection.close()

    event.listen(Engine, "after_cursor_execute", drop)
    try:
        yield
    finally:
        event.remove(Engine, "after_cursor_execute", drop)


@pytest.mark.parametrize("times", [3, 5])
def test_a_connection_that_drops_is_opened_again_a_few_times(tmp_path, times):
    paused: list[tuple[float, str]] = []
    address = as_sqlite(tmp_path)
    with dropping(times), pytest.raises(DataError) if times == 5 else contextlib.nullcontext() as caught:
        found = prepare(address, plan(**COLUMNS), pause=lambda *one: paused.append(one))
    assert [seconds for seconds, _ in paused] == [0.5, 1.0, 2.0, 4.0][:times]
    assert all(why.endswith("trying again") for _, why in paused)
    if caught:
        assert re.search(r"broke off at row 1 \(.*closed database.*\); it was tried 5 times", str(caught.value))
    else:
        same(found, prepare(as_csv(tmp_path), plan(**COLUMNS)))


def test_a_database_that_hangs_up_never_gives_away_the_password():
    calls: list[int] = []

    def hang_up(server: socket.socket) -> None:
        for call in range(5):
            client, _ = server.accept()
            calls.append(call)
            client.recv(64)
            client.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=hang_up, args=(server,), daemon=True)
        thread.start()
        why: list[str] = []
        address = (
            f"postgresql+psycopg://doctor:s%40cret@127.0.0.1:{server.getsockname()[1]}/ward?sslmode=disable&gssencmode=disable"
        )
        with pytest.raises(DataError) as caught:
            prepare(Query(address, "SELECT 1"), two(), pause=lambda _, said: why.append(said))
        thread.join(10)
    assert len(calls) == 5
    for said in (str(caught.value), *why):
        assert "postgresql+psycopg://doctor:***@127.0.0.1" in said
        assert "cret" not in said
        assert "\n" not in said
