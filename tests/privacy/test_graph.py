"""The graph of shares: its bounds hold, exactly where they can be computed and by trying where they can't."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import PlanError
from atoll.privacy import graph as module
from atoll.privacy.graph import graph


@given(st.integers(3, 50), st.floats(0, 0.4), st.integers(0, 20))
def test_a_small_graph_is_complete_and_its_numbers_fit(nodes, dropout, bad):
    lost = math.floor(dropout * nodes + 1e-9)
    try:
        made = graph(nodes, dropout, bad)
    except PlanError:
        assert nodes - lost <= (nodes + bad) / 2 or nodes - bad < 2
        return
    assert made.degree == nodes - 1
    assert bad < made.threshold <= made.quorum <= nodes - lost
    assert made.threshold <= made.degree
    assert 2 * made.quorum > nodes + bad  # two quorums share an honest node
    assert 2 * made.threshold > nodes - 1 + bad  # and honest holders can't be made to give both kinds


@pytest.mark.parametrize("nodes", [51, 100, 200, 500, 1000, 2000])
@pytest.mark.parametrize(("dropout", "corrupt"), [(0.1, 0.1), (0.1, 1 / 3), (0.3, 0.1), (0, 0)])
def test_a_large_graph_keeps_both_bounds(nodes, dropout, corrupt):
    lost, bad = math.floor(dropout * nodes + 1e-9), math.floor(corrupt * nodes + 1e-9)
    made = graph(nodes, dropout, bad)

    def below(marked: int, limit: int) -> float:
        ways = sum(math.comb(marked, hits) * math.comb(nodes - 1 - marked, made.degree - hits) for hits in range(limit))
        return ways / math.comb(nodes - 1, made.degree)

    assert nodes * below(nodes - 1 - lost, made.threshold) <= 2**-39.9
    alone = 1 - below(bad, made.threshold) if bad >= made.threshold else 0
    assert (nodes - bad) * alone <= 2**-39.9  # with whole numbers: corrupt holders alone never reach the threshold
    assert module._reveals(nodes, bad, made.degree, made.threshold) <= -40 * math.log(2)


def test_it_grows_slowly():
    degrees = [graph(nodes, 0.1, nodes // 10).degree for nodes in (100, 200, 500, 1000, 2000)]
    assert degrees == sorted(degrees)
    assert degrees[-1] < 110


def test_the_bound_is_one_when_tried(monkeypatch):
    # Few nodes and a low threshold, so that it happens: how often is there a set of honest nodes, each with threshold - 1
    # of its holders in the set or corrupt, at most half of the honest? The bound (a union over sets) must not be less.
    nodes, bad, degree, threshold = 12, 2, 3, 4
    bound = math.exp(module._reveals(nodes, bad, degree, threshold))
    rng = np.random.default_rng(0)
    honest = range(bad, nodes)
    sets = [set(s) for size in range(1, len(honest) // 2 + 1) for s in itertools.combinations(honest, size)]
    tries, found = 400, 0
    for _ in range(tries):
        holders = {i: set(rng.choice([j for j in range(nodes) if j != i], degree, replace=False).tolist()) for i in honest}
        found += any(all(len(holders[i] & (s | set(range(bad)))) >= threshold - 1 for i in s) for s in sets)
    assert 0 < found / tries <= bound


@pytest.mark.parametrize(
    ("nodes", "dropout", "corrupt"),
    [(2, 0, 0), (3, 0.7, 0), (10, 0.3, 5), (100, 0.5, 20)],
    ids=["two", "three", "ten", "many"],
)
def test_what_cannot_be_borne_is_refused(nodes, dropout, corrupt):
    with pytest.raises(PlanError, match="must stay; lower"):
        graph(nodes, dropout, corrupt)


@pytest.mark.parametrize(("dropout", "corrupt"), [(-0.1, 0), (1, 0), (0, -1), (0, 0.1), (math.nan, 0)])
def test_what_is_no_fraction_or_number_is_refused(dropout, corrupt):
    with pytest.raises(PlanError, match="must be a fraction"):
        graph(10, dropout, corrupt)


def test_a_small_cohort_full_of_the_servers_friends_is_refused():
    # 100 nodes of whom 10 are corrupt: a server that asks those and few others gets no sum, or one of several honest nodes.
    for asked in range(3, 100):
        try:
            made = graph(asked, 0.1, 10)
        except PlanError:
            assert asked <= 14
            continue
        assert made.quorum - 10 >= 2
