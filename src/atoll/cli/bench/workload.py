"""Workload S: 100 clients of 200 rows, a perceptron of 199,210 parameters, 10 clients a round; all draws are fixed.

Every program that follows it sees the same rows, first model, clients of each round and order of batches, and so reaches
the same accuracies: .6705 after round 10, .865 (±.001) after round 50.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CLIENTS, ROWS, TEST, COHORT, ROUNDS, BATCH, RATE, JUDGED = 100, 200, 2000, 10, 50, 10, 0.05, 10
SIZES = (784, 200, 200, 10)
_MEANS = 0.12


class Rows(NamedTuple):
    """The clients' rows `[clients, rows, 784]` and the test rows, mapped from files."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int64]


def write(folder: Path) -> None:
    """Draw the rows: classes are Gaussians, and each client has its own mixture of them (Dirichlet .5)."""
    rng = np.random.default_rng(0)
    classes, inputs = SIZES[-1], SIZES[0]
    means = rng.standard_normal((classes, inputs)) * _MEANS
    mixtures = rng.dirichlet(np.full(classes, 0.5), size=CLIENTS)
    y = np.stack([rng.choice(classes, ROWS, p=mixture) for mixture in mixtures]).astype(np.int64)
    x = (means[y] + rng.standard_normal((CLIENTS, ROWS, inputs))).astype(np.float32)
    y_test = rng.integers(0, classes, TEST).astype(np.int64)
    x_test = (means[y_test] + rng.standard_normal((TEST, inputs))).astype(np.float32)
    for name, array in Rows(x, y, x_test, y_test)._asdict().items():
        np.save(folder / f"{name}.npy", array)


def read(folder: Path) -> Rows:
    """Return the rows as `write` drew them."""
    return Rows(*(np.load(folder / f"{name}.npy") for name in Rows._fields))


def first() -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Return the first model: kernel `[inputs, outputs]` and bias of each layer."""
    rng = np.random.default_rng(1)
    return [
        ((rng.standard_normal((inputs, outputs)) * np.sqrt(2.0 / inputs)).astype(np.float32), np.zeros(outputs, np.float32))
        for inputs, outputs in pairwise(SIZES)
    ]


def schedule() -> NDArray[np.int64]:
    """Return the clients of each round `[rounds, cohort]`."""
    rng = np.random.default_rng(2)
    return np.stack([rng.choice(CLIENTS, COHORT, replace=False) for _ in range(ROUNDS)])


def order(round_: int, client: int) -> NDArray[np.int64]:
    """Return the order of a client's rows in a round, counted from 0; each ten of it are a batch."""
    return np.random.default_rng([3, round_, client]).permutation(ROWS)
