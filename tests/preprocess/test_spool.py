"""Rows on disk: the numbers that memory would hold, flat anonymous memory, and nothing left behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.federation import clients, plan, run
from tests.preprocess.test_sources import COLUMNS, KINDS
from tests.preprocess.test_sources import plan as table_plan

from atoll import learners
from atoll.errors import DataError
from atoll.learner import Rows
from atoll.plan import Plan
from atoll.preprocess import batch, gather, prepare, spool


@pytest.fixture
def small(monkeypatch):
    """Whatever is over 100 bytes counts as large, and is read some rows at a time."""
    monkeypatch.setattr(gather, "MEMORY", 100)
    monkeypatch.setattr(batch, "_VALUES", 30)


@pytest.mark.parametrize("standardise", ["no", "node"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_on_disk_are_those_of_memory(tmp_path, small, kind, standardise):
    source, agreed = KINDS[kind](tmp_path), table_plan(**{**COLUMNS, "standardise": standardise})
    mapped = prepare(source, agreed, spool=tmp_path / "spool")
    held = prepare(source, agreed)
    for ours, theirs in zip((*mapped.train, *mapped.test), (*held.train, *held.test), strict=True):
        assert ours.dtype == np.float32
        assert not ours.flags.writeable
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert np.load(tmp_path / "spool" / "train-x.npy").shape == held.train.x.shape
    spool.remove(tmp_path / "spool")
    assert not (tmp_path / "spool").exists()


def test_numbers_far_from_zero_keep_what_tells_them_apart(tmp_path, small):
    rng = np.random.default_rng(0)
    x = np.column_stack([1.7e9 + rng.normal(size=200), np.full(200, 5.0), rng.normal(size=200) * 1e-6])
    np.savez(tmp_path / "a.npz", x=x, y=np.zeros(200))
    agreed = table_plan(3, standardise="node")
    mapped, held = prepare(tmp_path / "a.npz", agreed, spool=tmp_path / "spool"), prepare((x, np.zeros(200)), agreed)
    np.testing.assert_allclose(mapped.train.x, held.train.x, atol=2e-6)


def test_whole_numbers_stay_what_they_are(tmp_path, small):
    np.savez(tmp_path / "a.npz", x=np.arange(600, dtype=np.uint16).reshape(200, 3), y=np.arange(200))
    found = prepare(tmp_path / "a.npz", table_plan(3), spool=tmp_path / "spool")
    assert (found.train.x.dtype, found.train.y.dtype) == (np.uint16, np.int64)
    assert found.train.x[-1].tolist() == [597, 598, 599]
    assert len(found.test) == 0


def test_few_rows_stay_in_memory(tmp_path):
    prepare((np.zeros((9, 3)), np.zeros(9)), table_plan(3), spool=tmp_path / "spool")
    assert not (tmp_path / "spool").exists()


@pytest.mark.parametrize("kind", ["a folder of CSV files", "Parquet"])
def test_a_disk_that_is_too_small_is_one_line_and_nothing_stays(tmp_path, small, monkeypatch, kind):
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(spool._RESERVE + 100))
    with pytest.raises(DataError) as caught:
        prepare(KINDS[kind](tmp_path), table_plan(**COLUMNS), spool=tmp_path / "spool")
    assert "GB are free: free some space, or choose another --dir" in str(caught.value)
    assert not (tmp_path / "spool").exists()


def test_what_fails_halfway_leaves_nothing(tmp_path, small):
    (tmp_path / "rows.csv").write_text("a,b,y\n" + "1,2,0\n" * 50 + "1,x,0\n")
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "stale.npy").write_text("")
    with pytest.raises(DataError, match="line 52"):
        prepare(tmp_path / "rows.csv", table_plan(features=["a", "b"], target="y"), spool=tmp_path / "spool")
    assert not (tmp_path / "spool").exists()


def learner_plans() -> dict[str, Plan]:
    base: dict[str, Any] = {"plan": {"name": "t", "rounds": 1}, "training": {"learning_rate": 0.1}}
    models: dict[str, Any] = {
        "logistic": {"logistic": True},
        "SGDClassifier": {"sklearn": "SGDClassifier", "options": {"loss": "log_loss"}},
        "MLPClassifier": {"sklearn": "MLPClassifier", "options": {"hidden_layer_sizes": [4]}},
    }
    return {name: Plan.of({**base, "model": {**model, "inputs": 6}}) for name, model in models.items()}


@pytest.mark.parametrize("name", learner_plans())
def test_learners_read_maps_and_judge_in_blocks(tmp_path, monkeypatch, name):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 6)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped, held = Rows(np.load(tmp_path / "x.npy", mmap_mode="r"), y), Rows(x, y)
    learner = learners.build(learner_plans()[name])
    start = learner.initial(1)
    one, other = (learner.fit(start, rows, 20, 16, np.random.default_rng(0)) for rows in (mapped, held))
    assert np.array_equal(one.groups["parameters"].values, other.groups["parameters"].values)
    whole = learner.evaluate(one.groups, held)
    monkeypatch.setattr("atoll.learner._VALUES", 100)
    parts = learner.evaluate(one.groups, mapped)
    assert parts.keys() == whole.keys()
    for key in whole:
        assert np.isclose(parts[key], whole[key], rtol=1e-9), key


class Large:
    """An array that is never given whole."""

    def __init__(self, array: np.ndarray) -> None:
        self._array, self.shape, self.dtype, self.ndim = array, array.shape, array.dtype, array.ndim
        self.most = 0

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, which: Any) -> np.ndarray:
        part = self._array[which]
        self.most = max(self.most, len(part))
        return part

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise AssertionError("all rows at once")


def all_plans() -> dict[str, tuple[Plan, list[str]]]:
    base: dict[str, Any] = {"plan": {"name": "t", "rounds": 1}, "training": {"learning_rate": 0.1}}
    layer = {"module": "keras.layers", "class_name": "Dense", "config": {"units": 1, "activation": "sigmoid"}}
    given = {"module": "keras.layers", "class_name": "InputLayer", "config": {"batch_shape": [None, 6]}}
    stack = {"module": "keras", "class_name": "Sequential", "config": {"name": "s", "layers": [given, layer]}}
    jax = "tests.learners.jax_models:linear"
    return {
        **{name: (one, []) for name, one in learner_plans().items()},
        "keras": (Plan.of({**base, "model": {"keras": stack, "loss": "binary_crossentropy"}}), []),
        "jax": (Plan.of({**base, "model": {"jax": jax, "loss": "sigmoid_binary_cross_entropy"}}), [jax]),
    }


@pytest.mark.parametrize("name", all_plans())
def test_no_learner_takes_more_than_a_block_of_rows_at_a_time(monkeypatch, name):
    monkeypatch.setattr("atoll.learner._VALUES", 4096 * 6)
    agreed, allow = all_plans()[name]
    x = np.random.default_rng(0).normal(size=(6000, 6)).astype(np.float32)
    large = Large(x)
    rows = Rows(large, (x[:, 0] > 0).astype(np.float32))  # type: ignore[arg-type]
    learner = learners.build(agreed, allow)
    fitted = learner.fit(learner.initial(1), rows, 5, 16, np.random.default_rng(0))
    if name not in ("SGDClassifier", "MLPClassifier"):  # scikit-learn tells no loss but by judging
        assert large.most == 16
    learner.evaluate(fitted.groups, rows)
    assert 16 < large.most <= 4096


def test_a_node_keeps_rows_on_disk_only_while_it_runs(tmp_path, small):
    for name, (x, y) in clients().items():
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
        (tmp_path / name / "spool-1").mkdir(parents=True)
        (tmp_path / name / "spool-1" / "stale").write_text("of a crash")
    history = run(plan(), {name: tmp_path / f"{name}.npz" for name in clients()}, tmp_path)
    assert history["outcome"] == "completed"
    assert not list(tmp_path.glob("*/spool*"))
    held = run(plan(), {name: tuple(map(np.float32, rows)) for name, rows in clients().items()}, tmp_path / "again")
    assert history["last"] == held["last"]


MEASURE = """
import resource, sys, threading
from pathlib import Path
import numpy as np
from atoll import learners
from atoll.plan import Plan
from atoll.preprocess import prepare
import atoll.preprocess.parquet

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

