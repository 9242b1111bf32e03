"""What the store knows of a run that a server left behind, for another one to go on with."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from atoll.chain import Noted, read
from atoll.errors import StoreError
from atoll.keys import Identity
from atoll.learner import summary
from atoll.plan import Plan
from atoll.server.events import Past, Task
from atoll.server.offences import Conduct, length_of
from atoll.stopping import Course
from atoll.store import RunRow, UpdateRow
from atoll.store.sql import SqlStore
from atoll.wire import Address


def address_of(row: UpdateRow) -> Address:
    """Return what an update is addressed by."""
    return Address(row.run, row.round, row.attempt, row.node)


class Unfinished(NamedTuple):
    """A run that can go on.

    Args:
        row: the run.
        past: what the machine has to know.
        state: the digest of the newest state.
        accepted: the updates that made it.
        counted: node → the digest of its last update that became part of a model.
        refused: those that were found not to count.
        open: the updates that were asked for in rounds that are closed, and may come yet.
        last: the newest entry of its record.
    """

    row: RunRow
    past: Past
    state: str
    accepted: tuple[UpdateRow, ...]
    counted: Mapping[str, str]
    refused: frozenset[tuple[Address, str]]
    open: frozenset[Address]
    last: Noted | None


def unfinished(store: SqlStore, plan: Plan, identity: Identity) -> Unfinished:
    """Return the newest run of a plan that isn't done.

    Raises:
        StoreError: there is none, or its record is another server's.
        AuditError: its record isn't whole.
    """
    mine = [row for row in store.runs() if row.plan_digest == plan.digest]
    row = next((row for row in mine if row.outcome != "completed" and row.pruned is None), None)
    if row is None:
        there = f"the newest, {mine[0].run}, is {'pruned' if mine[0].pruned else mine[0].outcome}" if mine else "there is none"
        raise StoreError(f"no run of this plan can go on ({there}); without --resume a new one begins")
    links = store.links(row.run)
    if links and (key := str(read(links, row.run, plan.digest)[0]["key"])) != identity.public.hex():
        raise StoreError(f"run {row.run}: its record is signed by key {key[:12]}, but server.key is another: put that one back")
    rounds = store.rounds(row.run)
    closed, model, state = (rounds[-1].round, rounds[-1].model, rounds[-1].state) if rounds else (0, row.initial, None)
    updates = store.updates(row.run)
    accepted = tuple(one for one in updates if one.status == "accepted" and one.counted == closed)
    refused = frozenset((address_of(one), one.digest) for one in updates if one.status != "accepted")
    opened = row.opened or {}
    decided = {address_of(one) for one in updates if one.status == "accepted" or one.round <= closed}
    tasks = still_open(row.run, opened, [row.initial, *(one.model for one in rounds)], decided)
    past = Past(
        closed=closed,
        attempt=opened.get("attempt", 1) if opened.get("round") == closed + 1 else 1,
        tasks=tasks,
        names={one.node: one.name for one in store.nodes(row.run)},
        model=model,
        course=_course(store, plan, row.run, closed),
        answered=tuple(one.node for one in accepted),
        conduct=conduct_of(plan, updates),
    )
    late = frozenset(Address(row.run, *task[:2], node) for node, task in tasks.items() if task.round <= closed)
    counted = {one.node: one.digest for one in updates if one.status == "accepted"}  # they come by round
    return Unfinished(row, past, state or row.initial, accepted, counted, refused, late, links[-1] if links else None)


def still_open(run: str, opened: Mapping[str, Any], models: Sequence[str], decided: Collection[Address]) -> dict[str, Task]:
    """Return what nodes were asked for and are still to give: node → task.

    Args:
        run: which run.
        opened: the round that was last begun, as the store has it.
        models: the initial one, and those of the closed rounds.
        decided: updates that count, and of closed rounds those that were refused or declined.
    """
    asked = dict.fromkeys(opened.get("cohort", ()), (opened.get("round", 0), opened.get("attempt", 0)))
    asked |= {node: (round_, attempt) for node, (round_, attempt) in opened.get("late", {}).items()}
    return {
        node: Task(round_, attempt, models[round_ - 1], 0.0)
        for node, (round_, attempt) in asked.items()
        if Address(run, round_, attempt, node) not in decided
    }


def conduct_of(plan: Plan, updates: Sequence[UpdateRow]) -> Conduct:
    """How nodes behaved, as the server that left saw it: the rounds' lengths, and every offence in its turn."""
    conduct = Conduct()
    for _, mine in itertools.groupby(updates, lambda one: one.counted):
        lengths = []
        for one in mine:
            if one.offence:
                conduct = conduct.offended(plan.checks, address_of(one))
            elif one.status == "accepted" and (length := length_of(plan, one.norm, one.weight, one.round)):
                lengths.append(length)
        conduct = conduct.closed(lengths)
    return conduct


def _course(store: SqlStore, plan: Plan, run: str, closed: int) -> Course:
    """How the models did, as the server that left saw it: by its holdout, or else by the nodes that trained in the round."""
    found = {(row.round, row.place): summary(row.metrics) for row in store.evaluations(run)}
    course = Course()
    for round_ in range(1, closed + 1):
        course = course.after(plan.stopping, found.get((round_, "holdout")) or found.get((round_ - 1, "nodes"), {}))
    return course
