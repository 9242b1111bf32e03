"""What all parties of one secure sum know: its terms, and the cohort that the server shows to everybody.

The terms come from the plan and from the round that a node was asked to take part in; the cohort is what its nodes signed.
Every key, every signature and every encrypted share is bound to both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from atoll.errors import PlanError, PrivacyError
from atoll.keys import SEALED, SECRET, Exchange, derive, node_of, signed_by
from atoll.privacy.graph import Graph, graph
from atoll.privacy.secagg.packing import pack_set

LARGEST = 2048
"""Nodes in one secure sum: their keys fit into one message of 512 KiB."""
LEAST = 3
"""Nodes in any sum that is revealed: of two, each knows the other's share of it."""
SIGNATURE = 64
SHARES = 2 * SECRET + SEALED
"""Bytes of an encrypted pair of shares: of the key for masks, and of the self-mask's seed."""
RECORD = 4 * 32 + SIGNATURE
"""Bytes of one node in a cohort: signing key, key for masks, key for shares, hash of the self-mask's seed; signature of these."""


@dataclass(frozen=True)
class Terms:
    """Which sum this is and what it must withstand; the same for every party.

    Args:
        run, round, attempt: the one try of the one round; a repeated try has keys of its own.
        plan: the plan's digest, as hex.
        minimum: how many nodes' sum may be revealed, at least.
        dropout: the fraction of the cohort that may drop out.
        corrupt: how many nodes of the run, all in all, may work for the server.
        model: digest of the model that everybody was sent: who sent one node another than the rest could make the rest's
            updates vanish, and read that node's from the sum (Pasquini et al. 2022, "Eluding Secure Aggregation").
        roster: the only nodes' ids that may be in the cohort; None: whoever the server lets in, so that a server which
            makes nodes of its own isn't withstood.

    Raises:
        PlanError: the minimum is below 3.
    """

    run: str
    round: int
    attempt: int
    plan: str
    minimum: int
    dropout: float
    corrupt: int
    roster: frozenset[str] | None = None
    model: str = ""

    def __post_init__(self) -> None:
        if self.minimum < LEAST:
            raise PlanError(f"privacy: a secure sum of fewer than {LEAST} nodes hides nothing; the minimum is {self.minimum}")

    @cached_property
    def context(self) -> bytes:
        """What everything of this sum is bound to, 32 bytes; a roster may be one node's own, and isn't in it."""
        agreed = [self.run, self.round, self.attempt, self.plan, self.minimum, float(self.dropout), self.corrupt, self.model]
        return hashlib.sha256(b"atoll secagg v2 " + json.dumps(agreed).encode()).digest()


class Record(NamedTuple):
    """One node of a cohort: public keys, and the hash of its self-mask's seed."""

    key: bytes
    masks: bytes
    shares: bytes
    seed: bytes
    signature: bytes

    @property
    def signed(self) -> bytes:
        """What the signature covers, beside the terms."""
        return b"".join(self[:4])

    @property
    def node(self) -> str:
        """The node's id."""
        return node_of(self.key)


@dataclass(frozen=True)
class Cohort:
    """The nodes of a sum, by their ids' order; a node's place in it is its number.

    Args:
        records: one a node.
        graph: who holds shares, and how many are needed.
        digest: what this cohort under these terms is known by.
    """

    records: Sequence[Record]
    graph: Graph
    digest: bytes

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Each node's number, by its id."""
        return {record.node: place for place, record in enumerate(self.records)}


def check_record(terms: Terms, data: bytes) -> Record:
    """Return the record that a node sent.

    Raises:
        PrivacyError: it is none, or not signed for these terms.
    """
    if len(data) != RECORD:
        raise PrivacyError(f"keys of {len(data)} bytes: they take {RECORD}")
    record = Record(data[:32], data[32:64], data[64:96], data[96:128], data[128:])
    if not signed_by(record.key, record.signature, signed_keys(terms, record)):
        raise PrivacyError(f"node {record.node}: its keys are not signed by it for this round and try")
    return record


def signed_keys(terms: Terms, record: Record) -> bytes:
    """Return what a node signs of its keys."""
    return b"atoll secagg keys " + terms.context + record.signed


