"""FATE's horizontal breast-cancer files: by FATE's own rule a federated model is right within 1 % of the joined table's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xgboost
from sklearn.metrics import roc_auc_score
from tests.federation import say

from atoll.learners import build
from atoll.plan import Plan
from atoll.preprocess import prepare
from atoll.simulate import simulate

TREES, DEPTH, BINNED = 20, 3, 4
PLAN = Plan.of(
    {
        "plan": {"name": "breast", "rounds": BINNED + TREES * DEPTH},
        "model": {"trees": "binary:logistic", "options": {"max_depth": DEPTH}},
        "data": {"features": [f"x{k}" for k in range(30)], "target": "y"},
        "training": {"learning_rate": 0.3},
        "aggregation": {"rule": "histograms"},
        "cohort": {"minimum": 2},
    }
)


def test_trees_from_sums_are_as_good_as_those_of_the_joined_table(data):
    files = {name: data / "fate_breast" / f"breast_homo_{name}.csv" for name in ("guest", "host")}
    test = prepare(Path(data / "fate_breast" / "breast_homo_test.csv"), PLAN).train
    parts = [prepare(file, PLAN).train for file in files.values()]
    known = {"objective": "binary:logistic", "max_depth": DEPTH, "eta": 0.3, "base_score": 0.5, "nthread": 1}
    joined = xgboost.DMatrix(np.concatenate([one.x for one in parts]), label=np.concatenate([one.y for one in parts]))
    central = roc_auc_score(test.y, xgboost.train(known, joined, TREES).predict(xgboost.DMatrix(test.x)))
    found = roc_auc_score(test.y, build(PLAN).predict(simulate(PLAN, files).model, test.x))
    say(f"AUC {found:.4f}, of the joined table {central:.4f}")
    assert found > 0.99 * central
