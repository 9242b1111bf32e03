"""Fixed-point numbers: floats as whole numbers modulo 2¹⁶, 2³² or 2⁶⁴, whose sums are exact and can't run over.

Masks need a finite group to be uniform in. The step is a power of two, so multiplying with it is exact, and
small enough a number of steps that a whole cohort's largest values still fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from atoll.errors import LayoutError, PlanError
from atoll.keys import Keystream, new_secret

Bits = Literal[16, 32, 64]
Words = NDArray[Any]
"""A flat array of uint16, uint32 or uint64: numbers modulo 2¹⁶, 2³² or 2⁶⁴."""
_BLOCK = 1 << 15
_ONES = 3 * 2.0**51
"""A float64 of this size counts in ones: the last 51 bits of a sum with it are the other number, rounded. A cast, but quicker."""
_COARSEST = 8
"""Bits that one number must be left with, its sign not counted."""


@dataclass(frozen=True)
class Fixed:
    """How each of `nodes` nodes writes its numbers, so that their sum modulo 2^bits is the true sum of what was written.

    Args:
        clip: the largest magnitude of a number; beyond it, it is cut.
        nodes: how many are added at most.
        bits: 16, 32 or 64.
        weight: the largest weight that a number is multiplied with.

    Raises:
        PlanError: so many nodes and so large numbers leave less than 8 bits for each.
    """

    clip: float
    nodes: int
    bits: Bits
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.clip < math.inf and 0 < self.weight < math.inf and self.nodes >= 1 and self.bits in {16, 32, 64}):
            raise PlanError(f"fixed point: clip {self.clip} and weight {self.weight} must be above 0, and bits 16, 32 or 64")
        if self.limit < 1 << _COARSEST:
            raise PlanError(
                f"privacy.bits: in a sum of {self.nodes} nodes, {self.bits} bits leave less than {_COARSEST} to each; take "
                f"bits = {min(2 * self.bits, 64)}"
            )

    @property
    def limit(self) -> int:
        """The largest whole number that a node writes: all nodes' together stay below half of 2^bits."""
        return ((1 << (self.bits - 1)) - 1) // self.nodes

    @property
    def exponent(self) -> int:
        """A number is written as so many steps of 2^-exponent; the largest exponent that keeps within the limit."""
        largest = Fraction(self.clip) * Fraction(self.weight) * (1 + Fraction(1, 1 << 50))  # products are rounded, maybe up
        exponent = math.floor(math.log2(self.limit)) - math.floor(math.log2(largest)) + 1
        while largest * Fraction(2) ** exponent > self.limit:
            exponent -= 1
        return exponent

    def encode(self, values: NDArray[Any], weight: float = 1.0, key: bytes | None = None) -> Words:
        """Return weight · value for each value, cut at ±clip, in whole steps.

        Rounded up or down at random, so that the expectation is the number itself to 2⁻¹⁷ of a step, or 2⁻³² of one of 64 bits.

        Args:
            values: float32 or float64 [numbers].
            weight: what each is multiplied with, from 0 on.
            key: 32 bytes that the rounding's randomness is made of; of the operating system's generator when None.

        Raises:
            LayoutError: a value is NaN or infinite, or the weight is none that was agreed on.
        """
        if not 0 <= weight <= self.weight:
            raise LayoutError(f"a weight of {weight}: agreed were weights from 0 to {self.weight}")
        stream, words = Keystream(key or new_secret()), np.empty(values.size, f"uint{self.bits}")
        rounded, draw, finer = (_narrow, "<u2", 16) if self.bits < 64 else (_wide, "<u4", 0)
        factor = math.ldexp(weight, self.exponent + finer)
        exact = np.empty(min(_BLOCK, values.size))
        drawn = np.empty(exact.size, draw)
        zeros, into = memoryview(bytes(drawn.nbytes)), drawn.data.cast("B")
        for lo in range(0, values.size, _BLOCK):
            block = values[lo : lo + _BLOCK]
            largest = _largest(block)
            if not math.isfinite(largest):
                raise LayoutError("numbers to be masked hold NaN or infinity; lower the learning rate or look at the data")
            stream.fill(zeros[: block.size * drawn.itemsize], into[: block.size * drawn.itemsize])
            steps = exact[: block.size]
            np.copyto(steps, block)
            if largest > self.clip:
                np.clip(steps, -self.clip, self.clip, out=steps)
            np.multiply(steps, factor, out=steps)
            rounded(steps, drawn[: block.size], words[lo : lo + block.size])
        return words

    def beyond(self, values: NDArray[Any]) -> int:
        """Return how many values are larger than the clip, and will be cut."""
        if _largest(values) <= self.clip:
            return 0
        return int(np.count_nonzero(values > self.clip) + np.count_nonzero(values < -self.clip))

    def decode(self, total: Words) -> NDArray[np.float64]:
        """Return the sum of what up to `nodes` nodes encoded, from its sum modulo 2^bits."""
        numbers = total.view(f"int{self.bits}").astype(np.float64)
        numbers *= math.ldexp(1.0, -self.exponent)
        return numbers


def _largest(values: NDArray[Any]) -> float:
    """Return the largest magnitude; NaN where there is one."""
    return float(np.maximum(float(values.max(initial=0)), -float(values.min(initial=0))))  # as floats: -2⁶³ has no other int64


def _narrow(steps: NDArray[np.float64], drawn: NDArray[Any], into: Words) -> None:
    """Write numbers in 2⁻¹⁶ steps as steps of 16 or 32 bits, up as often as their fractions say; the numbers are used up."""
    np.add(steps, _ONES, out=steps)
    bits = steps.view(np.int64)
    np.add(bits, drawn, out=bits)
    np.right_shift(bits, 16, out=into, casting="unsafe")


def _wide(steps: NDArray[np.float64], drawn: NDArray[Any], into: Words) -> None:
    """Write steps in 64 bits, up as often as their fractions say, to 2⁻³²; the steps are used up."""
    whole = np.floor(steps)
    np.subtract(steps, whole, out=steps)
    np.multiply(steps, 2.0**32, out=steps)
    np.add(whole, np.greater(steps, drawn), out=whole)
    np.copyto(into.view(np.int64), whole, casting="unsafe")
