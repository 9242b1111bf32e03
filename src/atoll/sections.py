"""What a table of a plan or a policy is, the values that several of them hold, and how a mistake in one is told. Rank 1."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, ValidationError

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


def mistake(error: ValidationError, root: type[BaseModel]) -> str:
    """Say the first of the mistakes in what a person wrote, in one line, and how many more there are."""
    mistakes = error.errors(include_url=False)
    first = mistakes[0]
    place = ".".join(str(step) for step in first["loc"]) or root.__name__.lower()
    if first["type"] == "extra_forbidden":
        said = f"unknown key{nearest(str(first['loc'][-1]), _keys(root, first['loc'][:-1]))}"
    elif first["type"] == "missing":
        said = "is missing"
    else:
        said = first["msg"].removeprefix("Value error, ")
        if isinstance(first.get("input"), (str, int, float)):
            said += f" (it is {first['input']!r})"
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    return f"{place}: {said}{more}"


def _keys(model: type[BaseModel], place: tuple[Any, ...]) -> Iterator[str]:
    for step in place:
        said = model.model_fields[step].annotation if step in model.model_fields else None
        kinds = [kind for kind in (said, *get_args(said)) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not kinds:
            return
        model = kinds[0]
    yield from model.model_fields


def nearest(word: str, known: Any) -> str:
    """Say which known word was meant, or what there is."""
    known = list(known)
    close = difflib.get_close_matches(word, known, 1, 0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known) or 'none'}"
