"""Which strategy trains a cohort: the one that was named, or the fastest by a measurement on the first clients."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from atoll.errors import AtollError
from atoll.learner import CAN, Data
from atoll.simulate.clients import longest
from atoll.simulate.map import Job, Map, Strategy, Work
from atoll.vector import Groups

if TYPE_CHECKING:
    from atoll.learner import How
    from atoll.simulate.ray import Cluster

STRATEGIES = ("auto", "map", "scan", "vmap", "pool")
_SOON = 3.0
"""A run that `map` ends within so many seconds isn't worth compiling anything for."""
_SAMPLE = 16
"""Clients that each strategy is tried on."""


class Hands(NamedTuple):
    """What a strategy may use.

    Args:
        workers: threads or processes; None for as many as there are processors.
        allow: the functions that a plan may name; None where the learner isn't one that a process could build itself.
        cluster: whose processes do the work, if not this machine's alone.
    """

    workers: int | None
    allow: Collection[str] | None
    cluster: Cluster | None = None


def named(
    name: str, brief: Groups, clients: Mapping[str, Data], hands: Hands, watch: Callable[[Any], None]
) -> Callable[[Work], Strategy]:
    """Return what makes the strategy of a run.

    Args:
        name: one of `STRATEGIES`.
        brief: the first model, to measure with.
        clients: all of them.
        hands: what it may use.
        watch: told what was measured.

    Raises:
        AtollError: no such strategy; or, when it is made, the learner isn't one for it.
    """
    if name not in STRATEGIES:
        raise AtollError(f"--strategy: '{name}' is none; it is one of {', '.join(STRATEGIES)}")
    if hands.workers is not None and hands.workers < 1:
        raise AtollError(f"--workers: {hands.workers} is too few; take 1 or more, or leave it out for one a processor")

    def made(how: str, work: Work) -> Strategy:
        return _made(how, work, clients, hands)

    return (lambda work: _fastest(work, brief, clients, hands, watch)) if name == "auto" else partial(made, name)


def cluster(backend: str, work: Work, hands: Hands) -> Cluster:
    """Return the cluster that `backend` names: "ray" for one of this machine, or "ray:" and the address of one that runs.

    Raises:
        AtollError: no such backend; Ray isn't installed; no cluster answers; or the learner isn't one for it.
    """
    kind, _, address = backend.partition(":")
    if kind != "ray":
        raise AtollError(f"--backend: '{backend}' is none; it is ray, or ray:HOST:PORT, or left out")
    if hands.allow is None:
        raise AtollError("--backend ray: its processes build the plan's learner themselves; leave learner= out")
    try:
        from atoll.simulate.ray import Cluster
    except ModuleNotFoundError as error:
        raise AtollError("--backend ray: Ray isn't installed; pip install 'atoll-fl[ray]'") from error

    return Cluster(address or None, work, hands.workers, hands.allow)


def _made(how: str, work: Work, clients: Mapping[str, Data], hands: Hands) -> Strategy:
    workers = hands.cluster.workers if hands.cluster else hands.workers or os.cpu_count() or 1
    if how in ("map", "pool") and hands.cluster:
        from atoll.simulate.ray import Apart

        return Apart(how, work, hands.cluster)
    if how == "map":
        return Map(work)
    if how == "pool":
        if hands.allow is None:
            raise AtollError("strategy pool: its processes build the plan's learner themselves; leave learner= out, or take map")
        from atoll.simulate.pool import Pool

        return Pool(work, workers, hands.allow)
    if work.plan.privacy.example_noise:
        raise AtollError(
            f"--strategy {how}: example_noise takes each row's gradient for itself, one client at a time; take pool or map"
        )
    if how not in work.learner.can:
        others = " or ".join([*({"vmap"} & work.learner.can), "pool", "map"])
        raise AtollError(f"--strategy {how}: a '{work.plan.model.kind}' learner can't {CAN[how]}; take {others}")
    from atoll.simulate.vectorised import Vectorised

    call = hands.cluster.call(cast("How", how)) if hands.cluster else None
    return Vectorised(work, cast("How", how), workers, longest(clients), call)


def _fastest(work: Work, brief: Groups, clients: Mapping[str, Data], hands: Hands, watch: Callable[[Any], None]) -> Strategy:
    """Try each strategy on some clients of a first round; results are thrown away, what the fastest one compiled is not."""
    cohort = max(work.plan.cohort.minimum, math.ceil(work.plan.cohort.fraction * len(clients)))
    some = list(itertools.islice(clients, min(cohort, _SAMPLE)))
    simple = Map(work)
    _seconds(simple, brief, clients, some[:1])
    taken = {"map": _seconds(simple, brief, clients, some[:2])}
    others: list[str] = [how for how in ("scan", "vmap") if how in work.learner.can and not work.plan.privacy.example_noise]
    if "scan" not in others and hands.allow is not None:
        others.append("pool")
    if not others or taken["map"] * cohort * work.plan.plan.rounds < _SOON:
        return simple
    made: dict[str, Strategy] = {"map": simple}
    for how in others:
        made[how] = _made(how, work, clients, hands)
        with suppress(AtollError):  # not every model of a learner goes side by side
            _seconds(made[how], brief, clients, some)
            taken[how] = _seconds(made[how], brief, clients, some)
    best = min(taken, key=lambda how: taken[how])
    for how in made.keys() - {best}:
        made[how].close()
    watch({"what": "strategy", "strategy": best, "ms_per_client": {how: round(1e3 * took, 3) for how, took in taken.items()}})
    return made[best]


def _seconds(tried: Strategy, brief: Groups, clients: Mapping[str, Data], names: list[str]) -> float:
    """Return what a client takes."""
    began = time.perf_counter()
    tried.train(Job(brief, 1, {name: ({}, clients[name]) for name in names}, judged=False))
    return (time.perf_counter() - began) / len(names)
