"""The operations log: every change of one gallery in the order in which it was made. It is the
truth; everything else can be rebuilt from it.

In: operations in groups, one transaction each, with the answers and pictures that belong to them.
Out: the same operations in order, each compared with its checksum. Whoever writes sees in the same
transaction what other processes wrote before.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.gallery.database import Database
from service.gallery.pictures import hold, read_picture, release
from service.gallery.protocol import GalleryError, GalleryRetired, PictureKind
from service.gallery.rows import (
    GalleryRow,
    Operation,
    Remembered,
    active_of,
    add_gallery,
    damaged,
    forget_answers,
    galleries_of,
    insert_answers,
    insert_operations,
    read_answers,
    read_operations,
)
from service.gallery.tables import operations

__all__ = ["Operation", "OperationsLog", "Remembered", "Writing", "open_active"]

_READ_ROWS = 4096  # read at a time; SQLite's writer waits for that long at most


class OperationsLog:
    """The log of one gallery of a database.

    Args:
        database: where it is.
        gallery: which of its galleries, as it was read.
    """

    def __init__(self, database: Database, gallery: GalleryRow) -> None:
        self.database = database
        self.gallery = gallery

    @property
    def log_id(self) -> str:
        """Random, other than that of any other log: names what was made from this one."""
        return self.gallery.log_id

    @property
    def last_seq(self) -> int:
        """The last sequence number when the log was last read or written here."""
        return self.gallery.last_seq

    def replay(self, after: int = 0) -> Iterator[tuple[int, Operation]]:
        """Yield (seq, operation) behind `after` up to `last_seq`, each verified.

        Raises:
            GalleryError: an operation is damaged or missing; names table and seq.
            StorageError: the database is gone.
        """
        last = self.last_seq
        while after < last:
            limit = min(_READ_ROWS, last - after)
            with self.database.reading() as connection:
                part = list(read_operations(connection, self.gallery, after=after, limit=limit))
            yield from part
            if len(part) < limit:
                raise self.miscounted(part[-1][0] if part else after)
            after = part[-1][0]

    def checksum(self, seq: int) -> int:
        """The checksum of one operation.

        Raises:
            GalleryError: the operation is damaged or missing.
            StorageError: the database is gone.
        """
        with self.database.reading() as connection:
            found = list(read_operations(connection, self.gallery, after=seq - 1, limit=1))
        if not found:
            raise self.miscounted(seq - 1)
        return found[0][1].checksum(self.gallery, seq)

    def check_end(self) -> None:
        """Compare the gallery's row with the last operation that there is.

        Raises:
            GalleryError: operations are missing at the end, or there are more than were counted.
        """
        with self.database.reading() as connection:
            row = self._row(connection)
            mine = operations.c.gallery == row.id
            last = connection.scalar(sa.select(sa.func.max(operations.c.seq)).where(mine)) or 0
        if last != row.last_seq:
            raise self.miscounted(last, row.last_seq)

    def refresh(self) -> GalleryRow:
        """Read the gallery's row again."""
        with self.database.reading() as connection:
            self.gallery = self._row(connection)
        return self.gallery

    def remembered(self) -> list[Remembered]:
        """Every answer kept under an Idempotency-Key.

        Raises:
            GalleryError: one is damaged.
        """
        with self.database.reading() as connection:
            return read_answers(connection, self.gallery)

    def picture(self, seq: int, kind: PictureKind) -> bytes | None:
        """The picture of the item that an operation wrote; None when it came without one.

        Raises:
            PictureGone: the item was replaced or deleted since.
            GalleryError: it is damaged or missing.
        """
        with self.database.reading() as connection:
            return read_picture(connection, self.gallery, seq, kind)

    @contextlib.contextmanager
    def writing(self) -> Iterator["Writing"]:
        """Begin a transaction beside which nobody else writes; on disk when the block has ended.

        Raises:
            StorageError: the disk is full or failed, the database is gone: nothing is changed.
            GalleryRetired: another gallery has taken this one's place.
            GalleryError: the gallery's row is damaged or gone.
        """
        with self.database.writing() as connection:
            row = self._row(connection)
            if row.state == "retired":
                self.gallery = row
                raise GalleryRetired(
                    f"the gallery of model {row.model_id[:16]}... was replaced by one of another "
                    "model and takes no more changes"
                )
            transaction = Writing(connection, row)
            yield transaction
        self.gallery = transaction.gallery

    def miscounted(self, found: int, counted: int | None = None) -> GalleryError:
        """The error of a log whose last operations are not those that its row counts."""
        counted = self.last_seq if counted is None else counted
        return damaged(
            self.gallery, min(found, counted) + 1, f"the gallery's row counts {counted} operations"
        )

    def _row(self, connection: Connection) -> GalleryRow:
        for row in galleries_of(connection):
            if row.log_id == self.log_id:
                return row
        raise GalleryError(f"{self.database.name} no longer holds log {self.log_id}")


class Writing:
    """What can be read and written within one transaction of a log."""

    def __init__(self, connection: Connection, gallery: GalleryRow) -> None:
        self.connection = connection
        self.gallery = gallery

    def operations(self, after: int) -> list[tuple[int, Operation]]:
        """Everything behind `after`: what others have written."""
        count = self.gallery.last_seq - after
        if count <= 0:
            return []
        return list(read_operations(self.connection, self.gallery, after=after, limit=count))

    def answers(self, keys: Sequence[str]) -> list[Remembered]:
        """What is kept under these keys."""
        return read_answers(self.connection, self.gallery, keys) if keys else []

    def append(
        self,
        appended: Iterable[Operation],
        *,
        pictures: Mapping[bytes, bytes] | None = None,
        gone: Sequence[int] = (),
        remember: Sequence[Remembered] = (),
        forget_before: float = 0.0,
    ) -> int:
        """Write operations and what belongs to them; returns the last sequence number.

        Args:
            appended: the operations, in order.
            pictures: SHA-256 -> content, those that the operations name.
            gone: sequence numbers of the operations whose items are replaced or deleted by these.
            remember: answers to keep.
            forget_before: seconds since 1970; older answers are removed.
        """
        first = self.gallery.last_seq + 1
        appended = list(appended)
        self.gallery = insert_operations(self.connection, self.gallery, appended)
        hold(self.connection, self.gallery, enumerate(appended, first), pictures or {})
        release(self.connection, self.gallery, gone)
        forget_answers(self.connection, self.gallery, forget_before)
        insert_answers(self.connection, self.gallery, remember)
        return self.gallery.last_seq


def open_active(
    database: Database, *, model_id: str, dim: int, first: Callable[[], Iterable[Operation]]
) -> OperationsLog:
    """The log of the active gallery; in a new database it is begun with the operations `first`.

    Raises:
        GalleryError: the active gallery belongs to another model; or damage.
        StorageError: the database is gone or full.
    """
    with database.writing() as connection:
        row = active_of(galleries_of(connection))
        if row is None:
            row = add_gallery(connection, model_id=model_id, dim=dim)
            row = insert_operations(connection, row, first())
    database.mark_begun()
    if row.model_id != model_id or row.dim != dim:
        raise GalleryError(
            f"{database.name} holds vectors of model {row.model_id[:16]}... (dim {row.dim}), but "
            f"the bundle is model {model_id[:16]}... (dim {dim}): vectors of two models cannot be "
            "compared. Start with the bundle that belongs to this state; or bring the state to "
            "this bundle with `python -m service.switch`; or give --state an empty directory and "
            "add the images again"
        )
    return OperationsLog(database, row)
