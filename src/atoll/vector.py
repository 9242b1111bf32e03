"""Named flat vectors: the one representation that every part between a learner and a step works on.

Enters: the arrays of a model. Leaves: `Group`s (one flat array each, in the order of a `Layout`), and
the `Total`s that a fold makes of many nodes' groups. Rank 0: imports nothing of Atoll but its errors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atoll.errors import LayoutError

Dtype = Literal["float32", "float64", "int64", "uint8", "uint16", "uint32", "uint64"]
"""Unsigned numbers are masked ones, whose plain total is one modulo 2³² or 2⁶⁴; or codes, which nobody adds up."""
Kind = Literal["weighted", "plain"]
Flat = NDArray[Any]
"""A one-dimensional array."""


class Tensor(NamedTuple):
    """One named array of a layout."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the arrays that lie one after the other in a flat vector.

    Args:
        tensors: the arrays, in order.
        dtype: the one dtype of all of them.
        total: what a fold makes of many nodes' vectors: `weighted`, Σ wᵢxᵢ, or `plain`, Σ xᵢ.
    """

    tensors: tuple[Tensor, ...]
    dtype: Dtype = "float32"
    total: Kind = "weighted"

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts, and behind the last one the size of the vector."""
        return tuple(accumulate((math.prod(tensor.shape) for tensor in self.tensors), initial=0))

    @property
    def size(self) -> int:
        """How many numbers a vector of this layout holds."""
        return self.offsets[-1]

    @property
    def nbytes(self) -> int:
        """How many bytes a vector of this layout takes."""
        return self.size * np.dtype(self.dtype).itemsize

    def views(self, values: Flat) -> dict[str, NDArray[Any]]:
        """Return the arrays inside `values`, shaped and not copied.

        >>> layout = Layout((Tensor("kernel", (2, 2)), Tensor("bias", (2,))))
        >>> layout.views(np.arange(6, dtype=np.float32))["kernel"].tolist()
        [[0.0, 1.0], [2.0, 3.0]]
        """
        return {
            tensor.name: values[lo:hi].reshape(tensor.shape)
            for tensor, (lo, hi) in zip(self.tensors, pairwise(self.offsets), strict=True)
        }

    def flatten(self, arrays: Mapping[str, NDArray[Any]]) -> Flat:
        """Copy arrays into one new flat vector, in this layout's order.

        Raises:
            LayoutError: an array is missing, is one too many, or has another shape.
        """
        if arrays.keys() != {tensor.name for tensor in self.tensors}:
            raise LayoutError(f"arrays {sorted(arrays)} are not those of the layout: {[t.name for t in self.tensors]}")
        values = np.empty(self.size, self.dtype)
        for name, view in self.views(values).items():
            if np.shape(arrays[name]) != view.shape:
                raise LayoutError(f"array '{name}' has shape {np.shape(arrays[name])}, the layout says {view.shape}")
            view[...] = arrays[name]
        return values

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]], dtype: Dtype = "float32", total: Kind = "weighted") -> Layout:
        """Return the layout of some arrays, in their own order."""
        return cls(tuple(Tensor(name, np.shape(array)) for name, array in arrays.items()), dtype, total)


Layouts = Mapping[str, Layout]


@dataclass(frozen=True, eq=False)
class Group:
    """A flat vector and its layout.

    `parameters` meet optimisers, clips and control variates; `buffers` (batch-norm statistics and
    the like) only the mean.

    Raises:
        LayoutError: the values are not one flat array of the layout's size and dtype.
    """

    layout: Layout
    values: Flat

    def __post_init__(self) -> None:
        layout, values = self.layout, self.values
        if values.shape != (layout.size,) or values.dtype != layout.dtype:
            raise LayoutError(
                f"values are {values.dtype} of shape {values.shape}, the layout says {layout.dtype} of shape ({layout.size},)"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Group) and self.layout == other.layout and self.values.tobytes() == other.values.tobytes()

    __hash__ = None  # type: ignore[assignment]

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by name: views, not copies."""
        return self.layout.views(self.values)

    def with_values(self, values: Flat) -> Group:
        """Return another vector in the same layout and dtype."""
        return Group(self.layout, np.asarray(values, self.layout.dtype))


Groups = Mapping[str, Group]
Metrics = Mapping[str, float]
"""Sums over rows, never means: `samples`, `loss`, `correct`, … so that many nodes' metrics add up exactly."""


def layouts_of(groups: Groups) -> dict[str, Layout]:
    """Return each group's layout."""
    return {name: group.layout for name, group in groups.items()}


