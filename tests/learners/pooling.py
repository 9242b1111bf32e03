"""How a learner's metrics are checked: nodes' sums, added, against plain definitions over what the model says of all rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from tests.learners import tables

from atoll import learners
from atoll.learner import Rows, pooled, summary
from atoll.plan import Plan


def spreads(y: np.ndarray, seed: int = 0) -> Iterator[np.ndarray]:
    """Ways in which nodes may hold rows, each as the node of each row; by label each node has rows of one class alone."""
    rng = np.random.default_rng(seed)
    yield np.zeros(len(y), int)
    yield rng.integers(0, 3, len(y))
    yield np.unique(y, return_inverse=True)[1]
    yield np.searchsorted(np.cumsum([0.01, 0.04, 0.95]), rng.random(len(y)))


def check_judged(plan: Plan, *, logits: bool) -> None:
    """Check a model of two classes, whose outputs are logits or chances, one or two a row."""
    agreed = plan.with_(model={"metrics": ["auc", "brier", "f1_macro"]})
    learner = learners.build(agreed, allow=agreed.model.functions)
    x, y = tables.rows("binary")
    y = y.astype(int)
    model = learner.fit(learner.initial(0), Rows(x, y), 10, 16, np.random.default_rng(0)).groups
    said: list[np.ndarray] = []

    def keep(predictions, y):
        said.append(np.asarray(predictions, np.float64).reshape(len(y), -1))
        return {}

    learner.measure = keep
    learner.evaluate(model, Rows(x, y))
    outputs = np.concatenate(said)
    with np.errstate(divide="ignore"):
        scores = outputs if logits else np.log(outputs) - (np.log1p(-outputs) if outputs.shape[1] == 1 else 0)
    z = scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores[:, 0]
    ahead = z[y == 1][:, None] - z[y == 0]
    right = np.mean((ahead > 0) + (ahead == 0) / 2)

    def f1(label: int) -> float:
        there, decided = y == label, (z > 0) == label
        return 2 * np.sum(there & decided) / (there.sum() + decided.sum())

    for parts in spreads(y):
        found = summary(pooled(learner.evaluate(model, Rows(x[parts == k], y[parts == k])) for k in np.unique(parts)))
        assert abs(found["auc"] - right) <= found["auc_within"] + 1e-6
        assert found["brier"] == pytest.approx(np.mean((1 / (1 + np.exp(-z)) - y) ** 2), abs=1e-5)
        assert found["f1"] == pytest.approx(f1(1))
        assert found["f1_macro"] == pytest.approx((f1(0) + f1(1)) / 2)
        assert found["accuracy"] == pytest.approx(np.mean((z > 0) == y))
