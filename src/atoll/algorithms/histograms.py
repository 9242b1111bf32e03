"""Trees from sums: nodes send histograms of gradients, the server finds the splits that training on all rows would find."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from atoll import buckets, trees
from atoll.algorithms.algorithm import Algorithm, Memory, State
from atoll.algorithms.folds import mean
from atoll.algorithms.local import only
from atoll.errors import LayoutError, PlanError
from atoll.learner import Boosting, Learner, Rows, blocks
from atoll.training import Pace
from atoll.vector import Group, Groups, Layout, Layouts, Tensor, Total, Update, layouts_of

_LEAST = 1e-6
"""A split has to gain more than this, as in XGBoost."""


def histograms(bins: int = 32) -> Algorithm:
    """Grow one tree after the other, a level a round; updates are sums over rows, so what a node sends can be masked.

    In the first rounds nodes count their values of each feature in buckets that are the same everywhere, as many at a time
    as an update holds; from the sums the server takes the bins' edges, near the quantiles of all rows. From then on each round
    is a level of a tree: a node adds up gradient and curvature of its rows' loss by tree node, feature and bin; the server adds
    up the nodes' sums and splits each tree node where that gains most. The model is whole in every round: a tree in growth
    says what its leaves say so far.

    Args:
        bins: into how many a feature's values are put.

    Raises:
        PlanError: an option out of its range.

    Source: Chen and Guestrin 2016, "XGBoost: A Scalable Tree Boosting System", eq. 5 (leaves), 7 (splits) and section 3.2 (bins).
    """
    if not (type(bins) is int and 2 <= bins <= 1024):
        raise PlanError(f"aggregation.options.bins: it is a whole number from 2 to 1024; it is {bins!r}")

    def updates(model: Layouts) -> Layouts:
        _, depth, inputs = trees.sizes(model)
        return {"sums": Layout((Tensor("sums", (inputs, bins << depth)),), "float64", "plain")}

    def init(model: Groups) -> State:
        _, depth, inputs = trees.sizes(layouts_of(model))
        edges = Layout((Tensor("edges", (inputs, bins - 1)),), "float32", "plain")
        counts = Layout((Tensor("counts", (inputs, buckets.count(buckets.fineness(bins << depth)))),), "float64", "plain")
        began = {"bins": edges, "growth": _GROWTH, "buckets": counts}
        return {**model, **{name: Group(layout, np.zeros(layout.size, layout.dtype)) for name, layout in began.items()}}

    def local(
        learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        del pace, rng
        layout = updates(learner.layouts)["sums"]
        sums = Group(layout, np.zeros(layout.size))
        counted, level = brief["growth"].values.tolist()
        room = layout.tensors[0].shape[1]
        if 0 <= counted < buckets.passes(room):
            _count(rows, counted * room, sums.arrays["sums"])
        else:
            _add(learner, brief, rows, level, sums.arrays["sums"])
        return memory, Update({"sums": sums}, float(len(rows)))

    def step(state: State, total: Total) -> State:
        sums = total.groups["sums"].arrays["sums"]
        counted, room = int(state["growth"].values[0]), sums.shape[1]
        if counted == buckets.passes(room):
            return _grown(state, sums, bins)
        counts = state["buckets"].with_values(state["buckets"].values.copy())
        part = counts.arrays["counts"][:, counted * room : (counted + 1) * room]
        part[...] = sums[:, : part.shape[1]]
        after = {**state, "buckets": counts, "growth": state["growth"].with_values(np.array([counted + 1, 0]))}
        if counted + 1 < buckets.passes(room):
            return after
        edges = buckets.edges(counts.arrays["counts"], bins, buckets.fineness(room))
        return {**after, "bins": state["bins"].with_values(edges.reshape(-1))}

    return Algorithm(init=init, brief=_brief, updates=updates, local=local, step=step, fold=mean, needs=frozenset({"slopes"}))


_GROWTH = Layout((Tensor("counted", (1,)), Tensor("level", (1,))), "int64", "plain")


def _brief(state: State) -> Groups:
    return {name: group for name, group in state.items() if name != "buckets"}


def _count(rows: Rows, lo: int, sums: NDArray[np.float64]) -> None:
    """Count rows in the buckets from `lo` on, as many as there is room for."""
    fine = buckets.fineness(sums.shape[1])
    counts = np.zeros((len(sums), buckets.count(fine)))
    for part in blocks(rows):
        buckets.add(np.asarray(part.x, np.float32), counts, fine)
    part_of = counts[:, lo : lo + sums.shape[1]]
    sums[:, : part_of.shape[1]] = part_of


def _add(learner: Learner, brief: Groups, rows: Rows, level: int, sums: NDArray[np.float64]) -> None:
    """Add up gradients and curvatures of rows by feature, tree node and bin: into `[features, 2 · nodes · bins …]`."""
    model, edges = only(brief, learner.layouts), brief["bins"].arrays["edges"]
    room, depth, inputs = trees.sizes(learner.layouts)
    whole, bins = int(model["counts"].values[0]), edges.shape[1] + 1
    if not 0 <= level < depth:
        raise LayoutError(f"the server asks for level {level} of a tree of depth {depth}")
    if whole >= room:
        return
    splits = model["splits"].arrays
    feature, threshold = (splits[name][whole, : (1 << level) - 1] for name in ("feature", "threshold"))
    size = bins << level
    for part in blocks(rows):
        x, *slopes = cast("Boosting", learner).slopes(model, part)
        node = trees.places(feature, threshold, x)
        for k in range(inputs):
            at = node * bins + np.searchsorted(edges[k], x[:, k], side="right")
            for half, values in enumerate(slopes):
                lo = half * (bins << (depth - 1))
                sums[k, lo : lo + size] += np.bincount(at, values, size)


def _grown(state: State, sums: NDArray[np.float64], bins: int) -> State:
    """Return the state with one more level of its tree."""
    room, depth, inputs = trees.sizes(layouts_of(state))
    whole, level = int(state["counts"].values[0]), int(state["growth"].values[1])
    if whole >= room:
        return state
    settings, nodes, half = trees.Settings.of(state), 1 << level, bins << (depth - 1)
    down, bend = (sums[:, lo : lo + nodes * bins].reshape(inputs, nodes, bins) for lo in (0, half))
    after = {name: group.with_values(group.values.copy()) for name, group in state.items()}
    feature, threshold = (after["splits"].arrays[name][whole] for name in ("feature", "threshold"))
    leaf = after["parameters"].arrays["leaf"][whole]
    if level == 0:
        leaf[:] = _weight(down[0].sum(), bend[0].sum(), settings)
    gain, left = _gains(down, np.maximum(bend, 0), settings)
    best = gain.reshape(nodes, -1).argmax(axis=1)
    ends, split = leaf.reshape(nodes, 2, -1), False
    for node, (column, cut) in enumerate(zip(*np.divmod(best, bins - 1), strict=True)):
        at = nodes - 1 + node
        alive = level == 0 or feature[(at - 1) // 2] >= 0
        if not (alive and gain[node, column, cut] > _LEAST and gain[node, column, cut] >= settings.gamma):
            continue
        split = True
        feature[at], threshold[at] = column, state["bins"].arrays["edges"][column, cut]
        whole_down, whole_bend = down[column, node].sum(), bend[column, node].sum()
        part_down, part_bend = left[0][node, column, cut], left[1][node, column, cut]
        ends[node, 0] = _weight(part_down, part_bend, settings)
        ends[node, 1] = _weight(whole_down - part_down, whole_bend - part_bend, settings)
    done = not split or level + 1 == depth
    growth = state["growth"].with_values(np.array([state["growth"].values[0], 0 if done else level + 1]))
    return {**after, "counts": trees.counted(after, whole + done), "growth": growth}


def _gains(
    down: NDArray[np.float64], bend: NDArray[np.float64], settings: trees.Settings
) -> tuple[NDArray[np.float64], tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return what each cut gains `[nodes, features, bins − 1]`, and the sums left of it: eq. 7, without its ½ as in XGBoost."""
    parts = [np.cumsum(one, axis=2).transpose(1, 0, 2) for one in (down, bend)]
    (g, h), (sum_g, sum_h) = [one[..., :-1] for one in parts], [one[..., -1:] for one in parts]
    gain = _score(g, h, settings) + _score(sum_g - g, sum_h - h, settings) - _score(sum_g, sum_h, settings)
    least = np.minimum(h, sum_h - h)
    return np.where((least > 0) & (least >= settings.min_child_weight), gain, -np.inf), (g, h)


def _score(down: NDArray[np.float64], bend: NDArray[np.float64], settings: trees.Settings) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        found: NDArray[np.float64] = np.nan_to_num(down**2 / (bend + settings.reg_lambda), posinf=0.0)
    return found


def _weight(down: float, bend: float, settings: trees.Settings) -> float:
    """Return a leaf (eq. 5), times the learning rate."""
    below = bend + settings.reg_lambda
    return -settings.learning_rate * down / below if below > 0 else 0.0
