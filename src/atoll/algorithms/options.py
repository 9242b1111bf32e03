"""What options may be: one line that names the option and its range."""

from __future__ import annotations

from atoll.errors import PlanError


def above_0(**options: float) -> None:
    """Check that options lie above 0.

    Raises:
        PlanError: one doesn't.
    """
    _check("is above 0", {name: value for name, value in options.items() if not value > 0})


def at_least_0(**options: float) -> None:
    """Check that options are not negative.

    Raises:
        PlanError: one is.
    """
    _check("is not negative", {name: value for name, value in options.items() if not value >= 0})


def part(**options: float) -> None:
    """Check that options lie in [0, 1).

    Raises:
        PlanError: one doesn't.
    """
    _check("lies in [0, 1)", {name: value for name, value in options.items() if not 0 <= value < 1})


def one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """Check that an option is a known word.

    Raises:
        PlanError: it isn't.
    """
    _check(f"is one of {', '.join(known)}", {} if value in known else {name: value})


def _check(rule: str, wrong: dict[str, object] | dict[str, float]) -> None:
    for name, value in wrong.items():
        raise PlanError(f"aggregation.options.{name}: it {rule}; it is {value!r}")
