"""The server's half of a secure sum: it collects, relays, and takes off masks once the survivors gave what that needs.

`(own state, what came by node) -> (next state, what goes)`, one function a phase. A node whose message is missing or wrong
has dropped out, with its reason in the state's `faults`. When too few are left, the sum is abandoned, and nothing of it is
revealed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from atoll.errors import PrivacyError
from atoll.keys import SECRET, Exchange
from atoll.privacy.fixed import Words
from atoll.privacy.masks import apply
from atoll.privacy.secagg.packing import pack_set, pack_table, unpack_table
from atoll.privacy.secagg.terms import (
    SHARES,
    Cohort,
    Record,
    Terms,
    check_record,
    check_signatures,
    enough,
    pair_key,
    read_cohort,
    seed_hash,
    self_key,
    signed_survivors,
)
from atoll.privacy.shamir import recover

Faults = Mapping[str, str]
"""Why a node dropped out, by its id."""
T = TypeVar("T")


@dataclass(frozen=True)
class Gathered:
    """The cohort is known, and shown to all."""

    terms: Terms
    cohort: Cohort
    faults: Faults


@dataclass(frozen=True)
class Relayed:
    """Shares went to their holders.

    Args:
        holders: by node that gave shares, who holds them.
        survivors: whose updates are in the sum, once that is known.
        signatures: of the nodes that signed these.
    """

    terms: Terms
    cohort: Cohort
    faults: Faults
    holders: Mapping[int, frozenset[int]]
    survivors: frozenset[int] = frozenset()
    signatures: Mapping[int, bytes] = field(default_factory=dict)

    @property
    def sharers(self) -> frozenset[int]:
        """Who gave shares."""
        return frozenset(self.holders)


def gather(terms: Terms, inbox: Mapping[str, bytes]) -> tuple[Gathered, bytes]:
    """Return the cohort of all whose keys are right, as a message to all of them.

    Raises:
        PrivacyError: too few are.
    """
    probe = Exchange(bytes(SECRET))  # any key finds out the weak ones

    def read(node: str, data: bytes) -> Record:
        record = check_record(terms, data)
        probe.agree(record.masks, b"")
        probe.agree(record.shares, b"")
        if record.node != node:
            raise PrivacyError(f"keys of node {record.node}")
        if terms.roster is not None and node not in terms.roster:
            raise PrivacyError("not in the roster")
        return record

    records, faults = read_all(inbox, read)
    for kind in ("masks", "shares", "seed"):
        owners: dict[bytes, list[str]] = {}
        for node, record in records.items():
            owners.setdefault(getattr(record, kind), []).append(node)
        for node in (node for nodes in owners.values() if len(nodes) > 1 for node in nodes):
            faults[node] = "has the same key as another node"
    chosen = sorted(records.keys() - faults.keys())
    message = b"".join(b"".join(records[node]) for node in chosen)
    return Gathered(terms, read_cohort(terms, message, set(records.values())), faults), message


def relay(state: Gathered, inbox: Mapping[str, bytes]) -> tuple[Relayed, dict[str, bytes]]:
    """Return, by node, who gave shares, and the shares that are for it.

    Raises:
        PrivacyError: too few gave some.
    """
    cohort, count = state.cohort, len(state.cohort.records)

    def read(node: str, data: bytes) -> dict[int, bytes]:
        rows = unpack_table(data, SHARES, count)
        if len(rows) != cohort.graph.degree or cohort.places[node] in rows:
            raise PrivacyError(f"{len(rows)} shares: they go to {cohort.graph.degree} others")
        return rows

    tables, faults = read_all(members(cohort, inbox), read)
    by_place = {cohort.places[node]: rows for node, rows in tables.items()}
    sharers = frozenset(by_place)
    enough(state.terms, cohort, sharers, "gave shares")
    told = pack_set(sharers, count)
    for_holder: dict[int, dict[int, bytes]] = {place: {} for place in sharers}
    for giver, rows in by_place.items():
        for holder in rows.keys() & sharers:
            for_holder[holder][giver] = rows[holder]
    out = {cohort.records[place].node: told + pack_table(rows) for place, rows in for_holder.items()}
    holders = {giver: frozenset(rows) for giver, rows in by_place.items()}
    return Relayed(state.terms, cohort, {**state.faults, **faults}, holders), out


def close(state: Relayed, nodes: Iterable[str]) -> tuple[Relayed, bytes]:
    """Say whose masked updates are in the sum; the message goes to all of them.

    Raises:
        PrivacyError: too few are.
    """
    survivors = frozenset(state.cohort.places.get(node, -1) for node in nodes)
    if not survivors <= state.sharers:
        raise PrivacyError("an update of a node that gave no shares can't be read; leave it out")
    enough(state.terms, state.cohort, survivors, "sent an update")
    return replace(state, survivors=survivors), pack_set(survivors, len(state.cohort.records))


def prove(state: Relayed, inbox: Mapping[str, bytes]) -> tuple[Relayed, bytes]:
    """Return the signatures of the survivors by enough of them, as a message to those who signed.

    Raises:
        PrivacyError: too few signed.
    """
    cohort, signed = state.cohort, signed_survivors(state.cohort, state.sharers, state.survivors)

    def read(node: str, data: bytes) -> bytes:
        check_signatures(cohort, {cohort.places[node]: data}, signed)
        return data

    signatures, faults = read_all(members(cohort, inbox), read)
    by_place = {cohort.places[node]: signature for node, signature in signatures.items()}
    by_place = {place: by_place[place] for place in sorted(by_place.keys() & state.survivors)}
    quorum = cohort.graph.quorum
    if len(by_place) < quorum:
        raise PrivacyError(f"only {len(by_place)} of {len(state.survivors)} survivors signed: it takes {quorum}")
    message = pack_table(dict(list(by_place.items())[:quorum]))
    return replace(state, signatures=by_place, faults={**state.faults, **faults}), message


def unmask(state: Relayed, inbox: Mapping[str, bytes], parts: Sequence[Words], threads: int | None = None) -> Faults:
    """Take all masks off the sum of the survivors' updates, in place; return who gave what was wrong.

    Args:
        state: what `prove` returned.
        inbox: what the survivors gave, by node.
        parts: the sum modulo 2³² or 2⁶⁴ of just the survivors' masked updates.
        threads: see `atoll.privacy.masks.apply`.

    Raises:
        PrivacyError: too few gave what it takes, or too much of it is wrong; the parts are as they were.
    """
    cohort, count = state.cohort, len(state.cohort.records)

    def read(node: str, data: bytes) -> tuple[bytes, dict[int, bytes]]:
        place = cohort.places[node]
        rows = unpack_table(data[SECRET:], SECRET, count)
        if seed_hash(data[:SECRET]) != cohort.records[place].seed or any(place not in state.holders.get(of, ()) for of in rows):
            raise PrivacyError("a seed that isn't its own, or shares that it doesn't hold")
        return data[:SECRET], rows

    given, faults = read_all(members(cohort, inbox), read)
    answers = {cohort.places[node]: answer for node, answer in given.items() if cohort.places[node] in state.survivors}
    minus: list[bytes] = []
    plus: list[bytes] = []
    for place in sorted(state.survivors):
        seed = answers[place][0] if place in answers else _recover(state, answers, place, faults)
        minus.append(self_key(cohort, seed))
    for lost in sorted(state.sharers - state.survivors):
        private = Exchange(_recover(state, answers, lost, faults))
        for other in sorted(state.survivors):
            if other in state.holders[lost] or lost in state.holders[other]:
                (minus if other < lost else plus).append(pair_key(cohort, private, lost, other))
    apply(parts, plus, minus, threads)
    return faults


def _recover(state: Relayed, answers: Mapping[int, tuple[bytes, dict[int, bytes]]], place: int, faults: dict[str, str]) -> bytes:
    """Return a survivor's seed, or a lost node's private key for masks, from its holders' shares."""
    record = state.cohort.records[place]
    shares = {holder + 1: rows[place] for holder, (_, rows) in answers.items() if place in rows}
    if place in state.survivors:
        what, right = "seed", lambda secret: seed_hash(secret) == record.seed
    else:
        what, right = "key", lambda secret: Exchange(secret).public == record.masks
    try:
        secret, liars = recover(shares, state.cohort.graph.threshold, right)
    except PrivacyError as error:
        raise PrivacyError(f"the {what} of node {record.node}, which dropped out, can't be had: {error}") from error
    for liar in liars:
        faults[state.cohort.records[liar - 1].node] = f"gave a wrong share of the {what} of node {record.node}"
    return secret


def members(cohort: Cohort, inbox: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the messages of a cohort's nodes; others' are nobody's."""
    return {node: data for node, data in inbox.items() if node in cohort.places}


def read_all(inbox: Mapping[str, bytes], read: Callable[[str, bytes], T]) -> tuple[dict[str, T], dict[str, str]]:
    """Return what could be read of each node's message, and why the others couldn't."""
    good, faults = {}, {}
    for node, data in inbox.items():
        try:
            good[node] = read(node, data)
        except PrivacyError as error:
            faults[node] = str(error)
    return good, faults
