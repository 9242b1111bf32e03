"""What encrypted sums cost: seconds of a node, of the server and of a node that opens the sum, and bytes, for one round."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, ParamSpec, TypeVar

import numpy as np

from atoll.errors import AtollError
from atoll.keys import Identity, derive
from atoll.privacy import ckks
from atoll.privacy.encryption import node, server
from atoll.privacy.encryption.tag import Fingerprint
from atoll.privacy.encryption.update import FLOOD, RING, Code
from atoll.privacy.secagg import server as gathering
from atoll.privacy.secagg.terms import Terms
from atoll.vector import Group, Layout, Tensor, Update

_BATCH = 16
"""Ciphertexts at a time: 4 MB."""
P = ParamSpec("P")
T = TypeVar("T")


class _Watch:
    """Adds up how long things take, by name."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.seconds: dict[str, float] = defaultdict(float)

    def time(self, what: str, act: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
        began = self._now()
        result = act(*args, **more)
        self.seconds[what] += self._now() - began
        return result


def measure(nodes: int, parameters: int, dropout: float, corrupt: int, now: Callable[[], float]) -> dict[str, Any]:
    """Return a row for one encrypted sum; a few ciphertexts are held at a time.

    All nodes agree on a key; one encrypts, the server adds what it sent as often as there are nodes, and one opens the sum.

    Raises:
        AtollError: the opened sum isn't the plain one to 10⁻⁵, or TenSEAL is missing.
    """
    layout = Layout((Tensor("parameters", (parameters,)),))
    code = Code({"parameters": layout}, ("samples",), 1.0, 1.0, nodes)
    values = np.random.default_rng(0).normal(0, 0.05, parameters).astype(np.float32)
    watch, terms = _Watch(now), Terms("bench", 1, 0, "00" * 32, 3, dropout, corrupt)
    secret, letters = _agreed(terms, nodes, watch)
    key, scale = ckks.Key(RING, secret), ckks.room_for(RING, nodes)
    sent, offered, opened = Fingerprint(secret), Fingerprint(secret), []
    chunks = code.slots(Update({"parameters": Group(layout, values)}, 1.0, {"samples": 1.0}))
    flood = ckks.Flood(derive(secret, b"flood"), FLOOD)
    while batch := watch.time("node", _encrypted, key, islice(chunks, _BATCH), scale):
        watch.time("node", sent.add, np.array(batch))
        total = watch.time("server", _times, np.array(batch), nodes)
        watch.time("opening", offered.add, total)
        opened += watch.time("opening", _decrypted, key, total, scale, flood)
    answer = watch.time("opening", code.gather, opened, nodes)
    off = float(np.abs(np.frombuffer(answer, "<f4", offset=len(answer) - values.nbytes) / nodes - values).max())
    if off > 1e-5:
        raise AtollError(f"the opened sum is {off} off the plain one")
    size = sum(layout.nbytes for layout in code.protected.values())
    return {
        "guard": "ckks",
        "nodes": nodes,
        "parameters": parameters,
        "seconds": round(watch.seconds["node"] + min(watch.seconds[f"agreeing {place}"] for place in range(nodes)), 5),
        "server_seconds": round(watch.seconds["server"], 5),
        "open_seconds": round(watch.seconds["opening"], 5),
        "bytes_per_float": round((size + letters) / parameters, 4),
        "open_bytes_per_float": round((size + len(answer)) / parameters, 4),
        "error": off,
    }


def _agreed(terms: Terms, nodes: int, watch: _Watch) -> tuple[bytes, int]:
    """Let all nodes agree on a key, over the smallest of updates; return it, and the bytes of one node's messages."""
    layout = Layout((Tensor("parameters", (1,)),))
    code = Code({"parameters": layout}, (), 1.0, 1.0, nodes)
    who = [Identity.new() for _ in range(nodes)]

    def each(act: Callable[[Identity], T]) -> dict[str, T]:
        return {one.node: watch.time(f"agreeing {at}", act, one) for at, one in enumerate(who)}

    told = each(lambda one: node.advertise(terms, one))
    gathered, cohort = gathering.gather(terms, {one: letter for one, (_, letter) in told.items()})
    given = each(lambda one: node.give(told[one.node][0], cohort))
    relayed, tables = server.relay(gathered, {one: letter for one, (_, letter) in given.items()})
    update = Update({"parameters": Group(layout, np.zeros(1, np.float32))}, 1.0)
    states = each(lambda one: node.protect(given[one.node][0], tables[one.node], update, code))
    closed, shown = gathering.close(relayed, states)
    signed = each(lambda one: node.confirm(states[one.node][0], shown, one))
    _, proof = gathering.prove(closed, {one: letter for one, (_, letter) in signed.items()})
    first = who[0].node
    messages = (told[first][1], cohort, given[first][1], tables[first], shown, signed[first][1], proof)
    return states[first][0].secret, sum(map(len, messages))


def _times(words: ckks.Ciphertext, count: int) -> ckks.Ciphertext:
    total = words.copy()
    for _ in range(count - 1):
        np.add(total, words, out=total)
    return total


def _encrypted(key: ckks.Key, chunks: Iterable[ckks.Slots], scale: float) -> list[ckks.Ciphertext]:
    return list(ckks.encrypt(key, chunks, scale))


def _decrypted(key: ckks.Key, words: ckks.Ciphertext, scale: float, flood: ckks.Flood) -> list[ckks.Slots]:
    return list(ckks.decrypt(key, words, scale, flood))
