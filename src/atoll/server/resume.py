"""What the store knows of a run that a server left behind, for another one to go on with."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from atoll.chain import Link, read
from atoll.errors import StoreError
from atoll.keys import Identity
from atoll.learner import summary
from atoll.plan import Plan
from atoll.server.events import Past
from atoll.server.offences import Conduct
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
        last: the newest entry of its record.
    """

    row: RunRow
    past: Past
    state: str
    accepted: tuple[UpdateRow, ...]
    counted: Mapping[str, str]
    refused: frozenset[tuple[Address, str]]
    last: Link | None


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
    accepted = tuple(one for one in updates if one.status == "accepted" and one.round == closed)
    refused = frozenset((address_of(one), one.digest) for one in updates if one.status != "accepted")
    opened = row.opened or {}
    begun = opened if opened.get("round") == closed + 1 else {}
    past = Past(
        closed=closed,
        attempt=begun.get("attempt", 1),
        cohort=tuple(begun.get("cohort", ())),
        names={one.node: one.name for one in store.nodes(row.run)},
        model=model,
        course=_course(store, plan, row.run, closed),
        answered=tuple(one.node for one in accepted),
        conduct=conduct_of(plan, updates),
    )
    counted = {one.node: one.digest for one in updates if one.status == "accepted"}  # they come by round
    return Unfinished(row, past, state or row.initial, accepted, counted, refused, links[-1] if links else None)


def conduct_of(plan: Plan, updates: Sequence[UpdateRow]) -> Conduct:
    """How nodes behaved, as the server that left saw it: the rounds' norms, and every offence in its turn."""
    conduct = Conduct()
    for _, mine in itertools.groupby(updates, lambda one: one.round):
        norms = []
        for one in mine:
            if one.offence:
                conduct = conduct.offended(plan.checks, address_of(one))
            elif one.status == "accepted" and one.norm is not None:
                norms.append(one.norm)
        conduct = conduct.closed(norms)
    return conduct


def _course(store: SqlStore, plan: Plan, run: str, closed: int) -> Course:
    """How the models did, as the server that left saw it: by its holdout, or else by the nodes that trained in the round."""
    found = {(row.round, row.place): summary(row.metrics) for row in store.evaluations(run)}
    course = Course()
    for round_ in range(1, closed + 1):
        course = course.after(plan.stopping, found.get((round_, "holdout")) or found.get((round_ - 1, "nodes"), {}))
    return course
