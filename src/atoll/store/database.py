"""Opening a database: SQLite in a directory, or any SQLAlchemy URL; one line for whatever goes wrong."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, event, insert, inspect, select, text, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from atoll.errors import StoreError, UnwritableError

SCHEMA = 11
"""The version of the tables: an older store gets the columns and indexes it lacks, one of a newer version is not touched."""
MEMORY = "sqlite://"


class Database:
    """An open database with a set of tables.

    Args:
        place: a directory, made when missing; or a database URL.
        file: the name of the SQLite file in a directory.
        tables: what it holds.
        cache: how much of a SQLite file may stay in memory, in KiB.

    Raises:
        StoreError: it can't be opened, isn't a database, or is one of a newer version.
    """

    def __init__(self, place: str | Path, file: str, tables: MetaData, cache: int = 2000) -> None:
        self.place = str(place)
        self._held = threading.local()
        version = tables.tables.get("schema")
        self._version = Table("schema", tables, Column("version", Integer)) if version is None else version
        with self._told():
            self._engine = _engine(place, file, cache)
            tables.create_all(self._engine)
        with self.begin() as connection:
            found = connection.scalar(select(self._version.c.version))
            if found is None:
                connection.execute(insert(self._version).values(version=SCHEMA))
            elif found < SCHEMA:
                _add_what_lacks(connection, tables)
                connection.execute(update(self._version).values(version=SCHEMA))
        if found is not None and found > SCHEMA:
            raise StoreError(f"{self.place}: made by a newer Atoll (schema {found}, this one knows {SCHEMA}); upgrade Atoll")

    @contextlib.contextmanager
    def begin(self) -> Iterator[Connection]:
        """Open a transaction: all of it is stored at the end, or nothing.

        Raises:
            StoreError: the database can't do it (a full disk, a lock, a damaged file).
        """
        if (held := getattr(self._held, "connection", None)) is not None:
            yield held
            return
        with self._told(), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make one transaction of all that this thread opens inside the block: many small ones cost a sync each.

        Raises:
            StoreError: as `begin`; nothing of it is stored then.
        """
        with self.begin() as connection:
            self._held.connection = connection
            try:
                yield
            finally:
                self._held.connection = None

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{self.place}: can't be a store ({error.strerror}); choose another --store") from error
        except ValueError as error:
            raise StoreError(f"{self.place}: the store failed ({error}): the file is damaged, or was altered") from error
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            kind = UnwritableError if isinstance(error, OperationalError) else StoreError
            raise kind(f"{self.place}: the store failed ({cause}); is the disk full, read-only or the file damaged?") from error


def _engine(place: str | Path, file: str, cache: int) -> Engine:
    if isinstance(place, str) and "://" in place:
        if place == MEMORY:
            return create_engine(place, poolclass=StaticPool, connect_args={"check_same_thread": False})
        return create_engine(place)
    directory = Path(place)
    directory.mkdir(parents=True, exist_ok=True)
    engine = create_engine(f"sqlite:///{directory / file}", connect_args={"timeout": 10})
    event.listen(engine, "connect", lambda connection, _: _careful(connection, cache))
    return engine


def _add_what_lacks(connection: Connection, tables: MetaData) -> None:
    for table in tables.tables.values():
        there = {column["name"] for column in inspect(connection).get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                kind = column.type.compile(connection.dialect)
                connection.execute(text(f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}"))
        for index in table.indexes:
            index.create(connection, checkfirst=True)


def _careful(connection: sqlite3.Connection, cache: int) -> None:
    """Readers beside one writer, and a commit that survives a power cut."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute(f"PRAGMA cache_size=-{cache}")
