"""What is stored of a run, as a page needs it: read once, and after that only what is new; thinned, so that it stays small."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from atoll.learner import summary
from atoll.stopping import gain
from atoll.store import SPREAD, RunRow, Tally
from atoll.store.sql import SqlStore

POINTS = 120
"""A curve has at most this many points, and the newest."""
PLACES = ("holdout", "nodes")
WORST, TENTH, UPDATES = "worst node", "worst tenth", "updates"
"""Places of figures that tell nodes from each other."""
Figures = Mapping[str, float]


class Past:
    """A run's figures so far.

    Args:
        store: where they are.
        row: the run.

    Attributes:
        tally: how much has come.
        stride: each how many-th round the curves show.
        plan: the run's, as plain values.
        metric: what the plan judges models by.
        asked: the metrics that it names.
        epsilon: what its models tell at most of those who made them, so far; None where no noise bounds it.
        best: the round whose model is the best by it, on the holdout where there is one, else on the nodes' rows; or None.
    """

    def __init__(self, store: SqlStore, row: RunRow) -> None:
        self._store, self.run = store, row.run
        self.tally, self.stride = Tally(), 1
        self._settled = -1
        self.epsilon: float | None = None
        self._kept: dict[int, dict[str, Figures]] = {}
        self._open: dict[int, dict[str, Figures]] = {}
        self._best: tuple[float, int | None] = -math.inf, None
        # As it was agreed to, maybe under an older version: so not checked again.
        self.plan: Mapping[str, Any] = json.loads(row.plan)
        stopping = self.plan.get("stopping", {})
        self.asked: list[str] = self.plan["model"].get("metrics", [])
        self.metric: str = stopping.get("metric", "loss")
        self._turned: str | None = stopping.get("better")

    def refresh(self) -> None:
        """Read what is new. Figures of the newest two rounds may still change: they are read again the next time."""
        self.tally = self._store.tally(self.run, self.tally)
        self._open = {}
        for row in self._store.evaluations(self.run, self._settled + 1, (*PLACES, SPREAD)):
            if row.round > self.tally.last_round:
                continue
            found = self._open.setdefault(row.round, {})
            if row.place == SPREAD:
                found[WORST] = {name: apart["worst"] for name, apart in row.metrics.items()}
                found[TENTH] = {name: apart["tenth"] for name, apart in row.metrics.items()}
            else:
                found[row.place] = summary(row.metrics)
        for closed in self._store.rounds(self.run, self._settled + 1, self.tally.last_round):
            self.epsilon = closed.epsilon
            if closed.dissimilarity is not None:
                self._open.setdefault(closed.round, {})[UPDATES] = {"dissimilarity": closed.dissimilarity}
        for round_ in [one for one in self._open if one < self.tally.last_round - 1]:
            self._settle(round_, self._open.pop(round_))

    def _settle(self, round_: int, figures: dict[str, Figures]) -> None:
        self._settled = round_
        self._best = self._better(self._best, round_, figures)
        if round_ % self.stride == 0:
            self._kept[round_] = figures
        if len(self._kept) >= POINTS:
            self.stride *= 2
            self._kept = {one: kept for one, kept in self._kept.items() if one % self.stride == 0}

    @property
    def best(self) -> int | None:
        """See the class."""
        best = self._best
        for round_, figures in self._open.items():
            best = self._better(best, round_, figures)
        return best[1]

    def _better(self, best: tuple[float, int | None], round_: int, figures: Mapping[str, Figures]) -> tuple[float, int | None]:
        """The better of the best so far and a round's model; the initial model takes no part."""
        gained = gain(self.metric, figures.get("holdout") or figures.get("nodes") or {}, self._turned)
        return (gained, round_) if round_ and gained > best[0] else best

    @property
    def main(self) -> str:
        """The figure that says most in one number: what the plan judges by, or else accuracy, R² or loss."""
        there = self.newest.get("nodes", {})
        return next((name for name in (self.metric if self.metric != "loss" else "", "accuracy", "r2") if name in there), "loss")

    @property
    def newest(self) -> Mapping[str, Figures]:
        """Place → the newest figures there."""
        found: dict[str, Figures] = {}
        for figures in (*list(self._kept.values())[-1:], *self._open.values()):
            found.update(figures)
        return found

    def curve(self, place: str, figure: str) -> list[tuple[int, float]]:
        """Return round → a figure of the models in one place, which may be no number."""
        points = [*self._kept.items(), *self._open.items()]
        return [(round_, figures[place][figure]) for round_, figures in points if figure in figures.get(place, {})]
