"""A whole secure sum in one process: both halves, all nodes, and who drops out when. For simulation, benchmarks and tests."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from atoll.keys import Identity
from atoll.privacy.fixed import Words
from atoll.privacy.secagg import node, server
from atoll.privacy.secagg.terms import Terms

PHASES = ("keys", "shares", "masked", "survivors", "unmask")
"""What a node sends, in order; it can drop out before any of them."""
T = TypeVar("T")


class Summed(NamedTuple):
    """What a secure sum gave, and took.

    Args:
        parts: the sum of the survivors' updates.
        survivors: whose they are, by id.
        faults: what the server found wrong, by node.
        seconds: by phase, and by node or `"server"`: how long it took.
        sent, received: bytes of messages to and from one node at most, masked updates not counted.
    """

    parts: list[Words]
    survivors: list[str]
    faults: Mapping[str, str]
    seconds: Mapping[str, Mapping[str, float]]
    sent: int
    received: int


def secure_sum(
    terms: Terms,
    identities: Sequence[Identity],
    updates: Mapping[str, Sequence[Words]],
    lost: Mapping[str, Collection[str]] | None = None,
    threads: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Summed:
    """Run every phase once, and return the sum of the survivors' updates.

    Args:
        terms: the sum's.
        identities: the nodes that are asked.
        updates: by node, its update in parts; masked in place. Asked for once each, when its turn comes.
        lost: by phase of `PHASES`, the nodes that drop out before they send.
        threads: see `atoll.privacy.masks.apply`.
        clock: what time is measured with.

    Raises:
        PrivacyError: too few are left; nothing was revealed.
    """
    who = {identity.node: identity for identity in identities}
    lost = lost or {}
    seconds: dict[str, dict[str, float]] = defaultdict(dict)
    sent: dict[str, int] = defaultdict(int)
    received: dict[str, int] = defaultdict(int)

    def timed(phase: str, who: str, act: Callable[[], T]) -> T:
        began = clock()
        result = act()
        seconds[phase][who] = clock() - began
        return result

    def ask(phase: str, alive: Collection[str], act: Callable[[str], T]) -> dict[str, T]:
        return {one: timed(phase, one, lambda one=one: act(one)) for one in sorted(alive) if one not in lost.get(phase, ())}  # type: ignore[misc]

    def letters(replies: Mapping[str, tuple[object, bytes]]) -> dict[str, bytes]:
        for one, (_, letter) in replies.items():
            sent[one] += len(letter)
        return {one: letter for one, (_, letter) in replies.items()}

    def deliver(messages: Mapping[str, bytes]) -> None:
        for one, message in messages.items():
            received[one] += len(message)

    told = ask("keys", who, lambda one: node.advertise(terms, who[one]))
    gathered, cohort = timed("keys", "server", lambda: server.gather(terms, letters(told)))
    deliver(dict.fromkeys(gathered.cohort.places, cohort))
    shared = ask("shares", gathered.cohort.places, lambda one: node.share(told[one][0], cohort))
    relayed, tables = timed("shares", "server", lambda: server.relay(gathered, letters(shared)))
    deliver(tables)
    total: list[Words] = []

    def mask(one: str) -> node.Masked:
        parts = updates[one]
        state = timed("masked", one, lambda: node.mask(shared[one][0], tables[one], parts, threads))
        _add(total, parts)
        return state

    masked = {one: mask(one) for one in sorted(tables) if one not in lost.get("masked", ())}
    closed, survivors = timed("masked", "server", lambda: server.close(relayed, masked))
    deliver(dict.fromkeys(masked, survivors))
    signed = ask("survivors", masked, lambda one: node.confirm(masked[one], survivors, who[one]))
    proven, proof = timed("survivors", "server", lambda: server.prove(closed, letters(signed)))
    deliver(dict.fromkeys(signed, proof))
    given = ask("unmask", signed, lambda one: (None, node.unmask(signed[one][0], proof)))
    faults = timed("unmask", "server", lambda: server.unmask(proven, letters(given), total, threads))
    return Summed(total, sorted(masked), {**proven.faults, **faults}, seconds, max(sent.values()), max(received.values()))


def _add(total: list[Words], parts: Sequence[Words]) -> None:
    if not total:
        total.extend(np.zeros_like(part) for part in parts)
    for whole, part in zip(total, parts, strict=True):
        np.add(whole, part, out=whole)
