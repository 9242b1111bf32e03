"""Rows of a database, by one SELECT: streamed, and asked for again where the connection drops. No password in any message."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote, quote_plus

from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL, CursorResult, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from atoll.errors import DataError
from atoll.plan import Plan
from atoll.preprocess.batch import Batch, DroppedError, Source, rows_for
from atoll.preprocess.table import blocks_of, place, used

_PACKAGES = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient", "oracledb": "oracledb"}
"""Drivers whose package has another name than what is imported."""
_COMMENTS = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
_KNOWN = "postgresql+psycopg://user@host/base, mysql+pymysql://user@host/base, sqlite:///file.db"


def source(address: str, query: str, plan: Plan) -> Source:
    """Return the rows that a query gives.

    Args:
        address: a SQLAlchemy URL.
        query: one SELECT; its columns are those that the plan names.
        plan: whose `[data]` says what becomes of them.

    Raises:
        DataError: an address that is none, a driver that isn't installed, a query that is no SELECT.
    """
    url = _url(address)
    where = url.render_as_string(hide_password=True)
    names = used(plan.data, where)
    asked = _select(query)
    engine = _engine(url, where)
    return Source(where, lambda: blocks_of(_batches(engine, asked, names, where), plan.data))


def _url(address: str) -> URL:
    try:
        return make_url(address)
    except (ArgumentError, ValueError):
        # Not even shown in part: where it can't be taken apart, nobody knows which part is the password.
        raise DataError(f"--data: no address of a database; write it as one of {_KNOWN}") from None


def _select(query: str) -> str:
    if not query:
        raise DataError('--query: is missing: say what to read from the database, --query "SELECT …"')
    bare = _COMMENTS.sub(" ", query).strip().rstrip(";").strip()
    first = bare.lstrip("( \n\t").split(None, 1)[:1]
    if not first or first[0].upper() not in ("SELECT", "WITH"):
        raise DataError(f"--query: starts with '{first[0] if first else ''}': only a SELECT reads and changes nothing")
    if ";" in re.sub(r"'[^']*'|\"[^\"]*\"", "", bare):
        raise DataError("--query: is more than one statement; give one SELECT")
    return query.strip().rstrip(";")


def _engine(url: URL, where: str) -> Engine:
    name = url.get_backend_name()
    if name == "sqlite" and url.database not in (None, "", ":memory:") and not Path(str(url.database)).is_file():
        raise DataError(f"{where}: there is no file {url.database}; three slashes start a relative path, four an absolute one")
    try:
        return create_engine(url, poolclass=NullPool)
    except NoSuchModuleError:
        raise DataError(f"{where}: '{url.drivername}' is not known here; write {_KNOWN}, or install its dialect") from None
    except ModuleNotFoundError as error:
        package = _PACKAGES.get(str(error.name), error.name)
        raise DataError(f"{where}: its driver {error.name} is not installed; pip install '{package}'") from None
    except SQLAlchemyError as error:
        raise DataError(f"{where}: {_said(error, url)}") from None


def _batches(engine: Engine, query: str, names: Sequence[str], where: str) -> Generator[Batch, None, None]:
    step, at = rows_for(len(names)), 1
    try:
        with _asked(engine, query, step) as result:
            picks = [place(f"{where}: the query's answer", list(result.keys()), name) for name in names]
            for part in result.partitions(step):
                columns = zip(*part, strict=True)
                every = [[value.strip() if isinstance(value, str) else value for value in column] for column in columns]
                yield Batch(
                    {name: every[k] for name, k in zip(names, picks, strict=True)}, range(at, at + len(part)), f"{where}: row"
                )
                at += len(part)
    except DBAPIError as error:
        if error.connection_invalidated:
            raise DroppedError(f"{where}: the connection broke off at row {at} ({_said(error, engine.url)})") from None
        raise DataError(f"{where}: {_said(error, engine.url)}") from None
    except SQLAlchemyError as error:
        raise DataError(f"{where}: {_said(error, engine.url)}") from None
    finally:
        engine.dispose()


@contextlib.contextmanager
def _asked(engine: Engine, query: str, step: int) -> Iterator[CursorResult[tuple[object, ...]]]:
    """Ask in a transaction that is never committed, with a cursor on the database's side where it has such."""
    try:
        connection = engine.connect()
    except (OperationalError, InterfaceError) as error:
        raise DroppedError(f"{engine.url.render_as_string(hide_password=True)}: {_said(error, engine.url)}") from None
    with connection:
        if engine.dialect.name == "postgresql":
            connection = connection.execution_options(postgresql_readonly=True)
        elif engine.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA query_only = ON")
        yield connection.execution_options(stream_results=True, yield_per=step).execute(text(query))


def _said(error: Exception, url: URL) -> str:
    """Say what a driver said, in one line, without the statement, and without the password whatever it said."""
    said = " ".join(str(getattr(error, "orig", None) or error).split())
    for secret in (str(url.password), quote(str(url.password), ""), quote_plus(str(url.password))) if url.password else ():
        said = said.replace(secret, "***")
    return said
