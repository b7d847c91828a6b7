"""The operations log: every change of the gallery in the order in which it was made. It is the
truth; everything else can be rebuilt from it.

In: operations in groups, one transaction each. Out: the same operations in order, each compared
with its checksum. SQLite with a rollback journal: `synchronous=EXTRA` also synchronises the
directory when the journal goes, so that a power cut cannot bring it back and undo a commit; the
write-ahead log is not used because SQLite before 3.51.3 can lose commits with it.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import orjson
import sqlalchemy as sa

from service.gallery.protocol import GalleryError, StorageError

SCHEMA = "invprop.gallery/1"
FILE_NAME = "operations.sqlite3"
_READ_AHEAD_ROWS = 4096

_metadata = sa.MetaData()
_header = sa.Table(
    "header",
    _metadata,
    sa.Column("schema", sa.Text, primary_key=True),
    sa.Column("model_id", sa.Text, nullable=False),
    sa.Column("dim", sa.Integer, nullable=False),
    sa.Column("last_seq", sa.Integer, nullable=False),
)
_operations = sa.Table(
    "operations",
    _metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("model_id", sa.Text, nullable=False),
    sa.Column("vector", sa.LargeBinary),  # little-endian float32, NULL for a delete
    sa.Column("metadata", sa.LargeBinary),  # JSON, NULL for a delete
    sa.Column("crc32", sa.Integer, nullable=False),
)
_idempotency = sa.Table(
    "idempotency",
    _metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("answer", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),  # seconds since 1970
    sa.Column("crc32", sa.Integer, nullable=False),
)


class Operation(NamedTuple):
    """One change of one item."""

    kind: Literal["upsert", "delete"]
    id: str
    vector: bytes | None = None  # D little-endian float32, None for a delete
    metadata: bytes | None = None  # JSON, None for a delete


class Remembered(NamedTuple):
    """A request that was answered under an Idempotency-Key."""

    key: str
    digest: str
    answer: bytes
    created_at: float


class OperationsLog:
    """One log in one file, owned by one process and used by one thread.

    Args:
        directory: the state directory; the file is made there when it is missing.
        model_id, dim: whose vectors the log holds; another model's log is refused.

    Raises:
        GalleryError: the file is no log of this model, or cannot be read.
    """

    def __init__(self, directory: Path, *, model_id: str, dim: int) -> None:
        self.path = directory / FILE_NAME
        self._model_id = model_id
        self._dim = dim
        self._engine = sa.create_engine(f"sqlite:///{self.path}", poolclass=sa.pool.NullPool)
        try:
            self._connection = self._engine.connect()
            for pragma in ("journal_mode=DELETE", "synchronous=EXTRA"):
                self._connection.exec_driver_sql(f"PRAGMA {pragma}")
            self._connection.rollback()
            with self._connection.begin():
                _metadata.create_all(self._connection)
            self.last_seq, self.is_new = self._open_header()
        except sa.exc.DBAPIError as error:
            raise GalleryError(f"{self.path} cannot be opened as a log: {error.orig}") from error

    def _open_header(self) -> tuple[int, bool]:
        with self._connection.begin():
            rows = self._connection.execute(sa.select(_header)).all()
            if not rows:
                if self._connection.execute(sa.select(_operations.c.seq).limit(1)).first():
                    raise GalleryError(
                        f"{self.path} has operations but no row in table header: it is damaged; "
                        "restore it from a copy"
                    )
                # Complete only with the first commit of `append`: a start that is cut short before
                # it imported the bundle's gallery starts over.
                return 0, True
        row = rows[0]
        if len(rows) != 1 or row.schema != SCHEMA:
            raise GalleryError(f"{self.path} has schema {row.schema!r}, wanted {SCHEMA!r}")
        if row.model_id != self._model_id or row.dim != self._dim:
            raise GalleryError(
                f"{self.path} holds vectors of model {row.model_id[:16]}... (dim {row.dim}), but "
                f"the bundle is model {self._model_id[:16]}... (dim {self._dim}): vectors of two "
                "models cannot be compared. Start with the bundle that belongs to this state, or "
                "give --state an empty directory and add the images again"
            )
        return int(row.last_seq), False

    def replay(self) -> Iterator[tuple[int, Operation]]:
        """Yield (seq, operation) from the first to the last, each compared with its checksum.

        Raises:
            GalleryError: an operation is damaged or missing; names table and seq.
        """
        expected = 1
        statement = sa.select(_operations).order_by(_operations.c.seq)
        try:
            with self._connection.begin():
                result = self._connection.execute(
                    statement, execution_options={"yield_per": _READ_AHEAD_ROWS}
                )
                for seq, kind, item_id, model_id, vector, metadata, crc32 in result:
                    if seq != expected:
                        raise self._damage(expected, f"it is missing, {seq} comes next")
                    operation = Operation(kind, item_id, vector, metadata)
                    if crc32 != _checksum(seq, operation, model_id):
                        raise self._damage(seq, "it does not match its checksum")
                    if model_id != self._model_id:
                        raise self._damage(seq, f"it belongs to model {model_id!r}")
                    if kind == "upsert" and len(vector) != 4 * self._dim:
                        raise self._damage(seq, f"its vector has {len(vector)} bytes")
                    yield seq, operation
                    expected += 1
        except sa.exc.DBAPIError as error:
            raise self._damage(expected, str(error.orig)) from error
        except (TypeError, AttributeError, UnicodeError) as error:  # a column of another type
            raise self._damage(expected, str(error)) from error
        if expected - 1 != self.last_seq:
            raise self._damage(expected, f"the header counts {self.last_seq} operations")

    def remembered(self) -> list[Remembered]:
        """Every answer kept under an Idempotency-Key.

        Raises:
            GalleryError: one is damaged.
        """
        try:
            with self._connection.begin():
                rows = self._connection.execute(sa.select(_idempotency)).all()
        except sa.exc.DBAPIError as error:
            raise GalleryError(f"{self.path}, table idempotency: {error.orig}") from error
        kept = []
        for *fields, crc32 in rows:
            entry = Remembered(*fields)
            if crc32 != _answer_checksum(entry):
                raise GalleryError(
                    f"{self.path}, table idempotency, key {entry.key!r}: it does not match its "
                    "checksum; delete that row to go on without it"
                )
            kept.append(entry)
        return kept

    def append(
        self,
        operations: Sequence[Operation],
        *,
        remember: Iterable[Remembered] = (),
        forget_before: float = 0.0,
    ) -> int:
        """Write operations and answers in one transaction; return the last sequence number.

        When it returns, everything is on disk. On an error nothing is changed.

        Raises:
            StorageError: the disk is full or failed.
        """
        first = self.last_seq + 1
        rows = [
            {
                "seq": seq,
                **operation._asdict(),
                "model_id": self._model_id,
                "crc32": _checksum(seq, operation, self._model_id),
            }
            for seq, operation in enumerate(operations, first)
        ]
        answers = [{**a._asdict(), "crc32": _answer_checksum(a)} for a in remember]
        last_seq = self.last_seq + len(rows)
        try:
            with self._connection.begin():
                if rows:
                    self._connection.execute(sa.insert(_operations), rows)
                self._connection.execute(
                    sa.delete(_idempotency).where(_idempotency.c.created_at < forget_before)
                )
                if answers:
                    self._connection.execute(sa.insert(_idempotency), answers)
                if self.is_new:
                    self._connection.execute(
                        sa.insert(_header),
                        {
                            "schema": SCHEMA,
                            "model_id": self._model_id,
                            "dim": self._dim,
                            "last_seq": last_seq,
                        },
                    )
                else:
                    self._connection.execute(sa.update(_header).values(last_seq=last_seq))
        except sa.exc.DBAPIError as error:
            full = "full" in str(error.orig)
            raise StorageError(f"the change was not stored: {error.orig}", full=full) from error
        self.last_seq, self.is_new = last_seq, False
        return last_seq

    def close(self) -> None:
        """Release the file."""
        self._connection.close()
        self._engine.dispose()

    def _damage(self, seq: int, what: str) -> GalleryError:
        return GalleryError(
            f"{self.path}, table operations, seq {seq}: {what}. The log is damaged and nothing is "
            "served from it; restore the file from a copy"
        )


def _checksum(seq: int, operation: Operation, model_id: str) -> int:
    head = json.dumps([seq, operation.kind, operation.id, model_id]).encode()
    crc = zlib.crc32(head)
    for part in (operation.vector, operation.metadata):
        # The length goes in too: bytes must not move from the vector to the metadata unseen.
        crc = zlib.crc32(b"-" if part is None else b"%d:" % len(part) + part, crc)
    return crc


def _answer_checksum(entry: Remembered) -> int:
    head = json.dumps([entry.key, entry.digest, entry.created_at]).encode()
    return zlib.crc32(entry.answer, zlib.crc32(head))


def encode_metadata(metadata: object) -> bytes:
    """Metadata as the log holds it."""
    return orjson.dumps(metadata)
