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
        seconds: by phase and side, as `"node keys"`: each call's.
        sent, received: bytes of messages to and from one node at most, masked updates not counted.
    """

    parts: list[Words]
    survivors: list[str]
    faults: Mapping[str, str]
    seconds: Mapping[str, list[float]]
    sent: int
    received: int


def secure_sum(
    terms: Terms,
    identities: Sequence[Identity],
    updates: Mapping[str, Sequence[Words]],
    lost: Mapping[str, Collection[str]] | None = None,
    threads: int | None = None,
) -> Summed:
    """Run every phase once, and return the sum of the survivors' updates.

    Args:
        terms: the sum's.
        identities: the nodes that are asked.
        updates: by node, its update in parts; masked in place.
        lost: by phase of `PHASES`, the nodes that drop out before they send.
        threads: see `atoll.privacy.masks.apply`.

    Raises:
        PrivacyError: too few are left; nothing was revealed.
    """
    who = {identity.node: identity for identity in identities}
    lost = lost or {}
    seconds: dict[str, list[float]] = defaultdict(list)
    sent: dict[str, int] = defaultdict(int)
    received: dict[str, int] = defaultdict(int)

    def timed(what: str, act: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = act()
        seconds[what].append(time.perf_counter() - began)
        return result

    def ask(phase: str, alive: Collection[str], act: Callable[[str], T]) -> dict[str, T]:
        return {one: timed(f"node {phase}", lambda one=one: act(one)) for one in sorted(alive) if one not in lost.get(phase, ())}  # type: ignore[misc]

    def letters(replies: Mapping[str, tuple[object, bytes]]) -> dict[str, bytes]:
        for one, (_, letter) in replies.items():
            sent[one] += len(letter)
        return {one: letter for one, (_, letter) in replies.items()}

    def deliver(messages: Mapping[str, bytes]) -> None:
        for one, message in messages.items():
            received[one] += len(message)

    told = ask("keys", who, lambda one: node.advertise(terms, who[one]))
    gathered, cohort = timed("server keys", lambda: server.gather(terms, letters(told)))
    deliver(dict.fromkeys(gathered.cohort.places, cohort))
    shared = ask("shares", gathered.cohort.places, lambda one: node.share(told[one][0], cohort))
    relayed, tables = timed("server shares", lambda: server.relay(gathered, letters(shared)))
    deliver(tables)
    masked = ask("masked", tables, lambda one: node.mask(shared[one][0], tables[one], updates[one], threads))
    total = _add([updates[one] for one in masked])
    closed, survivors = timed("server masked", lambda: server.close(relayed, masked))
    deliver(dict.fromkeys(masked, survivors))
    signed = ask("survivors", masked, lambda one: node.confirm(masked[one], survivors, who[one]))
    proven, proof = timed("server survivors", lambda: server.prove(closed, letters(signed)))
    deliver(dict.fromkeys(signed, proof))
    given = ask("unmask", signed, lambda one: (None, node.unmask(signed[one][0], proof)))
    faults = timed("server unmask", lambda: server.unmask(proven, letters(given), total, threads))
    return Summed(total, sorted(masked), {**proven.faults, **faults}, seconds, max(sent.values()), max(received.values()))


def _add(updates: Sequence[Sequence[Words]]) -> list[Words]:
    total = [np.zeros_like(part) for part in updates[0]]
    for parts in updates:
        for whole, part in zip(total, parts, strict=True):
            np.add(whole, part, out=whole)
    return total
