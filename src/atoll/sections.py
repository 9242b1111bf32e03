"""What a table of the plan is, and the values that several of them hold. Rank 1."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(value: object) -> object:
    """Turn a duration such as "10m" into seconds; what is no text is left to pydantic.

    Raises:
        ValueError: text that is no duration.
    """
    if not isinstance(value, str):
        return value
    for unit in sorted(_UNITS, key=len, reverse=True):
        if value.endswith(unit):
            try:
                return float(value.removesuffix(unit)) * _UNITS[unit]
            except ValueError:
                break
    raise ValueError('a duration is a number of seconds, or text such as "500ms", "30s", "10m", "2h"')


Seconds = Annotated[PositiveFloat, BeforeValidator(seconds)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Value = str | int | float


class Section(BaseModel):
    """A table of the plan: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
