"""Boosted trees as arrays: complete binary trees of one depth, in a fixed number of places, so that a layout never changes.

Enters and leaves: groups. `parameters` are the leaves `[trees, 2^depth]`; `splits` are the inner nodes `[trees, 2^depth − 1]`
from the root down, a node's children at 2k + 1 and 2k + 2: which feature (−1 where a node isn't split, and all rows go left)
and its threshold (rows below it go left). `counts` says how many places hold a whole tree, and how often each feature is
split. Without pointers in it, a tree can't lead out of itself; `check` looks at the rest. Rank 0: numpy alone.
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


def layouts(trees: int, depth: int, inputs: int) -> Layouts:
    """Return the layouts of a model of so many trees over so many features."""
    inner = (trees, (1 << depth) - 1)
    return {
        "parameters": Layout((Tensor("leaf", (trees, 1 << depth)),)),
        "splits": Layout((Tensor("feature", inner), Tensor("threshold", inner)), "float32", "plain"),
        "counts": Layout((Tensor("trees", (1,)), Tensor("splits", (inputs,))), "int64", "plain"),
        "settings": Layout(tuple(Tensor(name, ()) for name in Settings._fields), "float64", "plain"),
    }


def empty(trees: int, depth: int, inputs: int, settings: Settings) -> Groups:
    """Return a model without any tree."""
    blank = {name: Group(layout, np.zeros(layout.size, layout.dtype)) for name, layout in layouts(trees, depth, inputs).items()}
    blank["splits"].arrays["feature"][...] = -1
    return {**blank, "settings": blank["settings"].with_values(np.array(settings))}


def sizes(found: Layouts) -> tuple[int, int, int]:
    """Return how many trees a model has room for, their depth, and how many features there are."""
    trees, leaves = found["parameters"].tensors[0].shape
    return trees, leaves.bit_length() - 1, found["counts"].tensors[1].shape[0]


def counted(groups: Groups, whole: int) -> Group:
    """Return the `counts` of a model whose first so many places hold whole trees."""
    layout = groups["counts"].layout
    chosen = groups["splits"].arrays["feature"][: whole + 1]
    often = np.bincount(chosen[chosen >= 0].astype(np.intp), minlength=layout.tensors[1].shape[0])
    return Group(layout, np.concatenate([[whole], often]).astype(np.int64))


def check(groups: Groups, inputs: int) -> None:
    """Check that trees can be gone through: what others made may be broken, or made to break.

    Raises:
        LayoutError: naming the tree and the node.
    """
    arrays = groups["splits"].arrays
    feature = arrays["feature"]
    wrong = ~((feature == np.rint(feature)) & (feature >= -1) & (feature < inputs)) | ~np.isfinite(arrays["threshold"])
    if wrong.any():
        tree, node = np.argwhere(wrong)[0]
        raise LayoutError(
            f"tree {tree + 1}, node {node}: it splits feature {feature[tree, node]:g} at {arrays['threshold'][tree, node]:g}; "
            f"there are features 0 to {inputs - 1}, or -1 for none, and thresholds are finite"
        )
    if not np.isfinite(groups["parameters"].values).all():
        raise LayoutError("a leaf is NaN or infinite")
    if "counts" in groups and not 0 <= groups["counts"].values[0] <= len(feature):  # an update of new trees has none
        raise LayoutError(f"it says that it holds {groups['counts'].values[0]} trees; it has room for {len(feature)}")


def places(feature: Flat, threshold: Flat, x: NDArray[np.float32]) -> NDArray[np.intp]:
    """Return where rows end up in a tree, `[rows]`: the number of a node of the level below the given ones, from 0.

    Args:
        feature: of each node `[2^levels − 1]`, −1 for none.
        threshold: likewise.
        x: `[rows, features]`.
    """
    split, column = feature >= 0, np.maximum(feature, 0).astype(np.intp)
    values, rows = np.ascontiguousarray(x).reshape(-1), np.arange(len(x)) * x.shape[1]
    at = np.zeros(len(x), np.intp)
    for _ in range((len(feature) + 1).bit_length() - 1):
        at = 2 * at + 1 + (split[at] & (values[rows + column[at]] >= threshold[at]))
    return np.asarray(at - len(feature), np.intp)


def margins(groups: Groups, x: NDArray[np.float32], trees: int) -> NDArray[np.float64]:
    """Return the sum `[rows]` of what the first so many trees say of rows `[rows, features]`."""
    splits, leaf, found = groups["splits"].arrays, groups["parameters"].arrays["leaf"], np.zeros(len(x))
    for lo in range(0, len(x), _AT_ONCE):
        part, into = x[lo : lo + _AT_ONCE], found[lo : lo + _AT_ONCE]
        for feature, threshold, ends in zip(splits["feature"][:trees], splits["threshold"][:trees], leaf[:trees], strict=True):
            into += ends[places(feature, threshold, part)]
    return found


def used(groups: Groups) -> int:
    """Return how many trees say something: the whole ones, and one that is being grown."""
    whole, feature = int(groups["counts"].values[0]), groups["splits"].arrays["feature"]
    return whole + int(whole < len(feature) and feature[whole, 0] >= 0)


def read(model: str | bytes, depth: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return leaves, features and thresholds of the trees in XGBoost's JSON, which this machine's own XGBoost wrote."""
    found = json.loads(model)["learner"]["gradient_booster"]["model"]["trees"]
    leaf = np.zeros((len(found), 1 << depth), np.float32)
    feature, threshold = (np.full((len(found), (1 << depth) - 1), fill, np.float32) for fill in (-1, 0))
    for k, tree in enumerate(found):
        for node, at, level in _nodes(tree):
            value = tree["split_conditions"][node]
            if tree["left_children"][node] >= 0:
                feature[k, at], threshold[k, at] = tree["split_indices"][node], value
            else:  # where no row is split any more, all go left; the others' places say the same
                lo = (at + 1 - (1 << level)) << (depth - level)
                leaf[k, lo : lo + (1 << (depth - level))] = value
    return leaf, feature, threshold


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
    """Return a model as XGBoost's JSON, which any XGBoost from 3.1 loads; what is NaN there goes left."""
    leaf, splits = groups["parameters"].arrays["leaf"], groups["splits"].arrays
    trees = [_tree(k, leaf[k], splits["feature"][k], splits["threshold"][k], inputs) for k in range(used(groups))]
    model = {
        "cats": {"enc": [], "feature_segments": [], "sorted_idx": []},
        "gbtree_model_param": {"num_parallel_tree": "1", "num_trees": str(len(trees))},
        "iteration_indptr": list(range(len(trees) + 1)),
        "tree_info": [0] * len(trees),
        "trees": trees,
    }
    about = {"base_score": f"[{base_score!r}]", "boost_from_average": "0", "num_class": "0", "num_feature": str(inputs)}
    learner = {
        "attributes": {},
        "feature_names": [],
        "feature_types": [],
        "gradient_booster": {"model": model, "name": "gbtree"},
        "learner_model_param": {**about, "num_target": "1"},
        "objective": {"name": objective, "reg_loss_param": {"scale_pos_weight": "1"}},
    }
    return {"learner": learner, "version": [3, 2, 0]}


def _tree(number: int, leaf: Flat, feature: Flat, threshold: Flat, inputs: int) -> dict[str, Any]:
    depth = len(leaf).bit_length() - 1
    left: list[int] = []
    right: list[int] = []
    parents: list[int] = []
    columns: list[int] = []
    values: list[float] = []
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
            waiting += [(2 * at + 1, level + 1, node), (2 * at + 2, level + 1, node)]
        else:
            columns.append(0)
            values.append(float(leaf[(at + 1 - (1 << level)) << (depth - level)]))
    nothing: list[float] = [0.0] * len(left)
    return {
        "base_weights": nothing, "categories": [], "categories_nodes": [], "categories_segments": [], "categories_sizes": [],
        "default_left": [1] * len(left), "id": number, "left_children": left, "loss_changes": nothing, "parents": parents,
        "right_children": right, "split_conditions": values, "split_indices": columns, "split_type": [0] * len(left),
        "sum_hessian": nothing,
        "tree_param": {"num_deleted": "0", "num_feature": str(inputs), "num_nodes": str(len(left)), "size_leaf_vector": "1"},
    }  # fmt: skip
