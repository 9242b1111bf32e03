"""The demo's data: scikit-learn's breast-cancer table, spread unevenly by label over a few hospitals."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.errors import AtollError

HOSPITALS = ("north", "east", "south", "west")
TARGET = "benign"
_HELD_OUT = 5
"""One row in so many goes to the server's holdout."""


def tables(nodes: int, seed: int) -> tuple[list[str], dict[str, NDArray[np.float64]]]:
    """Return the column names, and name → table `[rows, 31]` for each hospital and for `holdout`.

    The first hospital has most of the malignant tumours, the last most of the benign ones: each next one
    has half as many, or twice as many, as the one before.

    Raises:
        AtollError: scikit-learn isn't installed, or `nodes` is out of range.
    """
    if not 2 <= nodes <= 10:
        raise AtollError(f"--nodes: {nodes}; the demo's 569 rows feed 2 to 10 hospitals")
    try:
        from sklearn.datasets import load_breast_cancer
    except ModuleNotFoundError as error:
        raise AtollError(
            f"the demo's data comes with scikit-learn ({error.name} is missing): pip install 'atoll-fl[demo]'"
        ) from error
    found: Any = load_breast_cancer()
    table = np.column_stack([found.data, found.target])
    rng = np.random.default_rng(seed)
    shares = 2.0 ** -np.arange(nodes)
    parts: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names(nodes)}
    holdout = []
    for label, share in ((0, shares), (1, shares[::-1])):
        rows = rng.permutation(table[table[:, -1] == label])
        held = len(rows) // _HELD_OUT
        holdout.append(rows[:held])
        cuts = np.round(np.cumsum(share / share.sum())[:-1] * (len(rows) - held)).astype(int)
        for name, part in zip(parts, np.split(rows[held:], cuts), strict=True):
            parts[name].append(part)
    columns = [*map(str, found.feature_names), TARGET]
    return columns, {name: np.concatenate(pieces) for name, pieces in {**parts, "holdout": holdout}.items()}


def names(nodes: int) -> list[str]:
    """Return the hospitals' names."""
    return [HOSPITALS[k] if k < len(HOSPITALS) else f"hospital-{k + 1}" for k in range(nodes)]


def write(directory: Path, nodes: int, seed: int) -> Mapping[str, Path]:
    """Write the tables as CSV files; return name → file."""
    columns, found = tables(nodes, seed)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / f"{name}.csv" for name in found}
    for name, rows in found.items():
        with paths[name].open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow(columns)
            out.writerows([*map(float, row[:-1]), int(row[-1])] for row in rows)
    return paths
