"""`[stopping]`: which model of a run is the best, and when a run that gets no better ends before its last round. Rank 1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, PositiveInt, model_validator

from atoll.metrics import ALWAYS, KNOWN, meant
from atoll.sections import Section


class Stopping(Section):
    """`[stopping]`: judged on the holdout where the server has one, else on the nodes' own rows.

    A round counts as better where `metric` gains more than `min_delta` on the best one so far. After `patience` rounds
    in a row without a better one the run is complete; without `patience` all rounds are run. `better` says of a plan's
    own metric whether it should be `lower` or `higher`.
    """

    metric: Annotated[str, Field(min_length=1, max_length=64)] = "loss"
    better: Literal["lower", "higher"] | None = None
    patience: PositiveInt | None = None
    min_delta: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _turned(self) -> Self:
        if self.metric in ALWAYS and self.better is not None:
            raise ValueError(f"better is for a metric of your own; which way is better for {self.metric} is known")
        if self.metric not in KNOWN and self.better is None:
            hint = meant(self.metric)
            mend = "for one of model.metrics say better = 'lower' or 'higher'"
            raise ValueError(f"metric '{self.metric}' is not known; {hint} ({mend})")
        return self


def gain(metric: str, figures: Mapping[str, float], better: str | None = None) -> float:
    """Return a figure, so turned that more is better; minus infinity where there is none.

    >>> gain("loss", {"loss": 0.25}), gain("accuracy", {"loss": 0.25}), gain("brier", {"brier": 0.5}, "lower")
    (-0.25, -inf, -0.5)
    """
    value = figures.get(metric, math.nan)
    better = better or (KNOWN[metric].better if metric in KNOWN else None)
    return -math.inf if math.isnan(value) else -value if better == "lower" else value


class Course(NamedTuple):
    """How a run has gone so far: the best gain, and how many rounds have gone by since."""

    best: float = -math.inf
    since: int = 0

    def after(self, stopping: Stopping, figures: Mapping[str, float]) -> Course:
        """Return the course with one more round; one in which nobody judged a model (all updates were late) says nothing."""
        if not figures:
            return self
        gained = gain(stopping.metric, figures, stopping.better)
        better = gained > self.best + stopping.min_delta
        return Course(gained) if better else Course(self.best, self.since + 1)

    def over(self, stopping: Stopping) -> str | None:
        """Say why the run ends early, or None where it goes on."""
        if stopping.patience is None or self.since < stopping.patience:
            return None
        if math.isinf(self.best):
            return f"stopped early: no {stopping.metric} was measured in {self.since} rounds; name another stopping.metric"
        return f"stopped early: no better {stopping.metric} than {abs(self.best):.4f} in {self.since} rounds"
