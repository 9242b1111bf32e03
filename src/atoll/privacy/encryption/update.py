"""A whole update as slots to be encrypted, weight and metrics with it; and the total that the opened sum of such slots is.

Parameters go into slots as the real numbers they are, a node's weight multiplied in; two of them in each complex slot. All
else is written in fixed point, as under masks, and goes into slots in quarters of 16 bits, so that its sums are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from atoll.errors import LayoutError, PlanError, PrivacyError
from atoll.privacy.ckks import DEVIATION, Parameters, Slots
from atoll.privacy.encryption import tag
from atoll.privacy.secagg import update as words
from atoll.privacy.secagg.update import CUT, parts_of
from atoll.vector import Flat, Group, Layout, Layouts, Metrics, Tensor, Total, Update, finite

RING = Parameters(8192, (54, 54, 55))
"""163 bits of primes where the standard allows 218; ciphertexts are of the first two."""
LARGEST = RING.additions
"""Nodes in one encrypted sum."""
NUMBERS = 2 * RING.slots
"""Real numbers in one ciphertext."""
FLOOD = 2.0**60
"""The standard deviation of what covers a decryption's noise, in a coefficient. A sum's own is at most DEVIATION · √LARGEST
there; what is decrypted with one and the other is within ‖noise‖ / 2 FLOOD of each other in statistical distance: 2⁻³⁹ for
1,024 nodes and 10⁹ numbers."""
STEP = 2.0**-36
"""What an opened sum is rounded to, in parts of clip times weight; the flood in it is 2⁻²⁹ for 1,024 nodes, and 2⁻³⁷ for 4."""
CIPHERTEXTS, TAG = "ciphertexts", "tag"
_QUARTER = 1 << 16
_ROUNDED = 2.0**-20
"""By how much a number may be beyond the clip that was cut at it in float32."""
_PARAMETERS = "parameters"


def covered(numbers: int, nodes: int) -> float:
    """Return the statistical distance between opened sums with and without what they would tell of the key."""
    return DEVIATION * float(np.sqrt(nodes * max(numbers, NUMBERS))) / (2 * FLOOD)


@dataclass(frozen=True)
class Code:
    """How the nodes of an encrypted sum write their updates.

    Args:
        layouts: of an update's groups.
        metrics: the names of all metrics that a node may have.
        clip: the largest magnitude of a parameter's change.
        weight: the largest weight of a node.
        nodes: how many are added at most.

    Raises:
        PlanError: there is nothing to encrypt, or too many nodes.
    """

    layouts: Layouts
    metrics: tuple[str, ...]
    clip: float
    weight: float
    nodes: int

    def __post_init__(self) -> None:
        layout = self.layouts.get(_PARAMETERS)
        if layout is None or layout.total != "weighted" or layout.dtype not in {"float32", "float64"}:
            raise PlanError("encryption: the update has no group of real parameters that meet a mean; leave encryption out")
        if not (0 < self.clip < float("inf") and 0 < self.weight < float("inf")):
            raise PlanError(f"encryption: clip {self.clip} and the largest weight {self.weight} must be above 0")
        if self.nodes > LARGEST:
            raise PlanError(f"encryption: {self.nodes} nodes; up to {LARGEST} can be added; lower the cohort, or use masks")

    @property
    def protected(self) -> Layouts:
        """The layouts of an encrypted update: its ciphertexts, and the tag that proves a sum of them."""
        shape = (-(-self._size // NUMBERS), *RING.shape)
        return {
            CIPHERTEXTS: Layout((Tensor("words", shape),), "uint64", "plain"),
            TAG: Layout((Tensor("words", (tag.SIZE,)),), "uint64", "plain"),
        }

    @property
    def opened(self) -> int:
        """Bytes of an opened sum."""
        return 8 * self._words + self.layouts[_PARAMETERS].nbytes

    def slots(self, update: Update) -> Iterator[Slots]:
        """Return an update's numbers as the slots of one ciphertext after the other, each within ±1.

        Raises:
            LayoutError: it holds a number, a weight or a metric that is larger than agreed, NaN or infinity.
        """
        self._check(update)
        hidden = np.concatenate(parts_of(self._rest.encode(self._without(update)).groups))
        quarters = hidden.astype("<u8", copy=False).view("<u2")
        values, factor = update.groups[_PARAMETERS].values, update.weight / (self.weight * self.clip)
        for lo in range(0, self._size, NUMBERS):
            numbers = np.zeros(NUMBERS)
            head = quarters[lo : lo + NUMBERS]
            numbers[: head.size] = head / _QUARTER
            first = lo + head.size - quarters.size
            tail = values[first : first + NUMBERS - head.size] if head.size < NUMBERS else values[:0]
            np.multiply(tail, factor, out=numbers[head.size : head.size + tail.size], dtype=np.float64)
            yield numbers.view(np.complex128)

    def gather(self, chunks: Iterable[Slots], added: int) -> bytes:
        """Return what the slots of a sum of so many updates say, as bytes: the same for every node that opens it.

        Raises:
            PrivacyError: they hold what no such updates add up to.
        """
        sums = np.empty(self._size)
        for lo, slots in zip(range(0, self._size, NUMBERS), chunks, strict=True):
            part = np.ascontiguousarray(slots).view(np.float64)
            sums[lo : lo + NUMBERS] = part[: self._size - lo]
        if not np.abs(sums).max() <= added * (1 + 2 * _ROUNDED):
            raise PrivacyError(f"the sum opens to what {added} updates never add up to: not all were encrypted under one key")
        quarters = np.rint(sums[: 4 * self._words] * _QUARTER).astype(np.int64).reshape(-1, 4).astype(np.uint64)
        hidden = sum((quarters[:, place] << np.uint64(16 * place) for place in range(4)), np.zeros(self._words, np.uint64))
        numbers = np.rint(sums[4 * self._words :] / STEP) * (STEP * self.clip * self.weight)
        return (
            hidden.astype("<u8").tobytes() + numbers.astype(np.dtype(self.layouts[_PARAMETERS].dtype).newbyteorder("<")).tobytes()
        )

    def holds(self, opened: bytes, added: int) -> bool:
        """Say whether bytes are what a sum of so many updates can open to."""
        if len(opened) != self.opened:
            return False
        numbers = self._numbers(opened)
        largest = float(np.abs(numbers).max(initial=0.0))
        return finite(numbers) and largest <= added * self.clip * self.weight * (1 + 2 * _ROUNDED)

    def agree(self, one: bytes, other: bytes) -> bool:
        """Say whether two nodes opened the same sum: where machines compute differently in the last bit, a step apart.

        Both are what a sum can open to, see `holds`.
        """
        size = 8 * self._words
        if one == other or one[:size] != other[:size]:
            return one == other
        mine, theirs = self._numbers(one), self._numbers(other)
        return bool(np.all(np.abs(mine - theirs) <= 1.5 * STEP * self.clip * self.weight + 2.0**-22 * np.abs(mine)))

    def decode(self, total: Total, opened: bytes) -> tuple[Total, Metrics]:
        """Return what an opened sum says: the real total, and the metrics' sums."""
        rest, lo = {}, 0
        for name, layout in sorted(self._rest.masked.items()):
            rest[name] = Group(layout, np.frombuffer(opened, "<u8", layout.size, 8 * lo).astype(np.uint64))
            lo += layout.size
        decoded, metrics = self._rest.decode(replace(total, groups=rest))
        layout = self.layouts[_PARAMETERS]
        parameters = Group(layout, self._numbers(opened).astype(layout.dtype))
        return replace(decoded, groups={**decoded.groups, _PARAMETERS: parameters}), {
            name: value for name, value in metrics.items() if name != CUT
        }

    @cached_property
    def _rest(self) -> words.Code:
        layouts = {name: layout for name, layout in self.layouts.items() if name != _PARAMETERS}
        return words.Code(layouts, self.metrics, self.clip, self.weight, self.nodes, 64)

    @cached_property
    def _words(self) -> int:
        return sum(layout.size for layout in self._rest.masked.values())

    @property
    def _size(self) -> int:
        return 4 * self._words + self.layouts[_PARAMETERS].size

    def _without(self, update: Update) -> Update:
        return replace(update, groups={name: group for name, group in update.groups.items() if name != _PARAMETERS})

    def _check(self, update: Update) -> None:
        for name, array in update.groups[_PARAMETERS].arrays.items():
            largest = float(np.abs(array).max(initial=0.0))
            if not largest <= self.clip * (1 + _ROUNDED):
                raise LayoutError(
                    f"array '{name}' holds {largest:g}, beyond the agreed clip of ±{self.clip:g}; "
                    "lower the learning rate or raise the clip"
                )

    def _numbers(self, opened: bytes) -> Flat:
        return np.frombuffer(opened, np.dtype(self.layouts[_PARAMETERS].dtype).newbyteorder("<"), offset=8 * self._words)
