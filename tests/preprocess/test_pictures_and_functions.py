"""Pictures in folders and functions of the owner's: what they give, and one line for each mistake."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.preprocess.test_sources import COLUMNS, NAMES, ROWS, as_csv, as_sqlite, plan, same, two

from atoll import preprocess
from atoll.errors import DataError, PlanError
from atoll.learner import Data, Rows
from atoll.preprocess import batch, prepare

SHAPE = {"image": [4, 6, 1], "classes": ["cat", "dog"]}


def picture(path: Path, shade: int, size: tuple[int, int] = (6, 4), mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade).save(path)
    return path


def pets(place: Path) -> Path:
    for k in range(5):
        picture(place / "dog" / f"{k}.png", 51 * k)
        picture(place / "cat" / f"{k}.jpg", 255)
    picture(place / "cat" / "large.png", 102, (60, 40))
    picture(place / "cat" / "colour.png", (255, 255, 255), mode="RGB")  # type: ignore[arg-type]
    (place / "cat" / ".DS_Store").write_text("no picture")
    return place


@pytest.mark.parametrize("step", [1, 1000])
def test_pictures_are_numbers_from_0_to_1_labelled_in_the_plans_order(tmp_path, monkeypatch, step):
    monkeypatch.setattr(batch, "_VALUES", 24 * step)
    found = prepare(pets(tmp_path), plan(**SHAPE)).train
    assert found.x.shape == (12, 4, 6, 1)
    assert found.x.dtype == np.float32
    assert found.y.tolist() == [0] * 7 + [1] * 5
    np.testing.assert_allclose(found.x[:, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0.4, 0, 0.2, 0.4, 0.6, 0.8], atol=1e-6)
    turned = prepare(tmp_path, plan(24, **SHAPE)).train
    assert turned.x.shape == (12, 24)
    assert prepare(tmp_path, plan(image=[2, 2, 3], classes=["dog", "cat"])).train.x.shape == (12, 2, 2, 3)


def test_pictures_on_disk_and_pictures_that_only_judge(tmp_path, monkeypatch):
    for side in ("train", "test"):
        pets(tmp_path / "pets" / side)
    held = prepare(tmp_path / "pets", plan(**SHAPE))
    monkeypatch.setattr(preprocess.gather, "MEMORY", 100)
    same(prepare(tmp_path / "pets", plan(**SHAPE), spool=tmp_path / "spool"),
         Data(held.train, held.test))  # fmt: skip
    assert (len(held.train), len(held.test)) == (12, 12)


@pytest.mark.parametrize(
    ("spoil", "columns", "said"),
    [
        (lambda place: (place / "cat" / "torn.png").write_bytes(b"\x89PNG\r\n"), {}, "cat/torn.png: can't be decoded as"),
        (lambda place: os.truncate(place / "dog" / "0.png", 45), {}, "dog/0.png: can't be decoded as a picture"),
        (lambda place: picture(place / "dgo" / "1.png", 1), {}, "'dgo' is not in the plan's data.classes = ['cat', 'dog']; did"),
        (lambda place: picture(place / "cat" / "deep.png", 1, mode="I;16"), {}, "deep.png: has more than 8 bits a channel"),
        (lambda place: None, {"classes": ["cow", "hen"]}, "'cat' is not in the plan's data.classes = ['cow', 'hen']"),
        (lambda place: (place / "dog.txt").write_text(""), {}, "'dog.txt' is not in the plan's data.classes"),
    ],
)
def test_each_mistake_with_pictures_is_one_line(tmp_path, spoil, columns, said):
    spoil(pets(tmp_path))
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, plan(**{**SHAPE, **columns}))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_pictures_no_pillow_and_a_plan_that_asks_for_half(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no pictures in it; they belong in a folder for each of \['cat', 'dog'\]"):
        prepare(tmp_path, plan(**SHAPE))
    with pytest.raises(DataError, match="a picture has 4 × 6 × 1 numbers, the plan's model takes 7"):
        prepare(tmp_path, plan(7, **SHAPE))
    for columns in ({"image": [4, 6, 1]}, {**SHAPE, "features": ["a"], "target": "y"}):
        with pytest.raises(PlanError, match="image and classes go together, and without features"):
            plan(**columns)

    def missing(name: str) -> None:
        raise ModuleNotFoundError("no", name="PIL")

    monkeypatch.setattr(preprocess, "import_module", missing)
    with pytest.raises(DataError, match=r'PIL is not installed; pip install "atoll-fl\[images\]"'):
        prepare(tmp_path, plan(**SHAPE))


# Functions.

X, Y = np.arange(12.0).reshape(6, 2), np.array([0.0, 1, 0, 1, 0, 1])


def yields_arrays() -> Any:
    yield X[:2], Y[:2]
    yield X[2:], Y[2:]


def yields_sides() -> Any:
    yield X, Y, [False, False, True, False, False, True]


def yields_columns() -> Any:
    for lo in range(0, 40, 7):
        part = list(zip(*ROWS[lo : lo + 7], strict=True))
        yield dict(zip(NAMES, part, strict=True))


@pytest.mark.parametrize("give", [lambda: (X, Y), lambda: Rows(X, Y), yields_arrays, lambda: [(X, Y)]])
def test_a_function_gives_arrays_or_yields_them(give):
    same(prepare(give, two()), prepare((X, Y), two()))


def test_a_function_gives_data_a_path_a_query_columns_or_sides(tmp_path):
    data = prepare((X, Y), two())
    assert prepare(lambda: data, two()) is data
    expected = prepare(as_csv(tmp_path), plan(**COLUMNS))
    query = as_sqlite(tmp_path)
    for give in (lambda: as_csv(tmp_path), lambda: query, yields_columns):
        same(prepare(give, plan(**COLUMNS)), expected)
    assert prepare(lambda: {"a": [1, 2], "b": [3, 4], "y": [0, 1]}, two()).train.x.tolist() == [[1, 3], [2, 4]]
    assert prepare(yields_sides, two()).test.x.tolist() == [[4, 5], [10, 11]]


def test_a_function_is_named_on_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "ward_rows.py").write_text("def rows():\n    return [[1.0, 2], [3, 4]], [0, 1]\n\n\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert prepare("python:ward_rows:rows", two()).train.x.tolist() == [[1, 2], [3, 4]]
    for name, said in {
        "python:ward_rows:row": "has no attribute 'row'); write python:package.module:function, and put its folder on PYTHONPATH",
        "python:nowhere:rows": "No module named 'nowhere'",
        "python:ward_rows:number": "is int, no function; it returns",
        "python:": "can't be imported",
    }.items():
        with pytest.raises(DataError) as caught:
            prepare(name, two())
        assert said in str(caught.value)
    del sys.modules["ward_rows"]


def fails() -> Any:
    raise KeyError("bed")


def fails_later() -> Any:
    yield X, Y
    raise ValueError("two\nlines")


@pytest.mark.parametrize(
    ("give", "said"),
    [
        (fails, "fails: raised KeyError: 'bed' (test_pictures_and_functions.py, line "),
        (fails_later, "fails_later: raised ValueError: two lines (test_"),
        (lambda: 3, "gave int; it returns arrays (x, y)"),
        (lambda: None, "gave NoneType; it returns"),
        (lambda: iter([X]), "batch 1: is ndarray; it returns"),
        (lambda: iter([None]), "batch 1: is NoneType; it returns"),
        (lambda: iter([(X, Y), (X, Y[:3])]), "batch 2: x of shape (6, 2) (float64) and y of shape (3,)"),
        (lambda: iter([(X, Y, [True])]), "batch 1: test has shape (1,)"),
        (lambda: {"a": [1], "y": [1]}, "batch 1: has no column 'b'"),
        (lambda: {"a": [1], "b": [1, 2], "y": [1]}, "batch 1: column 'b' has 2 values, column 'a' 1"),
        (lambda: {"a": [1], "b": ["x"], "y": [1]}, "batch 1, row 1, column 'b': 'x' is no number"),
        (lambda: "nowhere.csv", "nowhere.csv: can't be read"),
        (lambda: iter([]), "no rows are left: there are none in it"),
    ],
)
def test_each_mistake_of_a_function_is_one_line(give: Callable[[], Any], said):
    with pytest.raises(DataError) as caught:
        prepare(give, two())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
