"""`[training]`: how long a node fits in a round, in which steps, and how fast as rounds go by. Rank 1.

What a round changes follows from the plan and the round's number alone, so the server, each node, a simulation and
a replay agree on it without a word on the wire.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from atoll.sections import Fraction, Section

_KEYS = {"constant": (), "cosine": ("end",), "exponential": ("factor",), "step": ("factor", "every")}


class Schedule(Section):
    """`training.schedule`: what the learning rate is multiplied by in each round.

    `warmup` rounds rise in equal steps to the whole rate; the kind's own course begins after them.
    """

    kind: Literal["constant", "cosine", "exponential", "step"] = "constant"
    warmup: NonNegativeInt = 0
    factor: Fraction | None = None
    every: PositiveInt | None = None
    end: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _its_own_keys(self) -> Self:
        for key in ("factor", "every", "end"):
            given, own = getattr(self, key) is not None, key in _KEYS[self.kind]
            if given and not own:
                raise ValueError(f"{key} means nothing to kind = '{self.kind}'; it goes with {_kinds_with(key)}")
            if own and not given and key != "end":
                raise ValueError(f"kind = '{self.kind}' needs {key}, for instance {key} = {5 if key == 'every' else 0.9}")
        if self.kind == "constant" and not self.warmup:
            raise ValueError("a schedule that changes nothing: name a kind (cosine, exponential, step), or warmup rounds")
        return self

    def rate(self, round_: int, rounds: int) -> float:
        """Return what the learning rate is multiplied by in a round, from 1 to `rounds`.

        Source: Loshchilov and Hutter 2017, "SGDR", eq. 5 (cosine, without restarts); Goyal et al. 2017, "Accurate,
        Large Minibatch SGD", section 2.2 (warm-up).

        >>> [round(Schedule(kind="cosine").rate(k, 4), 3) for k in (1, 2, 3, 4)]
        [1.0, 0.854, 0.5, 0.146]
        >>> [Schedule(kind="step", factor=0.5, every=2, warmup=1).rate(k, 5) for k in (1, 2, 3, 4, 5)]
        [0.5, 1.0, 1.0, 0.5, 0.5]
        """
        if round_ <= self.warmup:
            return round_ / (self.warmup + 1)
        gone, left = round_ - 1 - self.warmup, max(1, rounds - self.warmup)
        if self.kind == "cosine":
            low = self.end or 0.0
            return low + (1 - low) * (1 + math.cos(math.pi * gone / left)) / 2
        times = gone // self.every if self.every else gone
        return float((self.factor or 1.0) ** times)


def _kinds_with(key: str) -> str:
    return " and ".join(kind for kind, keys in _KEYS.items() if key in keys)


class Pace(NamedTuple):
    """How a node fits in one round: so many mini-batches of so many rows, at `rate` times the plan's learning rate.

    `learning_rate` is what comes of that, for methods that compute with it.
    """

    steps: int
    batch_size: int
    rate: float
    learning_rate: float


class Training(Section):
    """`[training]`: what a node does with a model it received; `epochs` or `steps` of mini-batches a round."""

    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    batch_size: PositiveInt = 32
    optimizer: str = "sgd"
    learning_rate: PositiveFloat = 0.01
    schedule: Schedule | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    precision: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs and self.steps:
            raise ValueError("epochs and steps exclude each other: keep one")
        return self

    def pace(self, rows: int, round_: int, rounds: int) -> Pace:
        """How a node with so many rows fits in a round, from 1 to `rounds`."""
        rate = self.schedule.rate(round_, rounds) if self.schedule else 1.0
        steps = self.steps or (self.epochs or 1) * -(-rows // self.batch_size)
        return Pace(steps, self.batch_size, rate, self.learning_rate * rate)
