"""How updates lie to their mean: what it should be by definition, a sample of long ones, and the same simulated and deployed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.federation import clients, plan, run

from atoll.algorithms.drift import SAMPLE, drift
from atoll.simulate import simulate
from atoll.vector import Flat, Layout, Tensor


class Updates:
    """Updates of one group or of two, as a fold sees them."""

    reference = None

    def __init__(self, table: np.ndarray, parts: int = 1, total: str = "weighted") -> None:
        self.ids = [f"n{k}" for k in range(len(table))]
        self.groups = dict(zip("ab", np.array_split(table, parts, axis=1), strict=False))
        self.layouts = {name: Layout((Tensor("x", (part.shape[1],)),), "float32", total) for name, part in self.groups.items()}

    def block(self, group: str, lo: int, hi: int) -> Sequence[Flat]:
        return list(self.groups[group][:, lo:hi])


def naive(table: np.ndarray, weights: Sequence[float]) -> tuple[np.ndarray, float]:
    shares = np.array(weights) / sum(weights)
    mean = shares @ table
    lengths = np.linalg.norm(table, axis=1)
    return table @ mean / lengths / np.linalg.norm(mean), math.sqrt(shares @ lengths**2 / (mean @ mean))


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 2), st.integers(0, 2**32 - 1))
def test_cosines_and_dissimilarity_are_those_of_the_definition(nodes, size, parts, seed):
    rng = np.random.default_rng(seed)
    table, weights = rng.normal(size=(nodes, size + parts)), rng.integers(1, 9, nodes).tolist()
    found = drift(Updates(table, parts), weights)
    cosines, dissimilarity = naive(table, weights)
    assert found.cosines == pytest.approx(cosines)
    assert found.dissimilarity == pytest.approx(dissimilarity)
    assert found.dissimilarity >= 1 - 1e-12


@pytest.mark.parametrize("parts", [1, 2])
def test_of_a_long_update_a_sample_is_looked_at_from_all_over_it(parts):
    rng = np.random.default_rng(0)
    common = rng.normal(size=20 * SAMPLE)
    table = (common + rng.normal(size=(5, common.size)) * np.linspace(0.1, 4, common.size)).astype(np.float32)
    found = drift(Updates(table, parts), [1.0] * 5)
    cosines, dissimilarity = naive(table.astype(float), [1.0] * 5)
    assert found.cosines == pytest.approx(cosines, abs=0.02)
    assert found.dissimilarity == pytest.approx(dissimilarity, rel=0.02)


def test_what_has_no_direction_is_no_number_and_a_hostile_update_breaks_nothing():
    zero = drift(Updates(np.array([[0.0, 0.0], [1.0, 1.0]])), [1.0, 1.0])
    assert math.isnan(zero.cosines[0])
    assert zero.cosines[1] == pytest.approx(1)
    opposed = drift(Updates(np.array([[1.0, 0.0], [-1.0, 0.0]])), [1.0, 1.0])
    assert math.isinf(opposed.dissimilarity)
    huge = drift(Updates(np.array([[1e300, 0.0], [1.0, 1.0]])), [1.0, 1.0])
    assert not all(map(math.isfinite, huge.cosines))
    assert drift(Updates(np.ones((2, 3)), total="plain"), [1.0, 1.0]) is None


def test_the_history_says_how_nodes_differ_and_a_simulation_says_the_same(tmp_path):
    agreed = plan(model={"metrics": ["auc"]})
    simulated, history = simulate(agreed, clients()).rounds, run(agreed, clients(), tmp_path)["rounds"]
    for mine, stored in zip(simulated, history, strict=True):
        assert mine["drift"] == stored["drift"]
        assert mine["dissimilarity"] == stored["dissimilarity"]
        assert mine["dissimilarity"] >= 1
        assert {name: 0 < one["cosine"] <= 1 and one["norm"] > 0 for name, one in stored["drift"].items()} == dict.fromkeys(
            clients(), True
        )
    # A round's nodes judge the model of the round before; the last one is judged at the goodbye.
    assert [mine["spread"] for mine in simulated[1:]] == [stored["spread"] for stored in history[:-1]]
    last = history[-1]
    accuracies = {name: one["accuracy"] for name, one in last["by_node"].items()}
    spread = last["spread"]["accuracy"]
    assert spread["worst"] == min(accuracies.values()) == accuracies[spread["node"]]
    assert spread["deviation"] == pytest.approx(np.std(list(accuracies.values())))
    assert spread["nodes"] == 3
    assert {"loss", "accuracy", "auc"} <= last["spread"].keys()
