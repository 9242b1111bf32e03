"""From CSV files and arrays to rows: FLamby's recipe to the last number, and one line for each mistake."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.errors import DataError
from atoll.plan import Plan
from atoll.preprocess import prepare


def plan(inputs: int | None = None, **columns: Any) -> Plan:
    base = {"plan": {"name": "t", "rounds": 1}, "model": {"logistic": True}}
    return Plan.of({**base, "model": {"logistic": True, "inputs": inputs}, "data": columns})


TWO = {"features": ["a", "b"], "target": "y"}


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    return path


def test_flambys_recipe_on_the_raw_files_of_uci(data: Path):
    heart = data / "heart_disease_uci"
    names = "age sex cp trestbps chol fbs restecg thalach exang oldpeak slope ca thal num".split()
    recipe = plan(
        columns=names,
        features=["age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak", "cp", "restecg"],
        target="num",
        positive=[1, 2, 3, 4],
        categories={"cp": [1, 2, 3, 4], "restecg": [0, 1, 2]},
        missing=["?"],
    )
    with (heart / "fed_heart_flamby_13f.csv").open(newline="") as file:
        published = list(csv.DictReader(file))
    for hospital in ("cleveland", "hungarian", "switzerland", "va"):
        rows = [row for row in published if row["hospital"][:2] == hospital[:2]]
        expected = np.array([[float(value) for value in list(row.values())[4:]] for row in rows])
        found = prepare(heart / f"processed.{hospital}.data", recipe).train
        # The published table keeps rows that miss a value only in the three dropped columns; so does the recipe.
        np.testing.assert_array_equal(np.column_stack([found.x, found.y]), expected)


def test_columns_are_picked_in_the_plans_order_and_standardised_by_the_training_rows(tmp_path):
    path = table(tmp_path, "y,b,a,set\n1,10,1,train\n0,20,3,train\n1,70,5,test\n")
    found = prepare(path, plan(**TWO, split="set", standardise="node"))
    spread = np.std([1, 3], ddof=1)
    np.testing.assert_allclose(found.train.x[:, 0], [-1 / spread, 1 / spread], rtol=1e-6)
    np.testing.assert_allclose(found.test.x[:, 0], [3 / spread], rtol=1e-6)
    assert found.judge is found.test
    assert found.train.y.tolist() == [1, 0]


def test_a_constant_column_becomes_zero(tmp_path):
    found = prepare(table(tmp_path, "a,b,y\n1,5,0\n2,5,1\n"), plan(**TWO, standardise="node"))
    assert found.train.x[:, 1].tolist() == [0, 0]
    assert found.judge is found.train


@pytest.mark.parametrize(
    ("text", "columns", "said"),
    [
        ("a,b,z\n1,2,3\n", TWO, "has no column 'y'"),
        ("a,bb,y\n1,2,3\n", TWO, "has no column 'b'; did you mean 'bb'?"),
        ("a,b,y\n1,2\n", TWO, "line 2 has 2 columns instead of 3"),
        ("a,b,y\n1,2,0\n1,x,0\n", TWO, "line 3, column 'b': 'x' is no number; a word for a missing value belongs in"),
        ("a,b,y\n1,2,0\n", {**TWO, "categories": {"a": [3, 4]}}, "line 2, column 'a': '1' is not in categories.a = [3, 4]"),
        ("a,b,y\n?,2,0\n", {**TWO, "missing": ["?"]}, "no rows are left"),
        ("a,b,y\n", TWO, "no rows are left"),
        ("", TWO, "has no column 'a'"),
        ("a,b,y\n1,2,0\n", {**TWO, "standardise": "node"}, "at least two training rows"),
        ("a,b,y,s\n1,2,0,dev\n", {**TWO, "split": "s"}, "line 2, column 's': 'dev' is neither train nor test"),
        ("a,b,y,s\n1,2,0,test\n", {**TWO, "split": "s"}, "no training rows"),
        ("a,b,y\n1,2,0\n1,inf,0\n", TWO, "line 3, column 'b': inf is no finite number; fill it, or put that word into"),
        ("a,b,y\n1,2,0\n", {}, "the plan names no data.features"),
    ],
)
def test_each_mistake_is_one_line_with_the_place_and_the_mend(tmp_path, text, columns, said):
    with pytest.raises(DataError) as caught:
        prepare(table(tmp_path, text), plan(2, **columns))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match=r"can't be read \(No such file or directory\)"):
        prepare(tmp_path / "none.csv", plan(**TWO))
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(DataError, match="no CSV file of UTF-8 text"):
        prepare(tmp_path / "picture.csv", plan(**TWO))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ((np.zeros((3, 2)),), "1 arrays; give (x, y)"),
        ((np.zeros((3, 2)), np.zeros(2)), "give as many rows of numbers as targets"),
        ((np.zeros((3, 5)), np.zeros(3)), "rows of shape (5,), the plan's model takes 2 numbers"),
        ((np.array([["a", "b"]]), np.zeros(1)), "rows of numbers"),
        ((np.full((3, 2), np.nan), np.zeros(3)), "holds NaN or infinity"),
    ],
)
def test_arrays_that_do_not_fit(arrays, said):
    with pytest.raises(DataError) as caught:
        prepare(arrays, plan(2))
    assert said in str(caught.value)
