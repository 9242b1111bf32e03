"""Boosted trees as arrays: complete binary trees of one depth, in a fixed number of places, so that a layout never changes.

Enters and leaves: groups. A boosting step is a tree, or one for each class: `outputs` of them. `parameters` are the leaves
`[steps, outputs, 2^depth]`; `splits` are the inner nodes `[steps, outputs, 2^depth − 1]` from the root down, a node's children
at 2k + 1 and 2k + 2: which feature (−1 where a node isn't split, and all rows go left), its threshold (rows below it go left),
and where rows without a value (NaN) go: 1 for left. `counts` says how many places hold whole trees, and how often each feature
is split. Without pointers in it, a tree can't lead out of itself; `check` looks at the rest. Rank 0: numpy alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atoll.errors import LayoutError
from atoll.vector import Flat, Group, Groups, Layout, Layouts, Tensor

_AT_ONCE = 1 << 12
"""Rows that go through all trees at a time: they stay in a core's cache."""


SPLITS = ("feature", "threshold", "missing")
"""What is known of an inner node."""


class Settings(NamedTuple):
    """What of a plan the server needs to grow a tree; travels with the model, as one group of float64."""

    learning_rate: float
    reg_lambda: float
    gamma: float
    min_child_weight: float

    @classmethod
    def of(cls, groups: Groups) -> Settings:
        """Read them from a model."""
        return cls(*groups["settings"].values.tolist())


class Sizes(NamedTuple):
    """For how many boosting steps a model has room, of how many trees each, of which depth, over how many features."""

    steps: int
    outputs: int
    depth: int
    inputs: int

    @classmethod
    def of(cls, found: Layouts) -> Sizes:
        """Read them from a model's layouts."""
        steps, outputs, leaves = found["parameters"].tensors[0].shape
        return cls(steps, outputs, leaves.bit_length() - 1, found["counts"].tensors[1].shape[0])

    @property
    def layouts(self) -> Layouts:
        """The layouts of such a model."""
        inner = (self.steps, self.outputs, (1 << self.depth) - 1)
        return {
            "parameters": Layout((Tensor("leaf", (self.steps, self.outputs, 1 << self.depth)),)),
            "splits": Layout(tuple(Tensor(name, inner) for name in SPLITS), "float32", "plain"),
            "counts": Layout((Tensor("trees", (1,)), Tensor("splits", (self.inputs,))), "int64", "plain"),
            "settings": Layout(tuple(Tensor(name, ()) for name in Settings._fields), "float64", "plain"),
        }


def empty(sizes: Sizes, settings: Settings) -> Groups:
    """Return a model without any tree."""
    blank = {name: Group(layout, np.zeros(layout.size, layout.dtype)) for name, layout in sizes.layouts.items()}
    blank["splits"].arrays["feature"][...] = -1
    return {**blank, "settings": blank["settings"].with_values(np.array(settings))}


def counted(groups: Groups, whole: int) -> Group:
    """Return the `counts` of a model whose first so many places hold whole trees; those of the next one may be in growth."""
    layout = groups["counts"].layout
    chosen = groups["splits"].arrays["feature"][: whole + 1]
    often = np.bincount(chosen[chosen >= 0].astype(np.intp), minlength=layout.tensors[1].shape[0])
    return Group(layout, np.concatenate([[whole], often]).astype(np.int64))


def check(groups: Groups, inputs: int) -> None:
    """Check that trees can be gone through: what others made may be broken, or made to break.

    Raises:
        LayoutError: naming the tree and the node.
    """
    feature, threshold, missing = (groups["splits"].arrays[name] for name in SPLITS)
    wrong = ~((feature == np.rint(feature)) & (feature >= -1) & (feature < inputs)) | ~np.isfinite(threshold)
    wrong |= (missing != 0) & (missing != 1)
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        whose = f" of class {at[1]}" if feature.shape[1] > 1 else ""
        raise LayoutError(
            f"tree {at[0] + 1}{whose}, node {at[2]}: it splits feature {feature[at]:g} at {threshold[at]:g}, missing to "
            f"{missing[at]:g}; there are features 0 to {inputs - 1}, or -1 for none, thresholds are finite, 1 is left, 0 right"
        )
    if not np.isfinite(groups["parameters"].values).all():
        raise LayoutError("a leaf is NaN or infinite")
    if "counts" in groups and not 0 <= groups["counts"].values[0] <= len(feature):  # an update of new trees has none
        raise LayoutError(f"it says that it holds {groups['counts'].values[0]} trees; it has room for {len(feature)}")


def places(x: NDArray[np.float32], feature: Flat, threshold: Flat, missing: Flat) -> NDArray[np.intp]:
    """Return where rows end up in a tree, `[rows]`: the number of a node of the level below the given ones, from 0.

    Args:
        x: `[rows, features]`, NaN where a row has no value.
        feature: of each node `[2^levels − 1]`, −1 for none.
        threshold: of each node; below it is left.
        missing: of each node, 1 where rows without a value go left, else 0.
    """
    split, column, left = feature >= 0, np.maximum(feature, 0).astype(np.intp), missing > 0
    values, rows = np.ascontiguousarray(x).reshape(-1), np.arange(len(x)) * x.shape[1]
    gaps, at = bool(np.isnan(values).any()), np.zeros(len(x), np.intp)
    for _ in range((len(feature) + 1).bit_length() - 1):
        value = values[rows + column[at]]
        right = split[at] & ~(value < threshold[at])  # NaN is below nothing
        if gaps:
            right &= ~(left[at] & np.isnan(value))
        at = 2 * at + 1 + right
    return np.asarray(at - len(feature), np.intp)


