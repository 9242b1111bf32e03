"""Bagging of trees: every node boosts a few on its rows, and the ensemble takes all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from atoll import trees as arrays
from atoll.algorithms.algorithm import Algorithm, Bodies, Memory, State
from atoll.algorithms.local import only
from atoll.algorithms.staleness import buffered
from atoll.errors import PlanError
from atoll.learner import Learner, Rows
from atoll.training import Pace
from atoll.vector import Flat, Group, Groups, Layout, Layouts, Total, Update


def bagging(trees: int = 1, *, weighted: bool = True) -> Algorithm:
    """In each round every node boosts some trees on its rows, from the received ensemble on; the server puts them all into it.

    A round's trees were all grown from one ensemble, so each one's leaves are multiplied with its node's share: together
    they say the mean of what the nodes' trees say, one boosting step a round (a random forest as a step: XGBoost's
    `num_parallel_tree`). Once the ensemble is full it stays as it is; of a round's trees as many go in as have room.

    Args:
        trees: how many a node boosts in a round; with `multi:softprob`, of each class.
        weighted: a node's share is its part of the rows; else all have the same.

    Raises:
        PlanError: an option out of its range.

    Source: Breiman 1996, "Bagging Predictors", section 2 (the mean over predictors), of trees boosted as in Chen and Guestrin
    2016, "XGBoost: A Scalable Tree Boosting System", eq. 5 to 7.
    """
    if not (type(trees) is int and trees >= 1):
        raise PlanError(f"aggregation.options.trees: it is a whole number from 1 up; it is {trees!r}")

    def updates(model: Layouts) -> Layouts:
        new = arrays.Sizes.of(model)._replace(steps=trees).layouts
        return {name: new[name] for name in ("parameters", "splits")}

    def local(
        learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        received, sent = only(brief, learner.layouts), updates(learner.layouts)
        whole = int(received["counts"].values[0])
        sizes = arrays.Sizes.of(learner.layouts)
        if whole + trees > sizes.steps:  # full: trees that say nothing
            blank = arrays.empty(sizes._replace(steps=trees), arrays.Settings.of(received))
            return memory, Update(only(blank, sent), float(len(rows)))
        fit = learner.fit(received, rows, trees, pace.batch_size, rng, rate=pace.rate)
        groups = {name: _part(fit.groups[name], layout, whole) for name, layout in sent.items()}
        return memory, Update(groups, float(len(rows)), fit.metrics)

    def fold(bodies: Bodies, weights: Sequence[float], registered: int) -> Total:
        voices = np.asarray(weights if weighted else np.ones(len(weights)))
        return _collected(bodies, voices / voices.sum(), registered)

    def verify(model: Layouts, groups: Groups) -> None:
        arrays.check(groups, arrays.Sizes.of(model).inputs)

    return Algorithm(
        init=dict, brief=dict, updates=updates, local=local, step=_put, fold=fold,
        needs=frozenset({"boost"}), late=buffered, verify=verify,
    )  # fmt: skip


def _part(group: Group, layout: Layout, lo: int) -> Group:
    """Return the trees of a model from a place on, in the layout of an update."""
    return Group(
        layout, layout.flatten({tensor.name: group.arrays[tensor.name][lo : lo + tensor.shape[0]] for tensor in layout.tensors})
    )


def _collected(bodies: Bodies, shares: Flat, registered: int) -> Total:
    """Put all trees one after the other, in the order of their nodes, each one's leaves times its node's share."""
    groups = {}
    for name, layout in bodies.layouts.items():
        flats = bodies.block(name, 0, layout.size)
        if name == "parameters":
            flats = [flat * flat.dtype.type(share) for flat, share in zip(flats, shares, strict=True)]
        views = [layout.views(flat) for flat in flats]
        stacked = {tensor.name: np.concatenate([view[tensor.name] for view in views]) for tensor in layout.tensors}
        whole = Layout.of(stacked, layout.dtype, layout.total)
        groups[name] = Group(whole, whole.flatten(stacked))
    return Total(groups, 1.0, len(shares), registered)


def _put(state: State, total: Total) -> State:
    after = {name: group.with_values(group.values.copy()) for name, group in state.items()}
    whole, new = int(state["counts"].values[0]), total.groups
    room = len(state["parameters"].arrays["leaf"]) - whole
    taken = min(room, len(new["parameters"].arrays["leaf"]))
    for name, group in new.items():
        for tensor, array in group.arrays.items():
            after[name].arrays[tensor][whole : whole + taken] = array[:taken]
    return {**after, "counts": arrays.counted(after, whole + taken)}
