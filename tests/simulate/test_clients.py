"""Clients that are made when they are asked, and what they remember in files."""

from __future__ import annotations

import numpy as np
import pytest
from tests.federation import plan, rows

import atoll
from atoll.learner import Data, Rows
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
