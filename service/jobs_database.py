"""The database of the jobs: SQLite in the state directory, or the PostgreSQL of the gallery.

In: a directory or a URL. Out: transactions on the tables of service.jobs_tables, and the time: with
PostgreSQL its own, which then counts for all hosts.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from service.gallery.engines import postgresql_engine, reported, sqlite_engine
from service.jobs_tables import metadata

FILE_NAME = "evaluations.sqlite3"
# Names the lock under which PostgreSQL makes the tables; any number that nobody else uses.
_MAKE_LOCK = 0x696E_7670_726F_7003


class JobsDatabase:
    """The connections; the tables are made when they are missing.

    Args:
        state: the state directory, where SQLite's file is kept.
        url: a postgresql:// URL in place of it.
        clock: seconds since 1970; PostgreSQL's own clock is used in place of it.

    Raises:
        StorageError: the database cannot be reached.
    """

    def __init__(self, state: Path, url: str | None, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._engine = postgresql_engine(url) if url else sqlite_engine(state / FILE_NAME)
        self._insert = postgresql.insert if url else sqlite.insert
        with self.transaction() as connection:
            if self.is_postgresql:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MAKE_LOCK)))
            metadata.create_all(connection)

    @property
    def is_postgresql(self) -> bool:
        """Whether several hosts may share it."""
        return self._engine.dialect.name == "postgresql"

    def insert(self, table: sa.Table) -> postgresql.Insert | sqlite.Insert:
        """An INSERT that may say what to do on a conflict: each of the two has its own."""
        return self._insert(table)

    def now(self, connection: sa.Connection) -> float:
        """Seconds since 1970."""
        if not self.is_postgresql:
            return self._clock()
        query = sa.select(sa.extract("epoch", sa.func.clock_timestamp()))
        return float(connection.scalar(query) or 0)

    @contextlib.contextmanager
    def transaction(self, *, writes: bool = True) -> Iterator[sa.Connection]:
        """All that is done in it, or nothing.

        Raises:
            StorageError: the database is away, or full.
        """
        options = {} if self.is_postgresql else {"immediate": writes}
        with (
            reported("the evaluations could not be read or changed"),
            self._engine.connect().execution_options(**options) as connection,
            connection.begin(),
        ):
            yield connection

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()