def check(groups: Groups, layouts: Layouts) -> float | None:
    """Check that groups have just these layouts, and only finite numbers; each number is read once.

    Returns:
        The Euclidean norm over all groups that meet a mean; None where none does, as with Newton's sums.

    Raises:
        LayoutError: naming the group, and the array where there is one.
    """
    check_layouts(groups, layouts)
    lengths = []
    for name, group in groups.items():
        squares = squared(group.values)
        if not math.isfinite(squares) and not finite(group.values):
            bad = next(tensor for tensor, array in group.arrays.items() if not finite(array.reshape(-1)))
            raise LayoutError(f"'{bad}' in group '{name}' holds NaN or infinity; lower the learning rate or look at the data")
        if group.layout.total == "weighted":
            lengths.append(squares)
    return math.sqrt(min(math.fsum(lengths), sys.float_info.max)) if lengths else None


def squared(values: Flat, block: int = 1 << 16) -> float:
    """Return the sum of squares: not finite where a number isn't, or where a float64 is too large to be squared."""
    if values.dtype.kind != "f":
        return float(np.square(values, dtype=np.float64).sum())
    total = 0.0
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for lo in range(0, values.size, block):
            part = values[lo : lo + block]
            squares = float(np.einsum("i,i->", part, part))  # one pass, without a copy and without BLAS' threads
            # A float32 of 1e20 is a number, but its square is none.
            total += squares if math.isfinite(squares) else float(np.square(part, dtype=np.float64).sum())
    return total


def check_layouts(groups: Groups, layouts: Layouts) -> None:
    """Check that groups have just these layouts.

    Raises:
        LayoutError: naming the group, and the array where there is one.
    """
    if groups.keys() != layouts.keys():
        raise LayoutError(f"groups {sorted(groups)} are not the agreed ones: {sorted(layouts)}")
    for name, group in groups.items():
        if group.layout != layouts[name]:
            raise LayoutError(f"group '{name}' has another layout than the agreed one: {difference(group.layout, layouts[name])}")


def finite(values: Flat, block: int = 1 << 16) -> bool:
    """Say whether every number is finite, a block at a time so that no large temporary is made."""
    return all(bool(np.isfinite(values[lo : lo + block]).all()) for lo in range(0, values.size, block))


def difference(ours: Layout, theirs: Layout) -> str:
    """Say in a few words where two layouts part."""
    if ours.dtype != theirs.dtype or ours.total != theirs.total:
        return f"{ours.dtype} ({ours.total}) instead of {theirs.dtype} ({theirs.total})"
    if len(ours.tensors) != len(theirs.tensors):
        return f"{len(ours.tensors)} arrays instead of {len(theirs.tensors)}"
    mine, other = next((a, b) for a, b in zip(ours.tensors, theirs.tensors, strict=True) if a != b)
    return f"'{mine.name}' {mine.shape} instead of '{other.name}' {other.shape}"


@dataclass(frozen=True)
class Update:
    """What one node's local work gives: differences to the model it started from (new minus global).

    Args:
        groups: the algorithm's own groups.
        weight: what a weighted total multiplies them with, usually the number of training rows.
        metrics: sums over rows that judge the model as received; those of training itself start with `fit.`.
    """

    groups: Groups
    weight: float
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True)
class Total:
    """What a fold makes of all accepted updates of a round.

    Args:
        groups: Σ wᵢxᵢ or Σ xᵢ, as each layout says.
        weight: Σ wᵢ.
        participants: how many updates are in it.
        registered: how many nodes belong to the run.
    """

    groups: Groups
    weight: float
    participants: int
    registered: int

    def mean(self, name: str) -> Flat:
        """Return what a group moves by: the weighted mean, in its own dtype; or a plain group's sum."""
        group = self.groups[name]
        if group.layout.total == "plain":
            return group.values
        scaled: Flat = group.values / group.values.dtype.type(self.weight)
        return scaled


def add(metrics: Sequence[Metrics]) -> dict[str, float]:
    """Add many nodes' metrics: exact, since they are sums; one that no float can hold is the largest that there is.

    >>> add([{"loss": 1.5e308}, {"loss": 1.5e308}]) == {"loss": sys.float_info.max}
    True
    """
    found: dict[str, list[float]] = {}
    for one in metrics:
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    return {name: _sum(values) for name, values in found.items()}


def _sum(values: Sequence[float]) -> float:
    try:
        return math.fsum(values)
    except OverflowError:  # of a run that diverges, or of nodes that would end it
        return math.copysign(sys.float_info.max, sum(values))
