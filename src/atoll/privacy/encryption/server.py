"""The server's half of an encrypted sum: it collects, relays, adds up what it can't read, and compares what nodes opened.

`(own state, what came by node) -> (next state, what goes)`, one function a phase; who told its keys is gathered as for a
secure sum (`atoll.privacy.secagg.server.gather`), and so are the survivors' signatures. Needs no TenSEAL.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from atoll.errors import PrivacyError
from atoll.privacy.encryption.node import GIVEN
from atoll.privacy.encryption.update import Code
from atoll.privacy.secagg.packing import pack_set, pack_table, unpack_table
from atoll.privacy.secagg.server import Faults, Gathered, Relayed, members, read_all
from atoll.privacy.secagg.terms import enough

OPENERS = 2
"""Nodes whose opened sums must agree."""
_SPARE = 3
"""Nodes beyond these that may be lost before they answer."""


def relay(state: Gathered, inbox: Mapping[str, bytes]) -> tuple[Relayed, dict[str, bytes]]:
    """Return, by node, who gave their secrets, and those that are for it.

    Raises:
        PrivacyError: too few gave.
    """
    cohort, count = state.cohort, len(state.cohort.records)

    def read(node: str, data: bytes) -> dict[int, bytes]:
        rows = unpack_table(data, GIVEN, count)
        if rows.keys() != set(range(count)) - {cohort.places[node]}:
            raise PrivacyError(f"{len(rows)} secrets: one goes to each of the {count - 1} others")
        return rows

    tables, faults = read_all(members(cohort, inbox), read)
    by_place = {cohort.places[node]: rows for node, rows in tables.items()}
    givers = frozenset(by_place)
    enough(state.terms, cohort, givers, "gave their secrets")
    told = pack_set(givers, count)
    out = {cohort.records[to].node: told + pack_table({giver: by_place[giver][to] for giver in givers - {to}}) for to in givers}
    holders = {giver: givers - {giver} for giver in givers}
    return Relayed(state.terms, cohort, {**state.faults, **faults}, holders), out


def openers(state: Relayed) -> Sequence[str]:
    """Return which of those that signed are asked to open the sum: some by chance, who depends on all keys of the cohort."""
    places = sorted(
        state.signatures, key=lambda place: hashlib.sha256(state.cohort.digest + place.to_bytes(2, "little")).digest()
    )
    return [state.cohort.records[place].node for place in places[: OPENERS + _SPARE]]


def compare(inbox: Mapping[str, bytes], code: Code, added: int) -> tuple[bytes, Faults]:
    """Return what most nodes opened the sum of so many updates to, two at least; and which opened it to something else.

    Raises:
        PrivacyError: no two of them agree, or as many say something else.
    """
    answers = {node: data for node, data in sorted(inbox.items()) if code.holds(data, added)}
    alike = {node: [other for other in answers if code.agree(answers[node], answers[other])] for node in answers}
    chosen = max(alike, key=lambda node: len(alike[node]), default=None)
    if chosen is None or len(alike[chosen]) < OPENERS or 2 * len(alike[chosen]) <= len(inbox):
        raise PrivacyError(
            f"of {len(inbox)} nodes that opened the sum no {OPENERS} agree on what is in it, or not most of them; "
            "the round can't be trusted"
        )
    wrong = inbox.keys() - set(alike[chosen])
    return answers[chosen], dict.fromkeys(sorted(wrong), "opened the sum to other numbers than the others")
