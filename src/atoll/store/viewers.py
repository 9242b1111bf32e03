"""Who may look at a server's runs, and who may act on them: tokens, of which only the hash is kept.

Everybody may look, until the first token is made; nobody may act but by an operator's.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Literal, NamedTuple

from sqlalchemy import Column, Float, Integer, MetaData, String, Table, insert, select, update

from atoll.errors import RefusedError
from atoll.keys import new_token
from atoll.store.database import Database

_TABLES = MetaData()
_VIEWERS = Table(
    "viewers", _TABLES, Column("id", Integer, primary_key=True), Column("name", String), Column("hash", String),
    Column("added", Float), Column("revoked", Float), Column("role", String),
)  # fmt: skip
_HERE = _VIEWERS.c.revoked.is_(None)
Role = Literal["viewer", "operator"]


class Person(NamedTuple):
    """Who has a token: what is kept of it, since when (seconds since the epoch), and whether they only look."""

    name: str
    hash: str
    added: float
    role: Role


def hash_of(token: str) -> str:
    """Return what is kept of a token: its SHA-256; it has too many bits for a list of guesses."""
    return hashlib.sha256(token.encode()).hexdigest()


class Viewers:
    """The list of who may look, in a server's store.

    Args:
        directory: of the store, made when missing.

    Raises:
        StoreError: see `Database`; every method raises it too where the database fails.
    """

    def __init__(self, directory: Path) -> None:
        self._base = Database(directory, "viewers.sqlite", _TABLES)

    def close(self) -> None:
        """Let go of the database."""
        self._base.close()

    def add(self, name: str, role: Role = "viewer") -> str:
        """Add somebody, and return the token: this once.

        Raises:
            RefusedError: the name is there.
        """
        token = new_token()
        with self._base.begin() as base:
            if base.scalar(select(_VIEWERS.c.id).where(_VIEWERS.c.name == name, _HERE)) is not None:
                raise RefusedError(f"'{name}' has a token already; for a new one first `atoll viewers revoke {name}`")
            base.execute(insert(_VIEWERS).values(name=name, hash=hash_of(token), added=time.time(), role=role))
        return token

    def revoke(self, name: str) -> None:
        """Let somebody look no more.

        Raises:
            RefusedError: there is no such name.
        """
        with self._base.begin() as base:
            if not base.execute(update(_VIEWERS).where(_VIEWERS.c.name == name, _HERE).values(revoked=time.time())).rowcount:
                known = ", ".join(base.scalars(select(_VIEWERS.c.name).where(_HERE)))
                raise RefusedError(f"there is no viewer '{name}'; there are: {known or 'none'}")

    def all(self) -> list[Person]:
        """Return who has a token that is good, the oldest first."""
        c = _VIEWERS.c
        with self._base.begin() as base:
            rows = base.execute(select(c.name, c.hash, c.added, c.role).where(_HERE).order_by(c.id)).all()
            return [Person(name, hashed, added, role or "viewer") for name, hashed, added, role in rows]

    def known(self) -> dict[str, Person] | None:
        """Return who has a token that is good, by its hash; None where nobody was ever added: nobody is asked."""
        with self._base.begin() as base:
            if base.scalar(select(_VIEWERS.c.id).limit(1)) is None:
                return None
        return {one.hash: one for one in self.all()}
