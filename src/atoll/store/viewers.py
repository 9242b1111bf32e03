"""Who may look at a server's runs: tokens, of which only the hash is kept. Everybody may, until the first is added."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from sqlalchemy import Column, Float, Integer, MetaData, String, Table, insert, select, update

from atoll.errors import RefusedError
from atoll.keys import new_token
from atoll.store.database import Database

_TABLES = MetaData()
_VIEWERS = Table(
    "viewers", _TABLES, Column("id", Integer, primary_key=True), Column("name", String), Column("hash", String),
    Column("added", Float), Column("revoked", Float),
)  # fmt: skip
_HERE = _VIEWERS.c.revoked.is_(None)


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

    def add(self, name: str) -> str:
        """Add somebody, and return the token: this once.

        Raises:
            RefusedError: the name is there.
        """
        token = new_token()
        with self._base.begin() as base:
            if base.scalar(select(_VIEWERS.c.id).where(_VIEWERS.c.name == name, _HERE)) is not None:
                raise RefusedError(f"'{name}' may look already; for a new token first `atoll viewers revoke {name}`")
            base.execute(insert(_VIEWERS).values(name=name, hash=hash_of(token), added=time.time()))
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

    def all(self) -> dict[str, float]:
        """Return who may look, and since when."""
        with self._base.begin() as base:
            return dict(
                base.execute(select(_VIEWERS.c.name, _VIEWERS.c.added).where(_HERE).order_by(_VIEWERS.c.id)).tuples().all()
            )

    def hashes(self) -> frozenset[str] | None:
        """Return the hashes of all tokens that are good; None where nobody was ever added, and so nobody is asked."""
        with self._base.begin() as base:
            if base.scalar(select(_VIEWERS.c.id).limit(1)) is None:
                return None
            return frozenset(base.scalars(select(_VIEWERS.c.hash).where(_HERE)))