def margins(groups: Groups, x: NDArray[np.float32], steps: int) -> NDArray[np.float64]:
    """Return the sums `[rows, outputs]` of what the trees of the first so many steps say of rows `[rows, features]`."""
    leaf = groups["parameters"].arrays["leaf"]
    splits, found = [groups["splits"].arrays[name] for name in SPLITS], np.zeros((len(x), leaf.shape[1]))
    for lo in range(0, len(x), _AT_ONCE):
        part, into = x[lo : lo + _AT_ONCE], found[lo : lo + _AT_ONCE]
        for tree in np.ndindex(steps, leaf.shape[1]):
            into[:, tree[1]] += leaf[tree][places(part, *(one[tree] for one in splits))]
    return found


def used(groups: Groups) -> int:
    """Return how many steps' trees say something: the whole ones, and those that are being grown."""
    whole, feature = int(groups["counts"].values[0]), groups["splits"].arrays["feature"]
    return whole + int(whole < len(feature) and (feature[whole, :, 0] >= 0).any())


def read(model: str | bytes, depth: int, outputs: int) -> dict[str, NDArray[np.float32]]:
    """Return leaves and splits, by name, of the trees in XGBoost's JSON, which this machine's own XGBoost wrote."""
    found = json.loads(model)["learner"]["gradient_booster"]["model"]["trees"]
    leaf = np.zeros((len(found), 1 << depth), np.float32)
    splits = [np.full((len(found), (1 << depth) - 1), fill, np.float32) for fill in (-1, 0, 0)]
    for k, tree in enumerate(found):
        for node, at, level in _nodes(tree):
            value = tree["split_conditions"][node]
            if tree["left_children"][node] >= 0:
                for array, said in zip(splits, (tree["split_indices"][node], value, tree["default_left"][node]), strict=True):
                    array[k, at] = said
            else:  # where no row is split any more, all go left; the others' places say the same
                lo = (at + 1 - (1 << level)) << (depth - level)
                leaf[k, lo : lo + (1 << (depth - level))] = value
    whole = {"leaf": leaf, **dict(zip(SPLITS, splits, strict=True))}
    return {name: array.reshape(-1, outputs, array.shape[1]) for name, array in whole.items()}


def _nodes(tree: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    """Go through a tree: its node's number, the place in a complete tree, and the level."""
    waiting = [(0, 0, 0)]
    while waiting:
        node, at, level = waiting.pop()
        yield node, at, level
        if tree["left_children"][node] >= 0:
            waiting += [
                (tree["left_children"][node], 2 * at + 1, level + 1),
                (tree["right_children"][node], 2 * at + 2, level + 1),
            ]


def written(groups: Groups, objective: str, inputs: int, base_score: float) -> dict[str, Any]:
    """Return a model as XGBoost's JSON, which any XGBoost from 3.1 loads."""
    leaf, splits = groups["parameters"].arrays["leaf"], [groups["splits"].arrays[name] for name in SPLITS]
    steps, outputs = used(groups), leaf.shape[1]
    trees = [_tree(k, inputs, leaf[at], *(one[at] for one in splits)) for k, at in enumerate(np.ndindex(steps, outputs))]
    model = {
        "cats": {"enc": [], "feature_segments": [], "sorted_idx": []},
        "gbtree_model_param": {"num_parallel_tree": "1", "num_trees": str(len(trees))},
        "iteration_indptr": list(range(0, len(trees) + 1, outputs)),
        "tree_info": [k % outputs for k in range(len(trees))],
        "trees": trees,
    }
    classes = outputs if outputs > 1 else 0
    base = ",".join([repr(base_score)] * outputs)
    about = {"base_score": f"[{base}]", "boost_from_average": "0", "num_class": str(classes), "num_feature": str(inputs)}
    of = {"softmax_multiclass_param": {"num_class": str(classes)}} if classes else {"reg_loss_param": {"scale_pos_weight": "1"}}
    learner = {
        "attributes": {},
        "feature_names": [],
        "feature_types": [],
        "gradient_booster": {"model": model, "name": "gbtree"},
        "learner_model_param": {**about, "num_target": "1"},
        "objective": {"name": objective, **of},
    }
    return {"learner": learner, "version": [3, 2, 0]}


def _tree(number: int, inputs: int, leaf: Flat, feature: Flat, threshold: Flat, missing: Flat) -> dict[str, Any]:
    depth = len(leaf).bit_length() - 1
    left: list[int] = []
    right: list[int] = []
    parents: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    gaps: list[int] = []
    waiting = [(0, 0, 2147483647)]
    while waiting:
        at, level, parent = waiting.pop(0)
        node = len(left)
        if parent != 2147483647:
            (left if left[parent] < 0 else right)[parent] = node
        parents.append(parent)
        left.append(-1)
        right.append(-1)
        if level < depth and feature[at] >= 0:
            columns.append(int(feature[at]))
            values.append(float(threshold[at]))
            gaps.append(int(missing[at]))
            waiting += [(2 * at + 1, level + 1, node), (2 * at + 2, level + 1, node)]
        else:
            columns.append(0)
            values.append(float(leaf[(at + 1 - (1 << level)) << (depth - level)]))
            gaps.append(0)
    nothing: list[float] = [0.0] * len(left)
    return {
        "base_weights": nothing, "categories": [], "categories_nodes": [], "categories_segments": [], "categories_sizes": [],
        "default_left": gaps, "id": number, "left_children": left, "loss_changes": nothing, "parents": parents,
        "right_children": right, "split_conditions": values, "split_indices": columns, "split_type": [0] * len(left),
        "sum_hessian": nothing,
        "tree_param": {"num_deleted": "0", "num_feature": str(inputs), "num_nodes": str(len(left)), "size_leaf_vector": "1"},
    }  # fmt: skip
