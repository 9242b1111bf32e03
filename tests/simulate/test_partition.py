"""Rows spread over clients: each has one, none is lost, and what is uneven is uneven as asked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import DataError
from atoll.simulate.partition import partition, shifted

HOW = st.sampled_from(["iid", "dirichlet:0.05", "dirichlet:100", "shards:1", "shards:2", "quantity:0.1", "shift:0.5", "time"])


@given(st.lists(st.integers(0, 3), min_size=24, max_size=60), st.integers(1, 12), HOW, st.integers(0, 9))
def test_every_row_has_one_client_and_every_client_two_rows(y, clients, how, seed):
    targets = np.array(y, float)
    parts = partition(targets, clients, how, seed)
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(y)))
    assert min(map(len, parts)) >= 2
    again = partition(targets, clients, how, seed)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


def test_a_small_alpha_is_uneven_a_large_one_is_not_and_shards_hold_few_classes():
    y = np.repeat(np.arange(10.0), 100)

    def mixed(how):
        """How many classes a client has on average."""
        return np.mean([len(np.unique(y[part])) for part in partition(y, 10, how, 0)])

    assert mixed("dirichlet:0.05") < 4 < 9 < mixed("dirichlet:100")
    assert mixed("shards:2") <= 3  # McMahan et al.: most clients have two digits
    assert mixed("iid") == 10


def test_quantity_is_uneven_in_rows_and_time_keeps_their_order():
    y = np.tile(np.arange(10.0), 100)
    sizes = sorted(map(len, partition(y, 10, "quantity:0.2", 0)))
    assert sizes[0] < 30 < 300 < sizes[-1]
    assert np.array_equal(np.concatenate(partition(y, 7, "time", 0)), np.arange(1000))


def test_each_client_has_noise_of_its_own_strength():
    x = np.zeros((4000, 3), np.float32)
    first, last = (shifted(x, 2.0, number, 10, 0) for number in (1, 10))
    assert (first.dtype, last.dtype) == (np.float32, np.float32)
    assert first.var() == pytest.approx(0.2, rel=0.1)
    assert last.var() == pytest.approx(2.0, rel=0.1)
    assert np.array_equal(last, shifted(x, 2.0, 10, 10, 0))


@pytest.mark.parametrize(
    ("how", "clients", "said"),
    [
        (
            "even",
            2,
            "partition 'even': it is iid, dirichlet:ALPHA, shards:NUMBER, quantity:ALPHA, shift:DEVIATION, time or key:COLUMN",
        ),
        ("dirichlet", 2, "partition 'dirichlet'"),
        ("dirichlet:0", 2, "with a number above 0"),
        ("shift:0", 2, "partition 'shift:0'"),
        ("quantity:-1", 2, "with a number above 0"),
        ("dirichlet:x", 2, "partition 'dirichlet:x'"),
        ("shards:9", 40, "no more shards than rows"),
        ("iid", 121, "121 clients: 120 rows feed 1 to 120"),
        ("dirichlet:1", 2, "the target has 120 different values; use iid or shards"),
    ],
)
def test_what_cannot_be_spread_is_one_line(how, clients, said):
    with pytest.raises(DataError) as caught:
        partition(np.arange(120.0), clients, how, 0)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
