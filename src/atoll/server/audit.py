"""Checking a run's record without its server: against itself, against the store, and against what nodes were shown."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from atoll.chain import Noted, attested, read, signed
from atoll.errors import AtollError, AuditError
from atoll.keys import Identity
from atoll.server import entries
from atoll.store import RoundRow, RunRow, UpdateRow
from atoll.store.ledger import Ledger, Seen
from atoll.store.sql import SqlStore


class Audited(NamedTuple):
    """What was checked and found good: entries, rounds and nodes, signed by which key; and heads in how many ledgers."""

    run: str
    key: str
    entries: int
    rounds: int
    nodes: int
    ledgers: int
    heads: int


def verify(directory: Path, store: SqlStore, run: RunRow, ledgers: Sequence[Path] = ()) -> Audited:
    """Check the record of a run.

    Args:
        directory: of the store.
        store: its history.
        run: which run.
        ledgers: the directories of nodes that took part.

    Raises:
        AuditError: something was altered, cut or forked: what, and where.
    """
    while True:
        run, links = store.find(run.run), store.links(run.run)
        said = read(links, run.run, run.plan_digest)
        wrong = next(_against_store(store, run, said), None)
        if wrong is None or store.links(run.run) == links:
            break  # else a server wrote between one look and the other
    if wrong:
        raise AuditError(f"run {run.run}: {wrong}")
    key = str(said[0]["key"])
    _same_key(directory, run.run, key)
    heads = sum(_against_ledger(place, run, links, said) for place in ledgers)
    rounds = sum(one["what"] == "closed" for one in said)
    return Audited(run.run, key, len(links), rounds, len(_admitted(said)), len(ledgers), heads)


def _same_key(directory: Path, run: str, key: str) -> None:
    path = directory / "server.key"
    if path.exists() and (found := Identity.at(path).public.hex()) != key:
        raise AuditError(f"run {run}: its record is signed by key {key[:12]}, but {path} is key {found[:12]}")


def _admitted(said: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    return {one["node"]: (one["name"], one["key"]) for one in said if one["what"] == "admitted"}


def _against_store(store: SqlStore, run: RunRow, said: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield where the store says something else than the record."""
    first = said[0]
    if hashlib.sha256(run.plan.encode()).hexdigest() != run.plan_digest:
        yield "the stored plan is not the one that its digest names"
    for name, stored in (("name", run.name), ("plan", run.plan_digest), ("initial", run.initial)):
        if first[name] != stored:
            yield f"{name} {stored} is stored, but the record says {first[name]}"
    stored_nodes = {row.node: (row.name, row.key) for row in store.nodes(run.run)}
    for node, _ in sorted(stored_nodes.items() ^ _admitted(said).items()):
        yield f"node {node}: its name or key, or that it was admitted at all, is stored otherwise than the record says"
    updates, before = store.updates(run.run), first.get("closed")
    yield from _rounds([row for row in store.rounds(run.run) if row.round > (before or 0)], updates, said)
    yield from _refusals(updates, said, 0 if before is None else before + 2)
    yield from _course(run, said)


def _rounds(stored: Sequence[RoundRow], updates: Sequence[UpdateRow], said: Sequence[dict[str, Any]]) -> Iterator[str]:
    rounds = {row.round: row for row in stored}
    closed = {one["round"]: one for one in said if one["what"] == "closed"}
    for number in sorted(rounds.keys() - closed.keys()):
        yield f"round {number} is stored, but the record doesn't know it: the record was cut, or the round was added"
    for number, one in sorted(closed.items()):
        if number not in rounds:
            yield f"round {number} is in the record, but not in the store: it was removed there"
            continue
        row = rounds[number]
        mine = [update for update in updates if (update.counted, update.status) == (number, "accepted")]
        told = entries.closed(row, mine)
        for name in ("model", "state", "attempt", "accepted", "rows"):
            if told[name] != one[name]:
                which = {"accepted": "accepted updates", "rows": "weights, metrics, sizes or times"}.get(name, name)
                yield f"round {number}: {which} stored otherwise than the record says"


