"""The rows of a gallery database, written and read on a connection, each with its checksum.

In: operations, answers, galleries. Out: the same, or GalleryError naming the row that is damaged.
Checksums cover the log's id, so that a row of another gallery is as strange as a damaged one.
"""

import contextlib
import json
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import orjson
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.gallery.protocol import GalleryError
from service.gallery.tables import galleries, idempotency, operations

State = Literal["building", "active", "retired"]
_WRITE_ROWS = 1000  # given to the database at a time
_RESTORE = "The log is damaged and nothing is served from it; restore it from a copy"


class GalleryRow(NamedTuple):
    """One gallery of a database."""

    id: int
    log_id: str  # of random bytes: no two logs have the same
    model_id: str
    dim: int
    state: State
    last_seq: int
    follows: int | None  # building: the gallery whose items it takes over
    followed_seq: int  # ... and up to which of its operations it has


class Operation(NamedTuple):
    """One change of one item."""

    kind: Literal["upsert", "delete"]
    id: str
    vector: bytes | None = None  # D little-endian float32, None for a delete
    metadata: bytes | None = None  # JSON, None for a delete
    thumbnail: bytes | None = None  # SHA-256 of a picture that is kept, or None
    original: bytes | None = None

    def checksum(self, gallery: GalleryRow, seq: int) -> int:
        """What stands beside the operation in the log."""
        head = json.dumps([gallery.log_id, gallery.model_id, seq, self.kind, self.id]).encode()
        crc = zlib.crc32(head)
        for part in self[2:]:
            # The length goes in too: bytes must not move from one column to the next unseen.
            crc = zlib.crc32(b"-" if part is None else b"%d:" % len(part) + part, crc)
        return crc


class Remembered(NamedTuple):
    """A request that was answered under an Idempotency-Key."""

    key: str
    digest: str
    answer: bytes
    created_at: float

    def checksum(self) -> int:
        """What stands beside the answer in the database."""
        head = json.dumps([self.key, self.digest, self.created_at]).encode()
        return zlib.crc32(self.answer, zlib.crc32(head))


def galleries_of(connection: Connection) -> list[GalleryRow]:
    """Every gallery of the database, the oldest first.

    Raises:
        GalleryError: a row is damaged.
    """
    rows = []
    for *fields, crc32 in connection.execute(sa.select(galleries).order_by(galleries.c.id)):
        row = GalleryRow(*fields)
        if crc32 != _checksum(row) or row.state not in ("building", "active", "retired"):
            raise GalleryError(
                f"table galleries, id {row.id}: the row does not match its checksum. {_RESTORE}"
            )
        rows.append(row)
    return rows


def active_of(rows: Iterable[GalleryRow]) -> GalleryRow | None:
    """The gallery that is served, None in a new database."""
    return next((row for row in rows if row.state == "active"), None)


def add_gallery(
    connection: Connection, *, model_id: str, dim: int, follows: int | None = None
) -> GalleryRow:
    """Add a gallery without items: the active one, or one that is built beside another."""
    row = GalleryRow(
        id=1 + max((r.id for r in galleries_of(connection)), default=0),
        log_id=uuid.uuid4().hex,
        model_id=model_id,
        dim=dim,
        state="active" if follows is None else "building",
        last_seq=0,
        follows=follows,
        followed_seq=0,
    )
    connection.execute(sa.insert(galleries), {**row._asdict(), "crc32": _checksum(row)})
    return row


def update_gallery(connection: Connection, row: GalleryRow, **changes: Any) -> GalleryRow:
    """Change fields of a gallery's row; returns the new row."""
    changed = row._replace(**changes)
    connection.execute(
        sa.update(galleries)
        .where(galleries.c.id == row.id)
        .values(**changes, crc32=_checksum(changed))
    )
    return changed


def insert_operations(
    connection: Connection, gallery: GalleryRow, appended: Iterable[Operation]
) -> GalleryRow:
    """Append operations to a gallery's log; returns its new row."""
    seq = gallery.last_seq
    rows: list[dict[str, Any]] = []
    for operation in appended:
        seq += 1
        crc32 = operation.checksum(gallery, seq)
        rows.append({"gallery": gallery.id, "seq": seq, **operation._asdict(), "crc32": crc32})
        if len(rows) == _WRITE_ROWS:
            connection.execute(sa.insert(operations), rows)
            rows = []
    if rows:
        connection.execute(sa.insert(operations), rows)
    return update_gallery(connection, gallery, last_seq=seq)


