"""A whole update as words to be masked, weight and metrics with it; and the total that the unmasked sum of such words is.

Parameters take 16, 32 or 64 bits a number; all else takes 64. A weight goes into the numbers it multiplies and, beside them, as a
number of its own: the server learns Σ wᵢxᵢ and Σ wᵢ, and no wᵢ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from atoll.errors import LayoutError
from atoll.keys import SECRET, Keystream, fingerprint
from atoll.metrics import binned
from atoll.privacy.fixed import Bits, Fixed, Words
from atoll.vector import Dtype, Flat, Group, Groups, Layout, Layouts, Metrics, Tensor, Total, Update

CUT = "cut"
"""The metric that says how many numbers of an update were beyond the clip, and cut: a clip is too low where it is large."""
HIDDEN = "hidden"
"""The group with a node's weight and its metrics."""
_WIDE = 2.0**20
"""The largest magnitude in groups that no clip is for, as running variances: beyond it, an update is refused."""
_METRIC = 2.0**31
"""The largest magnitude of one node's metric, which is a sum over its rows."""


_DTYPES: Mapping[Bits, Dtype] = {16: "uint16", 32: "uint32", 64: "uint64"}


@dataclass(frozen=True)
class Code:
    """How the nodes of a sum write their updates.

    Args:
        layouts: of an update's groups.
        metrics: the names of all metrics that a node may have.
        clip: the largest magnitude of a parameter's change.
        weight: the largest weight of a node.
        nodes: how many are added at most.
        bits: of a parameter, 16, 32 or 64.
    """

    layouts: Layouts
    metrics: tuple[str, ...]
    clip: float
    weight: float
    nodes: int
    bits: Bits

    @property
    def masked(self) -> Layouts:
        """The layouts of an update as words: the same names and shapes, and `HIDDEN` with weight and metrics."""
        groups = {name: replace(layout, dtype=_DTYPES[fixed.bits], total="plain") for name, fixed, layout in self._groups()}
        return {**groups, HIDDEN: Layout((Tensor(HIDDEN, (len(self.metrics) + 2,)),), "uint64", "plain")}

    def encode(self, update: Update) -> Update:
        """Return an update as words, which `parts_of` gives to masks; its weight and metrics hidden among them.

        The names of its metrics stay open, with zeros: who adds up knows by them which sums mean something. Not those of counts
        in bins: they would say where a node's rows lie.
        What rounding draws is made of the update itself, so that the same training gives the same words anywhere.

        Raises:
            LayoutError: it holds NaN or infinity, or a weight, a metric or a buffer larger than agreed.
        """
        if not 0 < update.weight <= self.weight:
            raise LayoutError(f"a weight of {update.weight:g}: up to {self.weight:g} can be hidden")
        if strange := update.metrics.keys() - set(self.metrics):
            raise LayoutError(f"metric '{min(strange)}' is none that was agreed on: {', '.join(self.metrics)}")
        groups, cut, layouts = {}, 0, self.masked
        draws = Keystream(fingerprint(part.view(np.uint8).data for part in parts_of(update.groups)))
        for name, fixed, layout in self._groups():
            values = update.groups[name].values
            beyond = fixed.beyond(values)
            if beyond and name != "parameters":
                raise LayoutError(f"group '{name}' holds a number beyond ±{fixed.clip:g}, which can't be hidden")
            cut += beyond
            words = fixed.encode(values, update.weight if layout.total == "weighted" else 1.0, draws.take(SECRET))
            groups[name] = Group(layouts[name], words)
        rows = np.array([update.metrics.get(name, 0.0) for name in self.metrics] + [float(cut)])
        if (np.abs(rows) > _METRIC).any():
            raise LayoutError(f"a metric beyond ±{_METRIC:g}, which can't be hidden")
        hidden = np.concatenate(
            [
                self._weights.encode(np.array([update.weight]), key=draws.take(SECRET)),
                self._sums.encode(rows, key=draws.take(SECRET)),
            ]
        )
        names = dict.fromkeys((name for name in update.metrics if not binned(name)), 0.0)
        return Update({**groups, HIDDEN: Group(layouts[HIDDEN], hidden)}, 1.0, names)

    def decode(self, total: Total) -> tuple[Total, Metrics]:
        """Return what the sum of some nodes' words, unmasked, says: their real total, and their metrics' sums with `CUT`."""
        groups = {
            name: Group(layout, _as(layout, fixed.decode(total.groups[name].values))) for name, fixed, layout in self._groups()
        }
        hidden = total.groups[HIDDEN].values
        sums = dict(zip([*self.metrics, CUT], self._sums.decode(hidden[1:]).tolist(), strict=True))
        return replace(total, groups=groups, weight=float(self._weights.decode(hidden[:1])[0])), sums

    def _groups(self) -> Iterator[tuple[str, Fixed, Layout]]:
        for name, layout in sorted(self.layouts.items()):
            weight = self.weight if layout.total == "weighted" else 1.0
            clipped = name == "parameters"
            yield name, Fixed(self.clip if clipped else _WIDE, self.nodes, self.bits if clipped else 64, weight), layout

    @property
    def _weights(self) -> Fixed:
        return Fixed(self.weight, self.nodes, 64)

    @property
    def _sums(self) -> Fixed:
        return Fixed(_METRIC, self.nodes, 64)


def parts_of(groups: Groups) -> list[Words]:
    """Return the words of an update, or of a total, as masks take them: in the order of the groups' names."""
    return [groups[name].values for name in sorted(groups)]


def _as(layout: Layout, sums: Flat) -> Flat:
    return (np.rint(sums) if layout.dtype == "int64" else sums).astype(layout.dtype)
