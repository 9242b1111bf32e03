"""The published studies' data: FLamby's Fed-Heart-Disease, one file a hospital."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")


@pytest.fixture
def hospitals(data: Path, tmp_path: Path) -> dict[str, Path]:
    """One CSV file a hospital, with FLamby's rows, columns and split (commit edacf54d52), not standardised."""
    with (data / "heart_disease_uci" / "fed_heart_flamby_13f.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    paths = {}
    for name in HOSPITALS:
        paths[name] = tmp_path / f"{name}.csv"
        with paths[name].open("w", newline="") as file:
            out = csv.DictWriter(file, list(rows[0]))
            out.writeheader()
            out.writerows(row for row in rows if row["hospital"] == name)
    return paths
