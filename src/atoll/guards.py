"""`[privacy]`: what protects an update before it leaves, and what a model says of those who made it. Rank 1.

Privacy parameters have no defaults: a person chooses them. What doesn't go together is refused here, in one line.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from atoll.sections import Section

_OWN = ("distributed_noise", "local_noise", "example_noise")
"""Noise that a node adds itself."""
NOISES = ("central_noise", "tree_noise", "distributed_noise", "local_noise", "example_noise")
"""The keys of `[privacy]` that each name a mechanism of differential privacy."""


def _bound(value: Any) -> Any:
    """Say what a clip may be, before a union of types says what it isn't.

    Raises:
        ValueError: it is neither a number above 0 nor "adaptive".
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None or value == "adaptive" or (number and value > 0):
        return float(value) if number else value
    raise ValueError(f'the longest that an update may be (Euclidean norm): a number above 0, or "adaptive"; it is {value!r}')


class Noise(Section):
    """A mechanism's noise: so much that ε stays within `epsilon` over all rounds, or `multiplier` times the sensitivity.

    With a multiplier the run ends before ε would exceed `budget`, where that is given.
    """

    delta: Annotated[float, Field(gt=0, lt=1)]
    epsilon: PositiveFloat | None = None
    multiplier: PositiveFloat | None = None
    budget: PositiveFloat | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.epsilon is None) == (self.multiplier is None):
            said = "both are given" if self.epsilon else "none is"
            raise ValueError(f"noise follows from epsilon, or multiplier says how much: give one of them; {said}")
        if self.budget and self.epsilon:
            raise ValueError("budget goes with multiplier; with epsilon that is the budget already: leave budget out")
        return self

    @property
    def promise(self) -> float | None:
        """The ε that is never exceeded, if there is one."""
        return self.epsilon or self.budget


SUMS = ("secure_aggregation", "encryption")
"""The keys of `[privacy]` that each hide single updates from the server."""
_OF_SUMS = ("bits", "dropout", "corrupt", "roster", "buckets")
"""The keys that only mean something in a secure sum; the first one where numbers are words under masks."""


BUCKETS = 3
"""The fewest buckets that a rule can compare: of two, none is outvoted."""


class ExampleNoise(Noise):
    """Noise on each local step, which hides single rows: each row's gradient is made no longer than `clip`.

    `rows` is a number that anybody may know: steps, the chance of a row and the mean's denominator follow from it at every node,
    however many rows that has.
    """

    clip: PositiveFloat
    rows: PositiveInt | None = None


class Privacy(Section):
    """`[privacy]`: the guards of a plan; none by default.

    `secure_aggregation`: the server learns sums over nodes and no update. A sum bears that `dropout` of its cohort drops out
    and `corrupt` nodes work for the server; `roster` are the only nodes that may be in one. Numbers are written in `bits`.
    In `buckets` the cohort makes a sum each, for a robust rule to compare.
    `encryption`: the same by ciphertexts that the server adds up and nodes open.
    """

    secure_aggregation: bool = False
    encryption: bool = False
    bits: Literal[16, 32, 64] = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    corrupt: NonNegativeInt = 0
    roster: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")], ...] | None = None
    buckets: Annotated[int, Field(ge=BUCKETS)] | None = None
    clip: Annotated[PositiveFloat | Literal["adaptive"] | None, BeforeValidator(_bound)] = None
    largest_weight: PositiveFloat | None = None
    central_noise: Noise | None = None
    tree_noise: Noise | None = None
    distributed_noise: Noise | None = None
    local_noise: Noise | None = None
    example_noise: ExampleNoise | None = None

    @property
    def sums(self) -> str:
        """The key of what hides single updates from the server, or an empty text."""
        return next((name for name in SUMS if getattr(self, name)), "")

    @property
    def noise(self) -> Noise | None:
        """The mechanism of differential privacy, if there is one."""
        return next((one for name in NOISES if (one := getattr(self, name))), None)

    @property
    def mechanism(self) -> str:
        """The key of the mechanism, or an empty text."""
        return next((name for name in NOISES if getattr(self, name)), "")

    @property
    def unit(self) -> float:
        """The longest update, in the unit that it is sent in: that of an adaptive bound is the bound itself."""
        return self.clip if isinstance(self.clip, float) else 1.0

    @model_validator(mode="after")
    def _sums(self) -> Self:
        fields = type(self).model_fields
        lone = next((name for name in _OF_SUMS if getattr(self, name) != fields[name].default), None)
        if lone and not self.sums:
            raise ValueError(f"{lone} is of secure sums: add secure_aggregation = true, or leave it out")
        if self.secure_aggregation and self.encryption:
            raise ValueError("secure_aggregation and encryption hide the same from the same: leave one of them out")
        if self.encryption and self.bits != fields["bits"].default:
            raise ValueError("bits is of secure_aggregation; encrypted numbers have a width of their own: leave it out")
        if self.secure_aggregation and self.bits < 64 and not (self.clip and self.largest_weight):
            raise ValueError(
                f"bits = {self.bits} has room for numbers and weights of known size only: give clip and largest_weight, "
                "or leave bits out"
            )
        if self.buckets and self.encryption:
            raise ValueError("buckets are of secure_aggregation: take that in place of encryption, or leave buckets out")
        if self.roster is not None and len(set(self.roster)) < len(self.roster):
            raise ValueError("roster names a node twice")
        if self.sums and (self.central_noise or self.tree_noise):
            raise ValueError(
                f"{self.mechanism} is the server's own, which would see the sums of {self.sums} without it: "
                "take distributed_noise, with secure_aggregation"
            )
        if self.sums and self.local_noise:
            raise ValueError("local_noise is too much for numbers that are added up unseen: take distributed_noise, or no sums")
        if self.distributed_noise and not self.secure_aggregation:
            raise ValueError("distributed_noise is added in secure sums: add secure_aggregation = true, or take central_noise")
        if self.distributed_noise and self.bits < 64:
            raise ValueError(f"bits = {self.bits} has no room for distributed_noise: leave bits out")
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        given = [name for name in NOISES if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: each promises something of its own, and one ε is told; keep one")
        if self.central_noise and self.clip is None:
            raise ValueError('central_noise hides a part of bounded length: give clip, a number, or clip = "adaptive"')
        if (self.local_noise or self.distributed_noise or self.tree_noise) and self.clip is None:
            more = ', or "adaptive"' if self.distributed_noise else ""
            raise ValueError(f"{self.mechanism} hides an update of bounded length: give clip, a number{more}")
        if self.largest_weight and (own := next((name for name in _OWN if getattr(self, name)), None)):
            raise ValueError(f"under {own} each node has one voice, or its weight would tell of rows: leave largest_weight out")
        if self.clip == "adaptive" and not (self.central_noise or self.distributed_noise):
            raise ValueError(
                'clip = "adaptive" follows what central_noise or distributed_noise lets be seen of lengths: give one, or a number'
            )
        return self
