"""Central differential privacy: the server adds up clipped updates exactly, and gives out the sum with noise only.

The promise is one about a whole node: whether its update is in the sum, or nothing of it, can't be told apart better than ε and
δ say. Every node has one voice, or a weight that is capped; the sum is divided by a number that no node's rows have a say in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from atoll.errors import PrivacyError
from atoll.keys import Keystream
from atoll.privacy.dp.clip import STEPS, shortened, squares, whole
from atoll.privacy.dp.noise import discrete_gaussian
from atoll.privacy.dp.tree import Draw
from atoll.vector import Flat, Group, Layout, Layouts, Tensor, Total

BLOCK = 1 << 17
WITHIN = "within"
"""The group with one number: one half where an update was within an adaptive bound, minus one half where it was longer."""
SHARE = 0.05
"""The part of the privacy that the count of updates within the bound costs: its noise and the sum's together are the plan's."""
WITHIN_LAYOUT = Layout((Tensor("within", (1,)),), "float32")


class Bodies(Protocol):
    """The accepted updates of a round, as a fold gets them."""

    @property
    def ids(self) -> Sequence[str]:
        """The nodes."""
        ...

    @property
    def layouts(self) -> Layouts:
        """The layouts of every update."""
        ...

    def block(self, group: str, lo: int, hi: int) -> Sequence[Flat]:
        """Numbers `lo` to `hi` of a group of every update."""
        ...


def summed(bound: float, largest: float | None = None) -> Callable[[Bodies, Sequence[float], int], Total]:
    """Return the fold that clips updates anew and adds them up in whole steps of bound/2²⁰: exact, in any order.

    Args:
        bound: the longest that an update may be, over all its groups.
        largest: the largest weight; a node with less has that part of a voice. None: each has one voice.
    """

    def fold(bodies: Bodies, weights: Sequence[float], registered: int) -> Total:
        voices = [1.0] * len(weights) if largest is None else [min(weight, largest) / largest for weight in weights]
        scales = [voice * shortened(norm, bound) * STEPS / bound for voice, norm in zip(voices, _lengths(bodies), strict=True)]
        groups = {}
        for name, layout in bodies.layouts.items():
            values = np.zeros(layout.size)
            for lo in range(0, layout.size, BLOCK):
                into = values[lo : lo + BLOCK]
                for part, scale in zip(bodies.block(name, lo, min(lo + BLOCK, layout.size)), scales, strict=True):
                    if name == WITHIN:
                        into += whole(np.clip(part, -0.5, 0.5), STEPS)
                    else:
                        into += whole(part, scale)
            groups[name] = Group(replace(layout, dtype="float64"), values)
        return Total(groups, 1.0, len(weights), registered)

    return fold


def _lengths(bodies: Bodies) -> list[float]:
    """Return each update's norm over all groups but the count's."""
    found = [0.0] * len(bodies.ids)
    for name, layout in bodies.layouts.items():
        for lo in range(0, layout.size if name != WITHIN else 0, BLOCK):
            for place, part in enumerate(bodies.block(name, lo, min(lo + BLOCK, layout.size))):
                found[place] += squares(part)
    return [math.sqrt(square) for square in found]


def noised(total: Total, layouts: Layouts, bound: float, multiplier: float, draw: Draw, voices: float) -> Total:
    """Return what `summed` gave with noise, off the grid again, to be divided by a fixed number of voices.

    Args:
        total: in whole steps.
        layouts: of an update's groups, for their dtypes.
        bound: as for `summed`.
        multiplier: the noise's standard deviation over the bound; with the group `within`, of both together, see `shares`.
        draw: gives the noise: `fresh` of a key, or `tree.drawn`.
        voices: what the sum is divided by; the same whatever nodes' rows are.

    Raises:
        PrivacyError: the multiplier is out of its range.
    """
    groups = dict[str, Group]()
    sigmas = shares(multiplier, total.groups)
    for name in sorted(total.groups):
        steps, layout = total.groups[name].values, layouts[name]
        values = np.empty(layout.size, layout.dtype)
        sigma, unit = sigmas[name] * STEPS, (1.0 if name == WITHIN else bound) / STEPS
        for lo in range(0, layout.size, BLOCK):
            part = steps[lo : lo + BLOCK]
            values[lo : lo + BLOCK] = (part + draw(sigma, part.size)) * unit
        groups[name] = Group(layout, values)
    if not voices > 0:
        raise PrivacyError(f"a sum for {voices} voices: nobody was asked")
    return replace(total, groups=groups, weight=float(voices))


def fresh(key: bytes) -> Draw:
    """Return noise of 32 bytes of the operating system's generator, for one round alone."""
    stream = Keystream(key)
    return lambda sigma, count: discrete_gaussian(sigma, count, stream)


def shares(multiplier: float, groups: Collection[str]) -> Mapping[str, float]:
    """Return each group's noise, so that the sum and the count within an adaptive bound, if there is one, cost as planned.

    Source: Andrew, Thakkar, McMahan, Ramaswamy 2021, "Differentially Private Learning with Adaptive Clipping", theorem 1:
    z⁻² = z_Δ⁻² + (2σ_b)⁻².
    """
    if WITHIN not in groups:
        return dict.fromkeys(groups, multiplier)
    return {**dict.fromkeys(groups, multiplier / math.sqrt(1 - SHARE)), WITHIN: multiplier / (2 * math.sqrt(SHARE))}