def read_operations(
    connection: Connection, gallery: GalleryRow, *, after: int, limit: int
) -> Iterator[tuple[int, Operation]]:
    """Yield (seq, operation) for at most `limit` operations behind `after`, each verified.

    Raises:
        GalleryError: an operation is damaged or missing; names table and seq.
    """
    statement = (
        sa.select(operations)
        .where(operations.c.gallery == gallery.id, operations.c.seq > after)
        .order_by(operations.c.seq)
        .limit(limit)
    )
    expected = after + 1
    with _unreadable_is_damage(connection, lambda what: damaged(gallery, expected, what)):
        for _, seq, *fields, crc32 in connection.execute(statement):
            operation = Operation(*fields)
            if seq != expected:
                raise damaged(gallery, expected, f"it is missing, {seq} comes next")
            if crc32 != operation.checksum(gallery, seq):
                raise damaged(gallery, seq, "it does not match its checksum")
            if operation.kind == "upsert" and len(operation.vector or b"") != 4 * gallery.dim:
                raise damaged(gallery, seq, f"its vector has {len(operation.vector or b'')} bytes")
            yield seq, operation
            expected += 1


def insert_answers(
    connection: Connection, gallery: GalleryRow, answers: Sequence[Remembered]
) -> None:
    """Keep answers under their keys; an older one of a key is replaced."""
    if not answers:
        return
    mine = idempotency.c.gallery == gallery.id
    keys = [entry.key for entry in answers]
    connection.execute(sa.delete(idempotency).where(mine, idempotency.c.key.in_(keys)))
    rows = [{"gallery": gallery.id, **a._asdict(), "crc32": a.checksum()} for a in answers]
    connection.execute(sa.insert(idempotency), rows)


def read_answers(
    connection: Connection, gallery: GalleryRow, keys: Sequence[str] | None = None
) -> list[Remembered]:
    """The answers kept under these keys; under all where None.

    Raises:
        GalleryError: one is damaged.
    """
    statement = sa.select(idempotency).where(idempotency.c.gallery == gallery.id)
    if keys is not None:
        statement = statement.where(idempotency.c.key.in_(keys))
    kept: list[Remembered] = []
    cure = "delete that row to go on without it"

    def unreadable(what: str) -> GalleryError:
        before = f", after key {kept[-1].key!r}" if kept else ""
        return GalleryError(f"table idempotency{before}: {what}; {cure}")

    with _unreadable_is_damage(connection, unreadable):
        for _, *fields, crc32 in connection.execute(statement):
            entry = Remembered(*fields)
            if crc32 != entry.checksum():
                raise GalleryError(
                    f"table idempotency, key {entry.key!r}: it does not match its checksum; {cure}"
                )
            kept.append(entry)
    return kept


def forget_answers(connection: Connection, gallery: GalleryRow, before: float) -> None:
    """Remove answers that are older."""
    mine = idempotency.c.gallery == gallery.id
    connection.execute(sa.delete(idempotency).where(mine, idempotency.c.created_at < before))


def damaged(gallery: GalleryRow, seq: int, what: str) -> GalleryError:
    """The error that names an operation."""
    return GalleryError(f"gallery {gallery.id}, table operations, seq {seq}: {what}. {_RESTORE}")


def encode_metadata(metadata: object) -> bytes:
    """Metadata as the log holds it."""
    return orjson.dumps(metadata)


@contextlib.contextmanager
def _unreadable_is_damage(
    connection: Connection, error_of: Callable[[str], GalleryError]
) -> Iterator[None]:
    """A block in which rows are read; what cannot be made sense of is damage, and has its name."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        if _is_passing(connection, error):
            raise
        raise error_of(str(error.orig)) from error
    except (TypeError, AttributeError, UnicodeError) as error:  # a column of another type
        raise error_of(str(error)) from error


def _is_passing(connection: Connection, error: sa.exc.DBAPIError) -> bool:
    """Whether the database was away or busy, and the row may be fine."""
    if connection.dialect.name == "postgresql":
        return isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError)
    return "locked" in str(error.orig)


def _checksum(row: GalleryRow) -> int:
    return zlib.crc32(json.dumps(row).encode())
