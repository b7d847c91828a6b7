"""Where galleries are kept: one SQLite file in the state directory, or one PostgreSQL database.

In: a directory or a URL. Out: transactions, and the rows that say which galleries there are.
SQLite with a rollback journal: `synchronous=EXTRA` also synchronises the directory when the
journal goes, so that a power cut cannot bring it back and undo a commit; the write-ahead log is not
used because SQLite before 3.51.3 can lose commits with it. PostgreSQL commits synchronously,
whatever the server's default. One transaction writes at a time, over all processes.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Connection

from service.gallery.engines import postgresql_engine, reported, sqlite_engine
from service.gallery.migration import is_of_version_1, migrate_from_1
from service.gallery.protocol import GalleryError, StorageError
from service.gallery.rows import galleries_of
from service.gallery.tables import SCHEMA, galleries, held, idempotency, metadata, schema_table

FILE_NAME = "operations.sqlite3"
LOCK_NAME = "lock"
BEGUN_NAME = "begun"  # stands beside the file once it holds a gallery
# Names the lock under which everything is written; any number that nobody else uses.
_WRITE_LOCK = 0x696E_7670_726F_7001  # "invprop", 1
_SWITCH_LOCK = 0x696E_7670_726F_7002

_log = structlog.get_logger("service.gallery")


class Database:
    """An opened database; its transactions may run in any thread.

    Args:
        directory: the state directory, made when missing and locked for this process. None takes
            no lock and needs a URL.
        url: a postgresql:// URL; None keeps everything in a file of the directory.
        make: False locks nothing and makes nothing: for those who only read what is there.

    Raises:
        GalleryError: the directory is in use or cannot be written, or there is no such database.
    """

    def __init__(
        self, directory: Path | None, url: str | None = None, *, make: bool = True
    ) -> None:
        assert directory is not None or url is not None
        self.directory = directory
        # Connects to nothing yet.
        if url is None:
            assert directory is not None
            self.name = str(directory / FILE_NAME)
            if not make and not (directory / FILE_NAME).is_file():
                raise GalleryError(f"there is no gallery in {directory}: {FILE_NAME} is missing")
            self._engine = sqlite_engine(directory / FILE_NAME)
        else:
            self._engine = postgresql_engine(url)
            at = self._engine.url  # neither user nor password nor options
            self.name = f"postgresql://{at.host or ''}:{at.port or 5432}/{at.database}"
        self._lock = _own(directory) if make and directory is not None else None
        try:
            if make:
                self._make_tables()
        except BaseException:
            self.close()
            raise

    @property
    def is_shared(self) -> bool:
        """Whether other processes may write to it too."""
        return self._engine.dialect.name == "postgresql"

    @property
    def version(self) -> str:
        """Engine and version, for people."""
        numbers = self._engine.dialect.server_version_info or ()
        return f"{self._engine.dialect.name} {'.'.join(map(str, numbers))}"

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads; keep it short, SQLite's writer waits for it.

        Raises:
            StorageError: the database is gone, busy or damaged.
        """
        with reported("the gallery could not be read"), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction beside which nobody else writes; on disk when the block has ended.

        Raises:
            StorageError: nothing was changed; or, where the connection broke at the very end, the
                change is whole in the database or not there at all.
        """
        with reported("the change was not stored"), self._engine.connect() as connection:
            if self.is_shared:
                with connection.begin():
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITE_LOCK)))
                    yield connection
            else:
                with connection.execution_options(immediate=True).begin():
                    yield connection

    @contextlib.contextmanager
    def switching(self) -> Iterator[None]:
        """A block in which no other process switches the active gallery.

        Raises:
            StorageError: another process does; or the database is gone.
        """
        if not self.is_shared:  # the directory's lock says so already
            yield
            return
        with reported("no switch was begun"):
            connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            with reported("no switch was begun"):
                lock = sa.select(sa.func.pg_try_advisory_lock(_SWITCH_LOCK))
                if not connection.scalar(lock):
                    raise StorageError("another process is switching the gallery", full=False)
            yield
        finally:
            connection.invalidate()  # its end releases the lock, whatever state it is in
            connection.close()

    def close(self) -> None:
        """Close the connections and release the directory."""
        self._engine.dispose()
        if self._lock is not None:
            self._lock.close()

    def mark_begun(self) -> None:
        """Note beside the file that it holds a gallery: from now on an empty one is a loss.

        Raises:
            StorageError: the directory cannot be written.
        """
        if self.is_shared or self.directory is None or (self.directory / BEGUN_NAME).exists():
            return
        try:
            (self.directory / BEGUN_NAME).touch()
            descriptor = os.open(self.directory, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StorageError(f"{self.directory}: {error.strerror}", full=full) from error

    def _check_begun(self, connection: Connection) -> None:
        begun = None if self.is_shared or not self.directory else self.directory / BEGUN_NAME
        if begun is not None and begun.exists() and not galleries_of(connection):
            raise GalleryError(
                f"{self.name} is missing or empty, but {begun.name} says that it held a gallery: "
                f"restore it from a backup, or remove {begun} to begin with an empty gallery"
            )

    def _check_file(self, connection: Connection) -> None:
        """Look at the pages of the file: a row that a damaged one hides has no checksum to differ,
        and what is written next may go over others. Takes about 0.7 s for a million items."""
        looks = ["quick_check(1)"]
        # Whether tables and their indexes agree too, where nothing else counts the rows.
        looks += [f"integrity_check({t.name})" for t in (galleries, idempotency, held)]
        for look in looks:
            for (line,) in connection.exec_driver_sql(f"PRAGMA {look}"):
                if line != "ok":
                    raise GalleryError(
                        f"{self.name} is damaged: {' '.join(line.split())}. Nothing is served from "
                        "it; look at all of it with python -m service.check, restore it from a "
                        "backup"
                    )

    def _make_tables(self) -> None:
        try:
            with self.writing() as connection:
                if self.is_shared and connection.exec_driver_sql("SHOW fsync").scalar() != "on":
                    _log.warning("database_without_fsync", note="a power cut can lose answers")
                if not self.is_shared and is_of_version_1(connection):
                    moved = migrate_from_1(connection, self.name)
                    _log.info("gallery_migrated", database=self.name, operations=moved)
                metadata.create_all(connection)
                if not self.is_shared:
                    self._check_file(connection)
                self._check_begun(connection)
                found = list(connection.scalars(sa.select(schema_table.c.schema)))
                if not found:
                    if galleries_of(connection):
                        raise GalleryError(
                            f"{self.name} has galleries but no row in table database: it is "
                            "damaged; restore it from a copy"
                        )
                    connection.execute(sa.insert(schema_table), {"schema": SCHEMA})
                elif found != [SCHEMA]:
                    raise GalleryError(
                        f"{self.name} has schema {found[0]!r}, this version reads {SCHEMA!r}; "
                        "use the version of invprop that wrote it"
                    )
        except StorageError as error:
            raise GalleryError(f"{self.name} cannot be opened as a log: {error}") from error


def make_state(directory: Path) -> None:
    """Make the state directory, unless it is there.

    Raises:
        GalleryError: it cannot be made.
    """
    with _usable(directory):
        directory.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _usable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GalleryError(
            f"the state directory {directory} cannot be used: {error.strerror}; give --state "
            "(INVPROP_STATE) a directory that can be written"
        ) from error


def _own(directory: Path) -> IO[str]:
    """Take the state directory for this process, or say who has it."""
    make_state(directory)
    with _usable(directory):
        file = (directory / LOCK_NAME).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise GalleryError(
            f"the state directory {directory} is in use by process {owner}: one service owns a "
            "state. Stop that one, or give --state another directory"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
