"""Whole numbers go through a round exactly: no weight, no float and no thread touches them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from atoll.algorithms.fedavg import fedavg
from atoll.algorithms.folds import BLOCK
from atoll.vector import Group, Layout, Tensor, Update

LARGE = 2**55
"""Float64 knows whole numbers up to 2^53."""


class Updates(NamedTuple):
    ids: list[str]
    updates: list[Update]

    @property
    def layouts(self) -> dict[str, Layout]:
        return {name: group.layout for name, group in self.updates[0].groups.items()}

    def block(self, group: str, lo: int, hi: int) -> list[np.ndarray]:
        return [update.groups[group].values[lo:hi] for update in self.updates]


def counts(values: list[int]) -> Group:
    return Group(Layout((Tensor("batches", (len(values),)),), "int64", "plain"), np.array(values))


MOVED = st.lists(st.integers(-LARGE, LARGE), min_size=3, max_size=3)


@given(st.lists(st.tuples(st.floats(0.5, 1e6), MOVED), min_size=1, max_size=8))
def test_a_step_adds_what_every_node_counted(nodes):
    start = [LARGE + 1, 0, -3]
    updates = [Update({"counts": counts(moved)}, weight) for weight, moved in nodes]
    algorithm = fedavg()
    bodies = Updates([str(k) for k in range(len(nodes))], updates)
    after = algorithm.step({"counts": counts(start)}, algorithm.fold(bodies, [one.weight for one in updates], len(nodes)))
    exact = [first + sum(moved[k] for _, moved in nodes) for k, first in enumerate(start)]
    assert after["counts"].values.dtype == np.int64
    assert after["counts"].values.tolist() == exact


def test_more_than_one_block():
    many = np.arange(BLOCK + 7) + LARGE
    group = counts(many.tolist())
    algorithm = fedavg()
    total = algorithm.fold(Updates(["a", "b"], [Update({"counts": group}, 1.0), Update({"counts": group}, 9.0)]), [1.0, 9.0], 2)
    assert (total.mean("counts") == 2 * many).all()
