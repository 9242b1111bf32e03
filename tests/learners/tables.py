"""Small tables that any learner can learn something from."""

from __future__ import annotations

import numpy as np

from atoll.learner import Rows

NOTHING = Rows(np.zeros((0, 6)), np.zeros(0))


def rows(kind: str) -> Rows:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 6)).astype(np.float32)
    score = x[:, 0] - 2 * x[:, 1] + 0.5 * x[:, 2]
    if kind == "words":
        x = rng.integers(0, 20, (120, 6))
        return Rows(x, (x[:, 0] > 9).astype(float))
    if kind == "pictures":
        x = rng.normal(size=(120, 8, 8, 1)).astype(np.float32)
        return Rows(x, (x[:, :4].sum(axis=(1, 2, 3)) > 0).astype(float))
    y = {"binary": score > 0, "three": np.digitize(score, [-1, 1]), "number": score}[kind]
    return Rows(x, np.asarray(y, float))


def wrong(predictions: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """A metric of one's own, for chances."""
    return {"wrong": float(np.sum((predictions >= 0.5) != y))}
