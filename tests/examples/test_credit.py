"""The credit example as its README tells it: split, a server and four nodes as processes, and a model that XGBoost loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import xgboost
from sklearn.metrics import roc_auc_score
from tests.federation import run_processes

from atoll.plan import Plan
from atoll.preprocess import prepare
from atoll.simulate import simulate

EXAMPLE = Path(__file__).parents[2] / "examples" / "credit"
LENDERS = ("new-cars", "used-cars", "household", "other")


def test_the_example_runs_and_is_as_good_as_all_rows_in_one_table(data, tmp_path):
    words = [sys.executable, EXAMPLE / "split.py", data / "uci_german_credit", tmp_path / "rows"]
    subprocess.run(words, check=True, capture_output=True)
    books = {name: tmp_path / "rows" / f"{name}.csv" for name in LENDERS}
    holdout = tmp_path / "rows" / "holdout.csv"
    plan = Plan.load(EXAMPLE / "plan.toml")
    few = tmp_path / "plan.toml"
    few.write_text((EXAMPLE / "plan.toml").read_text().replace("rounds = 94", "rounds = 19"))
    history = run_processes(few, books, tmp_path, ["--holdout", holdout])
    assert history["last"] == simulate(plan.with_(plan={"rounds": 19}), books).digest
    export = [
        sys.executable,
        "-m",
        "atoll",
        "export",
        "--store",
        tmp_path / "store",
        "--which",
        "last",
        "--to",
        tmp_path / "m.json",
    ]
    subprocess.run(export, check=True, capture_output=True)
    assert xgboost.Booster(model_file=tmp_path / "m.json").num_boosted_rounds() == 5

    rows, held = [prepare(book, plan).train for book in books.values()], prepare(holdout, plan).train
    whole = simulate(plan, books)
    from atoll.learners import build

    found = roc_auc_score(held.y, build(plan).predict(whole.model, held.x))
    known = {"objective": "binary:logistic", "eta": 0.15, "max_depth": 3, "min_child_weight": 5, "base_score": 0.3, "nthread": 1}
    table = xgboost.DMatrix(np.concatenate([one.x for one in rows]), label=np.concatenate([one.y for one in rows]))
    central = roc_auc_score(held.y, xgboost.train(known, table, 30).predict(xgboost.DMatrix(held.x)))
    assert abs(found - central) < 0.01, (found, central)
    alone = [xgboost.train(known, xgboost.DMatrix(one.x, label=one.y), 30).predict(xgboost.DMatrix(held.x)) for one in rows]
    assert found > max(roc_auc_score(held.y, one) for one in alone), "better than each lender alone"


def test_without_the_data_it_says_where_they_come_from(tmp_path):
    done = subprocess.run([sys.executable, EXAMPLE / "split.py", tmp_path, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("german.data is not there; README.md says where it comes from")
