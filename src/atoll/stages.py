"""`[compression]`: by which stages updates, and models, are made smaller on the wire. Rank 1."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator

from atoll.sections import Section

Kind = Literal["fraction", "rank"]
STAGES: Mapping[str, Kind | None] = {
    "bfloat16": None, "8bit": None, "4bit": None, "rotate": None,
    "topk": "fraction", "randomk": "fraction", "powersgd": "rank",
}  # fmt: skip
"""Every stage, and what stands behind its colon."""
CODES = ("bfloat16", "8bit", "4bit")
"""Stages that turn numbers into codes: nothing can follow them."""
CHOICES = ("topk", "randomk", "powersgd")
"""Stages that leave most of a vector out, and so need what they left out to be remembered."""

COMMON = ("rotate", "randomk")
"""Stages that do the same to every node's update, so that what they make can be added up unopened."""


class Said(NamedTuple):
    """A stage as a plan says it: `topk:0.01` is `topk` with .01."""

    name: str
    value: float

    @classmethod
    def of(cls, text: str) -> Said:
        """Read a stage.

        Raises:
            ValueError: there is no such stage, or what stands behind its colon isn't for it.
        """
        name, _, value = text.partition(":")
        if name not in STAGES:
            close = difflib.get_close_matches(name, STAGES, 1, 0.4)
            raise ValueError(
                f"'{text}' is no stage; " + (f"did you mean '{close[0]}'?" if close else f"known: {', '.join(STAGES)}")
            )
        kind = STAGES[name]
        if kind is None:
            if value or text != name:
                raise ValueError(f"'{text}': '{name}' takes no number; write '{name}'")
            return cls(name, 0.0)
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if kind == "fraction" and not 0 < number <= 1:
            raise ValueError(
                f"'{text}': behind '{name}:' stands the fraction that is kept, above 0 and at most 1, as in '{name}:0.01'"
            )
        if kind == "rank" and not (1 <= number <= 1024 and number.is_integer()):
            raise ValueError(f"'{text}': behind '{name}:' stands a rank, a whole number from 1, as in '{name}:4'")
        return cls(name, number)


def _follow(stages: tuple[str, ...]) -> tuple[str, ...]:
    """Check that stages are known, and that each can follow the one before it."""
    said = [Said.of(text).name for text in stages]
    for before, after in itertools.pairwise(said):
        if before in CODES:
            raise ValueError(f"nothing follows '{before}', which makes codes of numbers; put it last")
        if after in CHOICES and before in (*CHOICES, "rotate"):
            what = "spreads each number over many" if before == "rotate" else "chooses already"
            raise ValueError(f"'{after}' can't follow '{before}', which {what}; leave one of them out")
        if before == after == "rotate":
            raise ValueError("'rotate' twice is no more than once; leave one out")
    return stages


class Compression(Section):
    """`[compression]`: stages in the order in which numbers go through them; none: numbers travel as they are.

    `up` is for updates, from nodes to the server; `down` for models, from the server to nodes: of stages that leave numbers
    out, nodes that have the model before get a step to the next one, and all others the whole.
    """

    up: Annotated[tuple[str, ...], AfterValidator(_follow)] = ()
    down: Annotated[tuple[str, ...], AfterValidator(_follow)] = ()
