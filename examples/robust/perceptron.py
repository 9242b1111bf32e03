"""A small perceptron in numpy: a learner of one's own, as `atoll.simulate(…, learner=…)` takes it; and MNIST's pictures."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from atoll.errors import LearnerError
from atoll.learner import Correct, Fit, Rows, batches, by_blocks, classified
from atoll.vector import Flat, Group, Groups, Layout, Metrics, Tensor


class Perceptron:
    """784 → 32 → 10 with ReLU, fitted by SGD on the mean cross-entropy of each mini-batch, in float32."""

    can = frozenset({"correct", "sgd"})

    def __init__(self, learning_rate: float, inputs: int = 784, hidden: int = 32, classes: int = 10) -> None:
        self.learning_rate = learning_rate
        tensors = (("in", (inputs, hidden)), ("in bias", (hidden,)), ("out", (hidden, classes)), ("out bias", (classes,)))
        self.layouts = {"parameters": Layout(tuple(Tensor(name, shape) for name, shape in tensors))}

    def initial(self, seed: int) -> Groups:
        """He's initialisation: normal numbers of variance 2 / inputs, and no bias."""
        rng, layout = np.random.default_rng(seed), self.layouts["parameters"]
        values = np.zeros(layout.size, np.float32)
        for name, view in layout.views(values).items():
            if "bias" not in name:
                view[...] = rng.standard_normal(view.shape) * (2 / len(view)) ** 0.5
        return {"parameters": Group(layout, values)}

    def fit(
        self,
        groups: Groups,
        rows: Rows,
        steps: int,
        batch_size: int,
        rng: np.random.Generator,
        correct: Correct | None = None,
        *,
        rate: float = 1.0,
    ) -> Fit:
        """See `Learner.fit`."""
        vector = groups["parameters"].values.copy()
        loss = samples = 0.0
        for batch in batches(rng, len(rows), batch_size, steps):
            gradient, lost = self._gradient(vector, rows.x[batch], rows.y[batch])
            loss, samples = loss + lost, samples + len(batch)
            vector -= np.float32(self.learning_rate * rate) * (gradient if correct is None else correct(gradient, vector))
        return Fit({"parameters": groups["parameters"].with_values(vector)}, {"samples": samples, "loss": loss})

    def _forward(self, vector: Flat, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the hidden layer gives `[rows, hidden]`, chances `[rows, classes]` and losses `[rows]`."""
        w = self.layouts["parameters"].views(vector)
        if x.shape[1:] != (len(w["in"]),):
            raise LearnerError(f"rows of shape {x.shape[1:]}: the perceptron takes {len(w['in'])} numbers a row")
        hidden = np.maximum(x @ w["in"] + w["in bias"], 0)
        logits = hidden @ w["out"] + w["out bias"]
        logits -= logits.max(axis=1, keepdims=True)
        chances = np.exp(logits)
        sums = chances.sum(axis=1, keepdims=True)
        own = np.arange(len(x)), y
        return hidden, chances / sums, np.log(sums[:, 0]) - logits[own]

    def _gradient(self, vector: Flat, x: np.ndarray, y: np.ndarray) -> tuple[Flat, float]:
        hidden, off, losses = self._forward(vector, x, y)
        off[np.arange(len(x)), y] -= 1
        off /= len(x)
        gradient = np.empty_like(vector)
        g, w = self.layouts["parameters"].views(gradient), self.layouts["parameters"].views(vector)
        within = (off @ w["out"].T) * (hidden > 0)
        g["in"][...], g["in bias"][...] = x.T @ within, within.sum(axis=0)
        g["out"][...], g["out bias"][...] = hidden.T @ off, off.sum(axis=0)
        return gradient, float(losses.sum())

    def evaluate(self, groups: Groups, rows: Rows) -> Metrics:
        """See `Learner.evaluate`."""

        def judge(part: Rows) -> Metrics:
            _, chances, losses = self._forward(groups["parameters"].values, part.x, part.y)
            return classified(float(losses.sum()), chances.argmax(axis=1), part.y, two=chances.shape[1] == 2)

        return by_blocks(judge, rows)


def digits(folder: Path, name: str) -> Rows:
    """Pictures `[rows, 784]` from 0 to 1, and their labels."""
    pictures, labels = (
        np.frombuffer(gzip.decompress((folder / f"{name}-{kind}-ubyte.gz").read_bytes()), np.uint8, offset=offset)
        for kind, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return Rows((pictures.reshape(-1, 784) / 255).astype(np.float32), labels.astype(np.int64))
