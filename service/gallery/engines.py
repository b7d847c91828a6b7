"""The two engines under everything that is kept: SQLite in a file, PostgreSQL by URL.

In: a path or a URL. Out: SQLAlchemy engines that are as durable as they can be, and their errors
as StorageError. See service.gallery.database for why SQLite keeps a rollback journal.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.gallery.protocol import GalleryError, StorageError

BUSY_TIMEOUT_S = 30  # how long SQLite waits for another connection
CONNECT_TIMEOUT_S = 5
# PostgreSQL: what is stuck longer is ended, so that it fails and is reported.
STATEMENT_TIMEOUT_S = 120
LOCK_TIMEOUT_S = 30


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """A block whose database errors become StorageError, beginning with `what`."""
    try:
        yield
    # A damaged file may make SQLite say things that are no text.
    except (sa.exc.DBAPIError, sqlite3.Error, psycopg.Error, UnicodeDecodeError) as error:
        said = str(getattr(error, "orig", error)).strip()
        cause = "; ".join(line.strip() for line in said.splitlines())
        full = "full" in cause or "No space left" in cause
        raise StorageError(f"{what}: {cause}", full=full) from error
    except sa.exc.TimeoutError as error:  # every connection of the pool is taken
        raise StorageError(f"{what}: {error}", full=False) from error


def sqlite_engine(path: Path) -> sa.Engine:
    """An engine on a file; transactions of `immediate` connections write from their begin."""
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
        pool_size=4,
        max_overflow=-1,  # bounded by the threads that there are
    )

    @sa.event.listens_for(engine, "connect")
    def _prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # we begin ourselves, see below
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("PRAGMA synchronous=EXTRA")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A transaction that reads first and writes later could find another writer in between.
        immediate = connection.get_execution_options().get("immediate", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def postgresql_engine(text: str) -> sa.Engine:
    """An engine on a postgresql:// URL; connects to nothing yet.

    Raises:
        GalleryError: it is no such URL.
    """
    try:
        url = sa.make_url(text)
    except (sa.exc.ArgumentError, ValueError):
        raise GalleryError("the database URL cannot be read; wanted " + _WANTED_URL) from None
    if url.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise GalleryError(
            f"the database URL begins with {url.drivername}://; wanted {_WANTED_URL}"
        )
    limits = {
        "statement_timeout": STATEMENT_TIMEOUT_S,
        "lock_timeout": LOCK_TIMEOUT_S,
        "idle_in_transaction_session_timeout": STATEMENT_TIMEOUT_S,
    }
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "application_name": "invprop",
            "options": " ".join(f"-c {name}={value}s" for name, value in limits.items()),
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 15_000,  # milliseconds
        },
        pool_size=4,
        max_overflow=16,
        pool_pre_ping=True,  # a database that was restarted is found again at once
    )

    @sa.event.listens_for(engine, "connect")
    def _prepare(connection: Any, _: Any) -> None:
        with connection.cursor() as cursor:
            (synchronous,) = cursor.execute("SHOW synchronous_commit").fetchone()
            if synchronous == "off":  # stronger choices than `on` are left alone
                cursor.execute("SET synchronous_commit TO on")
        connection.commit()

    return engine


_WANTED_URL = "postgresql://USER:PASSWORD@HOST:PORT/NAME (in INVPROP_DATABASE)"
