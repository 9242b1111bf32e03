"""Clients that are made when they are asked, and what they remember in files."""

from __future__ import annotations

import numpy as np
import pytest
from tests.federation import plan, rows

import atoll
from atoll.cli.simulate import given
from atoll.learner import Data, Rows
from atoll.preprocess import gather, prepare
from atoll.simulate import clients as these
from atoll.simulate.clients import Memories, Spread, drawn, longest
from atoll.vector import Group, Layout, Tensor


def spread(agreed, parts) -> Spread:
    x, y = rows(0, sum(map(len, parts)))
    return Spread(Data(Rows(x, y), Rows(x[:0], y[:0])), parts, [], agreed)


@pytest.mark.parametrize("standardise", ["no", "node"])
def test_spread_clients_are_those_that_were_made_beforehand(standardise):
    agreed = plan(data={"standardise": standardise})
    parts = np.split(np.random.default_rng(0).permutation(60), [5, 30])
    lazy = spread(agreed, parts)
    x, y = rows(0, 60)
    assert list(lazy) == ["client-1", "client-2", "client-3"]
    assert longest(lazy) == 30
    assert "client-4" not in lazy
    assert "client-01" not in lazy
    eager = {name: (x[part], y[part]) for name, part in zip(lazy, parts, strict=True)}
    assert atoll.simulate(agreed, lazy).digest == atoll.simulate(agreed, eager).digest


def test_rows_that_are_mapped_stay_so_and_few_are_held(tmp_path, monkeypatch):
    """Clients larger than memory: arrays as they were given, stretches of a table as they lie, and copies of a few."""
    x, y = rows(0, 60)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    whole = prepare((mapped, y), plan())
    assert np.shares_memory(whole.train.x, mapped)
    pair = prepare((mapped, y, mapped[:9], y[:9]), plan())
    assert np.shares_memory(pair.train.x, mapped)
    assert len(pair.test) == 9
    in_time = these.spread(whole, 3, "time", plan())
    assert all(np.shares_memory(in_time[name].train.x, mapped) for name in in_time)
    monkeypatch.setattr(these, "_KEPT", 2 * 20 * 5 * 8)  # two clients of 20 rows, four numbers and a target each
    mixed = these.spread(whole, 3, "iid", plan())
    found = {name: mixed[name] for name in mixed}
    assert mixed["client-3"] is found["client-3"]
    assert mixed["client-1"] is not found["client-1"]
    np.testing.assert_array_equal(mixed["client-1"].train.x, found["client-1"].train.x)


def test_each_table_of_a_folder_may_be_larger_than_memory(tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    for name in ("a", "b"):
        x, y = rows(len(name), 60)
        np.savetxt(tmp_path / "rows" / f"{name}.csv", np.column_stack([x, y]), delimiter=",", header="p,q,r,s,y", comments="")
    agreed = plan(model={"inputs": None}, data={"features": ["p", "q", "r", "s"], "target": "y"}, cohort={"minimum": 2})
    plainly = {
        name: np.array(one.train.x) for name, one in given(tmp_path / "rows", agreed, None, "iid", tmp_path / "1", None).items()
    }
    monkeypatch.setattr(gather, "MEMORY", 1)
    mapped = given(tmp_path / "rows", agreed, None, "iid", tmp_path / "2", None)
    assert all(isinstance(one.train.x.base, np.memmap) for one in mapped.values())
    for name, one in mapped.items():
        np.testing.assert_allclose(one.train.x, plainly[name], rtol=1e-6)


def test_of_a_million_clients_only_those_asked_are_made():
    agreed = plan(plan={"rounds": 3}, training={"steps": 1, "epochs": None})
    lazy = spread(agreed, np.split(np.arange(1_000_000), 1_000_000))
    found = atoll.simulate(agreed, lazy, there=drawn(lazy, 5, 1), strategy="map")
    asked = [row["answered"] for row in found.rounds]
    assert [len(names) for names in asked] == [5, 5, 5]
    assert len({name for names in asked for name in names}) == 15
    assert len(lazy._held) == 15
    assert found.by_node == {}


def test_what_clients_remember_goes_to_files_and_comes_back(monkeypatch):
    monkeypatch.setattr(these, "_IN_MEMORY", 100)
    layout, memories = Layout((Tensor("a", (10,)),)), Memories()

    def memory(number: float):
        return {"variate": Group(layout, np.full(10, number, np.float32))}

    for number in range(4):
        memories.put(f"client {number}", memory(number))
    memories.put("client 0", memory(9))
    assert [float(memories.get(f"client {number}")["variate"].values[0]) for number in range(4)] == [9, 1, 2, 3]
    assert memories.get("another") == {}
    assert len(memories._far) == 2
    memories.close()
