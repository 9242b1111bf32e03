"""Which strategy trains a cohort: the one that was named, or the fastest by a measurement on the first clients."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from atoll.errors import AtollError
from atoll.learner import Data
from atoll.simulate.clients import longest
from atoll.simulate.map import Job, Map, Strategy, Work
from atoll.vector import Groups

STRATEGIES = ("auto", "map", "scan", "vmap")
_SOON = 3.0
"""A run that `map` ends within so many seconds isn't worth compiling anything for."""
_SAMPLE = 16
"""Clients that each strategy is tried on."""


def named(
    name: str, brief: Groups, clients: Mapping[str, Data], workers: int | None, watch: Callable[[Any], None]
) -> Callable[[Work], Strategy]:
    """Return what makes the strategy of a run.

    Args:
        name: one of `STRATEGIES`.
        brief: the first model, to measure with.
        clients: all of them.
        workers: threads; None for as many as there are processors.
        watch: told what was measured.

    Raises:
        AtollError: no such strategy; or, when it is made, the learner can't be compiled.
    """
    if name not in STRATEGIES:
        raise AtollError(f"--strategy: '{name}' is none; it is one of {', '.join(STRATEGIES)}")
    if workers is not None and workers < 1:
        raise AtollError(f"--workers: {workers} is too few; take 1 or more, or leave it out for one a processor")
    return lambda work: _made(name, work, brief, clients, workers, watch)


def _made(
    name: str, work: Work, brief: Groups, clients: Mapping[str, Data], workers: int | None, watch: Callable[[Any], None]
) -> Strategy:
    able = "vmap" in work.learner.can
    if name in ("scan", "vmap") and not able:
        raise AtollError(f"--strategy {name}: a '{work.plan.model.kind}' learner can't be compiled together; take map")
    if name == "map" or not able:
        return Map(work)
    from atoll.simulate.vectorised import How, Vectorised

    def made(how: str) -> Strategy:
        return Vectorised(work, cast("How", how), workers or os.cpu_count() or 1, longest(clients))

    return made(name) if name != "auto" else _fastest(work, brief, clients, made, watch)


def _fastest(
    work: Work, brief: Groups, clients: Mapping[str, Data], made: Callable[[str], Strategy], watch: Callable[[Any], None]
) -> Strategy:
    """Try each strategy on some clients of a first round; its result is thrown away, so the run is that of the named strategy."""
    cohort = max(work.plan.cohort.minimum, math.ceil(work.plan.cohort.fraction * len(clients)))
    some = list(itertools.islice(clients, min(cohort, _SAMPLE)))
    simple = Map(work)
    _seconds(simple, brief, clients, some[:1])
    taken = {"map": _seconds(simple, brief, clients, some[:2])}
    if taken["map"] * cohort * work.plan.plan.rounds < _SOON:
        return simple
    found: dict[str, Strategy] = {"map": simple}
    for how in ("scan", "vmap"):
        found[how] = made(how)
        _seconds(found[how], brief, clients, some)
        taken[how] = _seconds(found[how], brief, clients, some)
    best = min(taken, key=lambda how: taken[how])
    watch({"what": "strategy", "strategy": best, "ms_per_client": {how: round(1e3 * took, 3) for how, took in taken.items()}})
    return found[best] if best == "map" else made(best)


def _seconds(tried: Strategy, brief: Groups, clients: Mapping[str, Data], names: list[str]) -> float:
    """Return what a client takes."""
    began = time.perf_counter()
    tried.train(Job(brief, 1, {name: ({}, clients[name]) for name in names}, judged=False))
    return (time.perf_counter() - began) / len(names)
