"""`[stopping]`: which model of a run is the best, and when a run that gets no better ends before its last round. Rank 1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, PositiveInt, model_validator

from atoll.metrics import ALWAYS, KNOWN, meant
from atoll.sections import Section


class Stopping(Section):
    """`[stopping]`: judged on the holdout where the server has one, else on the nodes' own rows.

    A round counts as better where `metric` gains more than `min_delta` on the best one so far. After `patience` rounds
    in a row without a better one the run is complete, and after a round whose `metric` has reached `target`; without
    either all rounds are run. `better` says of a plan's own metric whether it should be `lower` or `higher`.
    """

    metric: Annotated[str, Field(min_length=1, max_length=64)] = "loss"
    better: Literal["lower", "higher"] | None = None
    patience: PositiveInt | None = None
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    target: Annotated[float, Field(allow_inf_nan=False)] | None = None

    def gain(self, figures: Mapping[str, float]) -> float:
        """Return the watched figure, so turned that more is better; minus infinity where there is none."""
        return gain(self.metric, figures, self.better)

    def figure(self, gained: float) -> float:
        """Return the watched figure that a gain stands for."""
        return gained * self.gain({self.metric: 1.0})

    @property
    def goal(self) -> float:
        """The gain that the target is; infinity without one."""
        return math.inf if self.target is None else self.gain({self.metric: self.target})

    def reached(self, gained: float) -> bool:
        """Say whether a gain is as good as the target."""
        return self.target is not None and gained >= self.goal

    def rounds_to_target(self, curve: Iterable[tuple[int, Mapping[str, float]]]) -> float | None:
        """Return when the best figure so far reaches the target, on a line from one judged round to the next.

        Source: McMahan et al. 2017, section 3: "linear interpolation between the discrete points", of curves made monotone.

        >>> said = [(1, {"accuracy": 0.5}), (2, {"accuracy": 0.4}), (3, {}), (4, {"accuracy": 0.9})]
        >>> Stopping(metric="accuracy", target=0.7).rounds_to_target(said)
        3.0
        """
        before: tuple[int, float] | None = None
        for round_, figures in curve:
            gained = self.gain(figures)
            if math.isinf(gained):
                continue
            if self.reached(gained):
                if before is None:
                    return float(round_)
                at, best = before
                return at + (self.goal - best) / (gained - best) * (round_ - at)
            before = round_, max(gained, before[1] if before else gained)
        return None

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
        gained = stopping.gain(figures)
        better = gained > self.best + stopping.min_delta or stopping.reached(gained)
        return Course(gained) if better else Course(self.best, self.since + 1)

    def over(self, stopping: Stopping) -> str | None:
        """Say why the run ends early, or None where it goes on."""
        if stopping.reached(self.best):
            return f"stopped early: {stopping.metric} is {stopping.figure(self.best):.4f}, and the target {stopping.target:g}"
        if stopping.patience is None or self.since < stopping.patience:
            return None
        if math.isinf(self.best):
            return f"stopped early: no {stopping.metric} was measured in {self.since} rounds; name another stopping.metric"
        return f"stopped early: no better {stopping.metric} than {stopping.figure(self.best):.4f} in {self.since} rounds"
