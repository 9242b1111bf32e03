"""A record that can't be changed unseen: each entry is chained to all before it by a hash, and its head is signed.

Enters: plain facts, one entry at a time. Leaves: links, which can be checked by whoever has them and the signer's public key.
A head says nothing that could be taken from another record: run, plan and place are part of what is signed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atoll.errors import AuditError
from atoll.keys import Identity, signed_by

_KEY, _SIGNATURE = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{128}")


@dataclass(frozen=True)
class Noted:
    """An entry of a run's record in its place.

    Args:
        run: whose record.
        number: its place, from 1.
        entry: what happened, as canonical JSON.
        head: SHA-256 (hex) over the head before it and the entry.
        signature: of run, plan, number and head, by the server's key (hex).
    """

    run: str
    number: int
    entry: str
    head: str
    signature: str


def canonical(facts: Any) -> str:
    """Return plain values as the one JSON text that stands for them: sorted keys, no spaces, ASCII."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))


def signed(run: str, plan: str, number: int, head: str) -> bytes:
    """Return the bytes that the signature of a head covers."""
    return f"atoll head 1 {run} {plan} {number} {head}".encode()


def attested(key: str, signature: str, message: bytes) -> bool:
    """Say whether a signature (hex) of a message is that of a key (hex); only one spelling of it counts."""
    if not (_KEY.fullmatch(key) and _SIGNATURE.fullmatch(signature)):
        return False
    return signed_by(bytes.fromhex(key), bytes.fromhex(signature), message)


class Chain:
    """The record of a run, as its writer continues it.

    Args:
        identity: the server's.
        run, plan: what it is the record of.
        last: the newest link, of which another server may have written.
    """

    def __init__(self, identity: Identity, run: str, plan: str, last: Noted | None = None) -> None:
        self.key = identity.public.hex()
        self.last = last
        self._identity, self._run, self._plan = identity, run, plan

    def next(self, facts: Mapping[str, Any]) -> Noted:
        """Return the link that says `facts`; it is the newest only once it is stored, and `last` is set to it."""
        number = self.last.number + 1 if self.last else 1
        entry = canonical(facts)
        head = _head(self.last.head if self.last else _start(self._run, self._plan), entry)
        return Noted(self._run, number, entry, head, self._identity.sign(signed(self._run, self._plan, number, head)).hex())


def _start(run: str, plan: str) -> str:
    return hashlib.sha256(f"atoll record 1 {run} {plan}".encode()).hexdigest()


def _head(before: str, entry: str) -> str:
    return hashlib.sha256(bytes.fromhex(before) + entry.encode()).hexdigest()


def read(links: Sequence[Noted], run: str, plan: str) -> list[dict[str, Any]]:
    """Return what the entries of a record say; the first of them names the key that signs them all.

    Raises:
        AuditError: the record is not whole: which entry, and what is wrong with it.
    """
    if not links:
        raise AuditError(f"run {run}: it has no record: all of it was removed, or an Atoll without records made the run")
    said: list[dict[str, Any]] = []
    before, key = _start(run, plan), ""
    for place, link in enumerate(links, 1):
        where = f"run {run}: entry {place}"
        if link.number != place:
            raise AuditError(f"{where} is missing: number {link.number} stands in its place")
        if _head(before, link.entry) != link.head:
            raise AuditError(f"{where} was altered: its hash isn't the head that is stored with it")
        try:
            said.append(dict(json.loads(link.entry)))
        except (ValueError, TypeError, RecursionError) as error:
            raise AuditError(f"{where} is no JSON object") from error
        key = key or str(said[0].get("key"))
        if not attested(key, link.signature, signed(run, plan, place, link.head)):
            raise AuditError(f"{where}: the signature isn't that of key {key[:12]}: it was altered, or another server wrote it")
        before = link.head
    return said
