"""Whom a server lets in: names that an operator added, each bound to the key that first came with its token, until revoked.

A token is a one-time key: who joins with it signs the handshake by it, and it never leaves the node. Kept here is its
public half, so a store that is stolen lets nobody in. Nothing here, and the door is open.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Float, Integer, MetaData, String, Table, insert, select, update
from sqlalchemy.engine import Connection

from atoll.errors import RefusedError
from atoll.keys import Identity, new_token, node_of, signed_by
from atoll.store.database import Database

_TABLES = MetaData()
_ENROLLED = Table(
    "enrolled", _TABLES, Column("id", Integer, primary_key=True), Column("name", String, index=True), Column("token", String),
    Column("added", Float), Column("key", String, index=True), Column("joined", Float), Column("revoked", Float, index=True),
)  # fmt: skip


@dataclass(frozen=True)
class Enrolled:
    """A name that may join: `token` is the public half of its token, `key` the node's; times are seconds since the epoch."""

    id: int
    name: str
    token: str
    added: float
    key: str | None = None
    joined: float | None = None
    revoked: float | None = None

    @property
    def node(self) -> str | None:
        """The id of the node that joined by this name."""
        return node_of(bytes.fromhex(self.key)) if self.key else None

    @property
    def state(self) -> str:
        """How it stands, in a word."""
        return "revoked" if self.revoked else "joined" if self.key else "invited"


class Enrolment:
    """The list of who may join, in a server's store.

    Args:
        directory: of the store, made when missing.

    Raises:
        StoreError: see `Database`; every method raises it too where the database fails.
    """

    def __init__(self, directory: Path) -> None:
        self._base = Database(directory, "enrolment.sqlite", _TABLES)

    def close(self) -> None:
        """Let go of the database."""
        self._base.close()

    def add(self, name: str) -> str:
        """Add a name, and return its token: this once, since only its public half is kept.

        Raises:
            RefusedError: the name is there, and not revoked.
        """
        token = new_token()
        with self._base.begin() as base:
            if (there := _named(base, name)) and not there.revoked:
                raise RefusedError(f"'{name}' is {there.state} already; for a new token first `atoll nodes revoke {name}`")
            base.execute(insert(_ENROLLED).values(name=name, token=Identity.of(token).public.hex(), added=time.time()))
        return token

    def revoke(self, name: str) -> Enrolled:
        """Let a name in no more, and return what it was.

        Raises:
            RefusedError: there is no such name.
        """
        with self._base.begin() as base:
            there = _named(base, name)
            if there is None or there.revoked:
                known = ", ".join(one.name for one in _all(base) if not one.revoked)
                raise RefusedError(f"'{name}' is not enrolled; there are: {known or 'none'}")
            base.execute(update(_ENROLLED).where(_ENROLLED.c.id == there.id).values(revoked=time.time()))
        return there

    def all(self) -> list[Enrolled]:
        """Return every name that was ever added, the oldest first."""
        with self._base.begin() as base:
            return _all(base)

    def revoked(self, since: float = 0.0) -> frozenset[str]:
        """Return the ids of the nodes that were revoked since a time, but those that were added again."""
        c = _ENROLLED.c
        with self._base.begin() as base:
            gone = set(base.scalars(select(c.key).where(c.revoked >= since, c.key.is_not(None))))
            back = set(base.scalars(select(c.key).where(c.revoked.is_(None), c.key.in_(gone)))) if gone else set()
        return frozenset(node_of(bytes.fromhex(key)) for key in gone - back)

    def admit(self, name: str, key: bytes, proof: str, message: bytes) -> None:
        """Let a node in, or not; the first time its key is bound to the name.

        Args:
            name: what it calls itself.
            key: its public key, whose signature of the message was checked.
            proof: the message's signature by the token, in hex, or nothing.
            message: the bytes of its handshake.

        Raises:
            RefusedError: it may not come in.
        """
        c = _ENROLLED.c
        with self._base.begin() as base:
            if base.scalar(select(c.id).limit(1)) is None:
                return
            mine = _named(base, name)
            if mine is None:
                other = base.scalar(select(c.name).where(c.key == key.hex(), c.revoked.is_(None)))
                mend = f"its key is that of --name {other}" if other else f"its operator can `atoll nodes add {name}`"
                raise RefusedError(f"no node '{name}' is enrolled on this server; {mend}")
            if mine.revoked:
                raise RefusedError(f"the node '{name}' was revoked by the server's operator")
            if mine.key == key.hex():
                return
            if mine.key:
                raise RefusedError(f"the name '{name}' is bound to another key, and its token used; join with that key's --dir")
            if not proof:
                raise RefusedError(f"'{name}' joins for the first time: with the --token that `atoll nodes add {name}` showed")
            if not signed_by(bytes.fromhex(mine.token), bytes.fromhex(proof), message):
                raise RefusedError(f"the token is not the one that was made for '{name}'")
            bound = update(_ENROLLED).where(c.id == mine.id, c.key.is_(None)).values(key=key.hex(), joined=time.time())
            if not base.execute(bound).rowcount:  # another key came with the same token in this very moment
                raise RefusedError(f"the token of '{name}' was used already")


def _all(base: Connection) -> list[Enrolled]:
    return [_row(one) for one in base.execute(select(_ENROLLED).order_by(_ENROLLED.c.id)).mappings()]


def _named(base: Connection, name: str) -> Enrolled | None:
    """The newest of a name: it may have been revoked and added again."""
    query = select(_ENROLLED).where(_ENROLLED.c.name == name).order_by(_ENROLLED.c.id.desc()).limit(1)
    return next((_row(one) for one in base.execute(query).mappings()), None)


def _row(found: Any) -> Enrolled:
    return Enrolled(**found)