def read_cohort(terms: Terms, message: bytes, known: AbstractSet[Record] = frozenset()) -> Cohort:
    """Return the cohort that a server showed, once everything about it was checked.

    Args:
        terms: the sum's.
        message: the nodes' records, one after the other.
        known: records whose signatures were checked before, or made.

    Raises:
        PrivacyError: too few or too many nodes, one twice, one that the roster doesn't have, keys that aren't signed for
            these terms or are used twice.
    """
    count, rest = divmod(len(message), RECORD)
    if rest or not max(LEAST, terms.minimum) <= count <= LARGEST:
        raise PrivacyError(f"a cohort of {count} nodes: at least {terms.minimum} and at most {LARGEST} are summed securely")
    seen = {b"".join(record): record for record in known}
    rows = [message[place * RECORD : (place + 1) * RECORD] for place in range(count)]
    records = [seen.get(row) or check_record(terms, row) for row in rows]
    nodes = [record.node for record in records]
    if any(one >= other for one, other in pairwise(nodes)):
        raise PrivacyError("a cohort that names a node twice, or isn't in the order of ids")
    for kind in ("masks", "shares", "seed"):
        if len({getattr(record, kind) for record in records}) < count:
            raise PrivacyError("a cohort in which two nodes have the same key: one of them copied it")
    if terms.roster is not None and (strange := next((node for node in nodes if node not in terms.roster), None)):
        raise PrivacyError(f"node {strange} is not in the roster")
    try:
        made = graph(count, terms.dropout, terms.corrupt)
    except PlanError as error:
        raise PrivacyError(str(error)) from error
    return Cohort(records, made, hashlib.sha256(terms.context + message).digest())


def signed_survivors(cohort: Cohort, sharers: frozenset[int], survivors: frozenset[int]) -> bytes:
    """Return what a node signs of who shared secrets and who survived: one such set exists for each cohort."""
    count = len(cohort.records)
    return b"atoll secagg survivors " + cohort.digest + pack_set(sharers, count) + pack_set(survivors, count)


def enough(terms: Terms, cohort: Cohort, places: frozenset[int], what: str) -> None:
    """Check that so many are left that the sum may be revealed.

    Raises:
        PrivacyError: they aren't.
    """
    least = max(terms.minimum, cohort.graph.quorum)
    if len(places) < least:
        raise PrivacyError(f"only {len(places)} of {len(cohort.records)} nodes {what}: it takes {least}")


def check_signatures(cohort: Cohort, signatures: Mapping[int, bytes], message: bytes) -> None:
    """Check that each of some nodes signed a message.

    Raises:
        PrivacyError: one didn't.
    """
    for place, signature in signatures.items():
        if not signed_by(cohort.records[place].key, signature, message):
            raise PrivacyError(f"node {cohort.records[place].node}: its signature isn't one of these survivors")


def pair_key(cohort: Cohort, private: Exchange, place: int, other: int) -> bytes:
    """Return the key of the mask that two nodes share, from the private key of one.

    The lower number adds the mask, the other takes it off.

    Raises:
        PrivacyError: the other's key is none.
    """
    return private.agree(cohort.records[other].masks, b"mask " + bound(cohort, *sorted((place, other))))


def self_key(cohort: Cohort, seed: bytes) -> bytes:
    """Return the key of a node's self-mask."""
    return derive(seed, b"mask " + cohort.digest)


def share_key(cohort: Cohort, private: Exchange, other: int, direction: bytes) -> bytes:
    """Return the key that encrypts shares in one direction (see `bound`), from the private key of one end.

    Raises:
        PrivacyError: the other's key is none.
    """
    return private.agree(cohort.records[other].shares, b"shares " + direction)


def bound(cohort: Cohort, giver: int, holder: int) -> bytes:
    """Return what an encrypted share is bound to: the terms, the cohort, who gives it and who gets it."""
    return cohort.digest + giver.to_bytes(2, "little") + holder.to_bytes(2, "little")


def seed_hash(seed: bytes) -> bytes:
    """Return what a self-mask's seed is checked by, and not known from."""
    return hashlib.sha256(b"atoll secagg seed " + seed).digest()