place, columns = Path(sys.argv[1]), [f"c{k}" for k in range(100)]
plan = Plan.of({"plan": {"name": "t", "rounds": 1}, "model": {"logistic": True},
                "data": {"features": columns, "target": "y", "standardise": "node"}})
learner = learners.build(plan)
before, seen = anonymous(), []
data = prepare(place / "rows", plan, spool=place / "spool", progress=lambda *_: seen.append(anonymous()))
seen.append(anonymous())
fitted = learner.fit(learner.initial(0), data.train, 50, 256, np.random.default_rng(0))
seen.append(anonymous())
learner.evaluate(fitted.groups, data.train)
seen.append(anonymous())
print(len(data.train), round(max(seen) - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_200_mb_cost_less_than_60_mb_of_anonymous_memory(tmp_path):
    (tmp_path / "rows").mkdir()
    rng = np.random.default_rng(0)
    for part in range(8):
        columns = {f"c{k}": rng.random(62_500, np.float32) for k in range(100)}
        pq.write_table(
            pa.table({**columns, "y": rng.integers(0, 2, 62_500)}), tmp_path / "rows" / f"{part}.parquet", row_group_size=8192
        )
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows, grown = map(int, done.stdout.split())
    assert rows == 500_000
    assert grown < 60, f"{grown} MB"
