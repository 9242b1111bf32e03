"""Strategy `map`: clients train one after the other, in this process; bit for bit what a deployed run computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from atoll import algorithms
from atoll.algorithms import Algorithm, Memory
from atoll.errors import AtollError
from atoll.learner import Data, Learner, Rows
from atoll.plan import Plan
from atoll.vector import Groups, Metrics, Update

Answer = tuple[Memory, Update] | AtollError
"""What a client's work gives: its new memory and its update, or why nothing will come from it."""


class Job(NamedTuple):
    """What a cohort is to do in one round.

    Args:
        brief: what the server sends.
        round: its number.
        clients: name → memory and rows.
        judged: whether each client judges the model as received, too.
    """

    brief: Groups
    round: int
    clients: Mapping[str, tuple[Memory, Data]]
    judged: bool


class Work(NamedTuple):
    """What stays the same from round to round."""

    plan: Plan
    algorithm: Algorithm
    learner: Learner


class Strategy(Protocol):
    """How a cohort's work is executed. The same answers whatever the number of workers."""

    @property
    def name(self) -> str:
        """What it is called in plans' records."""
        ...

    @property
    def said(self) -> str:
        """What a person should know of how it went; empty where nothing."""
        ...

    def ready(self, holdout: Rows | None) -> None:
        """Begin a run, whose holdout this is if it has one; what came before, such as a measurement, is no part of it."""
        ...

    def train(self, job: Job) -> dict[str, Answer]:
        """Do a cohort's work: name → what came of it."""
        ...

    def judge(self, model: Groups, parts: Sequence[Rows]) -> list[Metrics]:
        """Judge a model by many clients' rows: the sums of each."""
        ...

    def close(self) -> None:
        """Let go of threads, processes and files."""
        ...


class Map:
    """One client at a time."""

    name, said = "map", ""

    def __init__(self, work: Work) -> None:
        self._work = work

    def ready(self, holdout: Rows | None) -> None:
        """See `Strategy.ready`."""

    def train(self, job: Job) -> dict[str, Answer]:
        """See `Strategy.train`."""
        return {name: one(self._work, job, name) for name in job.clients}

    def judge(self, model: Groups, parts: Sequence[Rows]) -> list[Metrics]:
        """See `Strategy.judge`."""
        return [self._work.learner.evaluate(model, rows) for rows in parts]

    def close(self) -> None:
        """See `Strategy.close`."""


def one(work: Work, job: Job, name: str) -> Answer:
    """Do one client's work, as its node would."""
    memory, data = job.clients[name]
    try:
        if job.judged:
            return algorithms.work(*work, job.brief, memory, data, job.round, name)
        return algorithms.train(*work, job.brief, memory, data.train, job.round, name)
    except AtollError as error:
        return error
