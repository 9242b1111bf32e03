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
    is a level of a tree: a node adds up gradient and curvature of its rows' loss by tree node, feature and bin, those of rows
    without a value (NaN) apart; the server adds up the nodes' sums and splits each tree node where that gains most, rows without
    a value on the better side. Of classes each has a tree, and all grow side by side. The model is whole in every round: a tree
    in growth says what its leaves say so far.

    Args:
        bins: into how many a feature's values are put.

    Raises:
        PlanError: an option out of its range.

    Source: Chen and Guestrin 2016, "XGBoost: A Scalable Tree Boosting System", eq. 5 (leaves), 7 (splits), section 3.2
    (bins) and algorithm 3 (missing values).
    """
    if not (type(bins) is int and 2 <= bins <= 1024):
        raise PlanError(f"aggregation.options.bins: it is a whole number from 2 to 1024; it is {bins!r}")

    def updates(model: Layouts) -> Layouts:
        sizes = trees.Sizes.of(model)  # gradients and curvatures, by bin of the nodes of the last level that is split
        shape = sizes.inputs, sizes.outputs, 2, (bins + 1) << (sizes.depth - 1)
        return {"sums": Layout((Tensor("sums", shape),), "float64", "plain")}

    def init(model: Groups) -> State:
        layouts = layouts_of(model)
        inputs, room = trees.Sizes.of(layouts).inputs, _room(updates(layouts)["sums"])
        edges = Layout((Tensor("edges", (inputs, bins - 1)),), "float32", "plain")
        counts = Layout((Tensor("counts", (inputs, buckets.count(buckets.fineness(room)))),), "float64", "plain")
        began = {"bins": edges, "growth": _GROWTH, "buckets": counts}
        return {**model, **{name: Group(layout, np.zeros(layout.size, layout.dtype)) for name, layout in began.items()}}

    def local(
        learner: Learner, brief: Groups, memory: Memory, rows: Rows, pace: Pace, rng: np.random.Generator
    ) -> tuple[Memory, Update]:
        del pace, rng
        layout = updates(learner.layouts)["sums"]
        sums = Group(layout, np.zeros(layout.size))
        counted, level = brief["growth"].values.tolist()
        if 0 <= counted < buckets.passes(room := _room(layout)):
            _count(rows, counted * room, _by_feature(sums))
        else:
            _add(learner, brief, rows, level, sums.arrays["sums"])
        return memory, Update({"sums": sums}, float(len(rows)))

    def step(state: State, total: Total) -> State:
        summed = total.groups["sums"]
        counted, room, sums = int(state["growth"].values[0]), _room(summed.layout), _by_feature(summed)
        if counted == buckets.passes(room):
            return _grown(state, summed.arrays["sums"])
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


def _room(sums: Layout) -> int:
    """Return how many numbers an update has for each feature."""
    return sums.size // sums.tensors[0].shape[0]


def _by_feature(sums: Group) -> NDArray[np.float64]:
    return sums.values.reshape(sums.layout.tensors[0].shape[0], -1)


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
    """Add up gradients and curvatures of rows by feature, class, tree node and bin: into `[features, outputs, 2, nodes · bins]`.

    Of each node's bins the last is of rows without a value.
    """
    model, edges = only(brief, learner.layouts), brief["bins"].arrays["edges"]
    sizes = trees.Sizes.of(learner.layouts)
    whole, bins = int(model["counts"].values[0]), edges.shape[1] + 2
    if not 0 <= level < sizes.depth:
        raise LayoutError(f"the server asks for level {level} of a tree of depth {sizes.depth}")
    if whole >= sizes.steps:
        return
    splits = [model["splits"].arrays[name][whole, :, : (1 << level) - 1] for name in trees.SPLITS]
    size = bins << level
    for part in blocks(rows):
        x, *slopes = cast("Boosting", learner).slopes(model, part)
        nodes = [trees.places(x, *(one[output] for one in splits)) for output in range(sizes.outputs)]
        for k, values in enumerate(x.T):
            bin_ = np.where(np.isnan(values), bins - 1, np.searchsorted(edges[k], values, side="right"))
            for output, half in np.ndindex(sizes.outputs, 2):
                sums[k, output, half, :size] += np.bincount(nodes[output] * bins + bin_, slopes[half][:, output], size)


def _grown(state: State, sums: NDArray[np.float64]) -> State:
    """Return the state with one more level of its trees."""
    sizes = trees.Sizes.of(layouts_of(state))
    whole, level = int(state["counts"].values[0]), int(state["growth"].values[1])
    if whole >= sizes.steps:
        return state
    after = {name: group.with_values(group.values.copy()) for name, group in state.items()}
    split = [_split(after, (whole, output), level, sums[:, output]) for output in range(sizes.outputs)]
    done = not any(split) or level + 1 == sizes.depth
    growth = state["growth"].with_values(np.array([state["growth"].values[0], 0 if done else level + 1]))
    return {**after, "counts": trees.counted(after, whole + done), "growth": growth}


def _split(state: State, tree: tuple[int, int], level: int, sums: NDArray[np.float64]) -> bool:
    """Split a level of a tree, whose sums are `[features, 2, nodes · bins …]`, in its place; say whether anything was split."""
    settings, nodes, edges = trees.Settings.of(state), 1 << level, state["bins"].arrays["edges"]
    bins = edges.shape[1] + 2
    down, bend = (sums[:, half, : nodes * bins].reshape(len(sums), nodes, bins).transpose(1, 0, 2) for half in (0, 1))
    feature, threshold, missing = (state["splits"].arrays[name][tree] for name in trees.SPLITS)
    leaf, split = state["parameters"].arrays["leaf"][tree], False
    if level == 0:
        leaf[:] = _weight(down[0, 0].sum(), bend[0, 0].sum(), settings)
    gain, left = _gains(down, np.maximum(bend, 0), settings)
    ends = leaf.reshape(nodes, 2, -1)
    for node, best in enumerate(gain.reshape(nodes, -1).argmax(axis=1)):
        column, side, cut = at = tuple(map(int, np.unravel_index(best, gain.shape[1:])))
        place = nodes - 1 + node
        alive = level == 0 or feature[(place - 1) // 2] >= 0
        if not (alive and gain[node][at] > _LEAST and gain[node][at] >= settings.gamma):
            continue
        split = True
        cut = bins - 2 - cut if side else cut
        feature[place], missing[place] = column, side
        threshold[place] = edges[column, cut] if cut < bins - 2 else _BEYOND
        parts = [one[node][at] for one in left]
        rest = [one[node, column].sum() - part for one, part in zip((down, bend), parts, strict=True)]
        ends[node, 0], ends[node, 1] = _weight(parts[0], parts[1], settings), _weight(rest[0], rest[1], settings)
    return split


_BEYOND = np.finfo(np.float32).max
"""The threshold of a split that parts rows without a value from all others."""


def _gains(
    down: NDArray[np.float64], bend: NDArray[np.float64], settings: trees.Settings
) -> tuple[NDArray[np.float32], tuple[NDArray[np.float64], ...]]:
    """Return what each cut gains, and the sums left of it: eq. 7, without its ½ as in XGBoost.

    Cuts are `[nodes, features, 2, bins − 1]`: behind each bin, rows without a value to the right; then behind each but the last,
    from the last on, these rows to the left: the order in which XGBoost takes the first of equal ones.
    """
    there = [np.cumsum(one[..., :-1], axis=2) for one in (down, bend)]
    gone = [one[..., -1:] for one in (down, bend)]
    g, h = (np.stack([one, one[..., ::-1] + none], axis=2) for one, none in zip(there, gone, strict=True))
    sum_g, sum_h = ((one[..., -1:] + none)[..., None] for one, none in zip(there, gone, strict=True))
    gain = _score(g, h, settings) + _score(sum_g - g, sum_h - h, settings) - _score(sum_g, sum_h, settings)
    least = np.minimum(h, sum_h - h)
    least[..., 1, 0] = 0  # all rows to the left
    gain = np.where((least > 0) & (least >= settings.min_child_weight), gain, -np.inf)
    return gain.astype(np.float32), (g, h)  # as XGBoost compares them: what is equal but for sums' rounding ties


def _score(down: NDArray[np.float64], bend: NDArray[np.float64], settings: trees.Settings) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        found: NDArray[np.float64] = np.nan_to_num(down**2 / (bend + settings.reg_lambda), posinf=0.0)
    return found


def _weight(down: float, bend: float, settings: trees.Settings) -> float:
    """Return a leaf (eq. 5), times the learning rate."""
    below = bend + settings.reg_lambda
    return -settings.learning_rate * down / below if below > 0 else 0.0
