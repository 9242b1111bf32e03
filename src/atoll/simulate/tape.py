"""A client's local half, run again each time another of its fits is known: so whole cohorts are fitted at once.

An algorithm's `local` asks a learner for a fit and goes on with what it gets. Under a `Tape` it stops where it asks for
one that isn't recorded yet; once that is done, together with all other clients', `local` runs from its start again.
It is pure, so nothing happens twice. What a strategy can't compile (`correct`, `lean`) is fitted at once by the learner itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from atoll.learner import Correct, Fit, Lean, Learner, Rows
from atoll.vector import Flat, Groups


class Asked(NamedTuple):
    """A fit that is wanted: the arguments of `Learner.fit`."""

    groups: Groups
    rows: Rows
    steps: int
    batch_size: int
    rng: np.random.Generator
    rate: float


class WantsFitError(BaseException):
    """Not an error of anybody's: `local` stops here until the fit it asked for is recorded."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked


class Tape:
    """A learner that plays back the fits it was given, in the order they are asked for; all else is the learner's own."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._fits: list[tuple[Fit, Any]] = []
        self._next = 0
        self.apart = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    def rewind(self) -> None:
        """Begin again."""
        self._next = 0

    def record(self, fit: Fit, rng: np.random.Generator) -> None:
        """Keep a fit, and where it left the generator; it is given out again and again, so nobody may write into it."""
        groups = {name: group.with_values(_kept(group.values)) for name, group in fit.groups.items()}
        self._fits.append((fit._replace(groups=groups), rng.bit_generator.state))

    def fit(
        self,
        groups: Groups,
        rows: Rows,
        steps: int,
        batch_size: int,
        rng: np.random.Generator,
        correct: Correct | None = None,
        *,
        rate: float = 1.0,
        lean: Lean | None = None,
    ) -> Fit:
        """See `Learner.fit`.

        Raises:
            WantsFitError: this one isn't recorded yet.
        """
        if self._next == len(self._fits):
            if correct is None and lean is None and not self.apart:  # what these have seen is seen once: nothing is done again
                raise WantsFitError(Asked(groups, rows, steps, batch_size, rng, rate))
            self.apart = True
            more = {} if lean is None else {"lean": lean}
            self.record(self._learner.fit(groups, rows, steps, batch_size, rng, correct, rate=rate, **more), rng)
        fit, rng.bit_generator.state = self._fits[self._next]
        self._next += 1
        return fit


def _kept(values: Flat) -> Flat:
    seen = values.view()
    seen.flags.writeable = False
    return seen