def _refusals(updates: Sequence[UpdateRow], said: Sequence[dict[str, Any]], first: int) -> Iterator[str]:
    """Compare what doesn't count, from a round on: the refusals of earlier ones may have come before the record began."""
    facts = ("round", "attempt", "node", "status", "reason", "digest", "bytes", "norm", "offence")
    stored = (entries.refused(row) for row in updates if row.status != "accepted" and row.round >= first)
    told = (one for one in said if one["what"] == "refused" and one["round"] >= first)
    came, told_of = (Counter[tuple[Any, ...]](tuple(map(one.get, facts)) for one in which) for which in (stored, told))
    for one in sorted((came - told_of) + (told_of - came), key=repr):
        where = "record" if came[one] > told_of[one] else "store"
        yield f"round {one[0]}: that node {one[2]}'s update was {one[3]} ({one[4][:80]}) is missing or altered in the {where}"


def _course(run: RunRow, said: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Compare the round that was last begun, and the end; a server may have died between telling of the end and storing it."""
    opened = [one for one in said if one["what"] == "opened"]
    last = opened and {name: opened[-1][name] for name in ("round", "attempt", "cohort", "late") if name in opened[-1]}
    if opened and last != run.opened:
        yield f"round {opened[-1]['round']}: who was asked is stored otherwise than the record says"
    *_, end = [one for one in said if one["what"] in ("begun", "opened", "ended")]
    if run.outcome != "running" and (end.get("outcome"), end.get("reason")) != (run.outcome, run.reason):
        yield f"that it {run.outcome} ({run.reason[:80]}) is stored, but the record doesn't end so: one of them was altered"


def _against_ledger(place: Path, run: RunRow, links: Sequence[Noted], said: Sequence[dict[str, Any]]) -> int:
    """Compare a node's ledger; return how many heads it holds."""
    if not (place / "ledger.sqlite").exists():
        raise AtollError(f"{place}: no ledger is there; name the directory of a node, its --dir")
    ledger = Ledger(place)
    try:
        heads = [one for one in ledger.heads() if one.run == run.run]
        left = [one for one in ledger.entries() if one["run"] == run.run]
    finally:
        ledger.close()
    if not heads:
        raise AtollError(f"{place}: its ledger holds no head of run {run.run}; name the directory of a node that took part")
    for one in sorted(heads, key=lambda head: head.number):
        if wrong := _head(one, run, links, str(said[0]["key"])):
            raise AuditError(f"run {run.run}: {place}: {wrong}")
    for wrong in _updates(left, said):
        raise AuditError(f"run {run.run}: {place}: {wrong}")
    return len(heads)


def _head(one: Seen, run: RunRow, links: Sequence[Noted], key: str) -> str | None:
    if not attested(one.key, one.signature, signed(one.run, one.plan, one.number, one.head)):
        return f"the ledger's head of entry {one.number} was altered: its signature doesn't fit"
    if (one.key, one.plan) != (key, run.plan_digest):
        return f"the node was shown a record of plan {one.plan[:12]} by key {one.key[:12]}, this one is by key {key[:12]}"
    if one.number > len(links):
        return f"the record was cut: it ends with entry {len(links)}, the node was shown entry {one.number}"
    if links[one.number - 1].head != one.head:
        return f"the record was rewritten, or is a fork: up to entry {one.number} it is not the one that the node was shown"
    return None


def _updates(left: Sequence[Mapping[str, Any]], said: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Compare what left a node and what it was told of it with what was folded."""
    closed = (one for one in said if one["what"] == "closed")
    folded = {(*(of or (one["round"], one["attempt"])), node, digest) for one in closed for node, digest, *of in one["accepted"]}
    mine = {(one["round"], one["attempt"], one["node"], one["digest"]): one["verdict"] for one in left}
    for what, verdict in sorted(mine.items()):
        if verdict is not None and (verdict == "accepted") != (what in folded):
            yield f"round {what[0]}: the node was told that its update {what[3][:12]} is {verdict}, the record says otherwise"
    nodes = {what[2] for what in mine}
    for what in sorted(one for one in folded if one[2] in nodes and one not in mine):
        yield f"round {what[0]}: the record has update {what[3][:12]} of the node, which its ledger doesn't"
