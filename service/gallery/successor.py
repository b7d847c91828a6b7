"""The gallery of a new model, built beside the one that it will replace.

In: the log of the active gallery, the new bundle, a way to embed pictures. Out: a second log in the
same database that has followed the first, operation for operation, and at the end, in one
transaction, its place. Where each item's new vector comes from: its original, embedded again; else
the new bundle's own gallery, where that has the id. An item with neither stands in the way, by
count, or is left out where that was asked for. What was killed on its way goes on where it stopped.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.gallery.database import Database
from service.gallery.oplog import OperationsLog, Writing
from service.gallery.pictures import read_picture, remove_orphans
from service.gallery.protocol import PictureGone, StorageError, Vectors
from service.gallery.rows import (
    GalleryRow,
    Operation,
    active_of,
    add_gallery,
    encode_metadata,
    galleries_of,
    insert_operations,
    read_operations,
    update_gallery,
)
from service.gallery.tables import galleries, held, idempotency, operations
from trainer.representation.bundle import Bundle

CHUNK = 64  # operations taken over in one transaction
CHUNK_BYTES = 64 * 2**20  # ... fewer where their pictures together are larger
_DROP_ROWS = 10_000  # deleted in one transaction

# Encoded pictures -> a unit vector each, or in words why there is none.
Embed = Callable[[Sequence[bytes]], Sequence[Vectors | str]]


class SwitchRefused(Exception):
    """The new gallery cannot be built; the old one stays. Says why, with counts."""


@dataclass
class Progress:
    """How far a switch has come, in operations of the old log."""

    done: int = 0
    total: int = 0


class Successor:
    """A gallery under construction.

    Args:
        database: holds the active gallery, and the new one too.
        bundle: the model to come.
        embed: how its encoder sees pictures.
        drop_missing: items that the new model has no vector of are left out, not in the way.

    Raises:
        SwitchRefused: items have no original and no vector in the bundle; or the model is active.
        GalleryError, StorageError: the database is damaged or gone.
    """

    def __init__(
        self, database: Database, bundle: Bundle, embed: Embed, *, drop_missing: bool = False
    ) -> None:
        self.database = database
        self._drop_missing = drop_missing
        self.progress = Progress()
        self._bundle = bundle
        self._embed = embed
        gallery = bundle.gallery()
        self._own: Mapping[str, Vectors] = dict(zip(gallery.ids, gallery.embeddings, strict=True))
        with database.reading() as connection:
            old = active_of(galleries_of(connection))
        if old is None:
            raise SwitchRefused(f"{database.name} holds no gallery yet: start the service on it")
        if old.model_id == bundle.model_id:
            raise SwitchRefused(f"model {bundle.model_id[:16]}... is the active one already")
        self.old = OperationsLog(database, old)
        # id -> (seq of its last operation, whether it can be taken over; None when it is deleted)
        self._last: dict[str, tuple[int, bool | None]] = {}
        self._scanned = 0
        self._scan()
        if self.missing and not drop_missing:
            drop_building(database)
            raise SwitchRefused(_no_originals(self.missing, self._live()))
        self.new = OperationsLog(database, self._begin())
        # id -> seq of the items that the new gallery holds
        self._present: dict[str, int] = {}
        for seq, operation in self.new.replay():
            self._note(seq, operation)

    @property
    def items(self) -> int:
        """How many items the new gallery holds so far."""
        return len(self._present)

    @property
    def missing(self) -> int:
        """How many items of the old gallery the new model has no vector of."""
        return sum(able is False for _, able in self._last.values())

    def follow(self) -> None:
        """Take over whatever the old log holds now.

        Raises:
            SwitchRefused, GalleryError, StorageError.
        """
        while self._followed < self.old.refresh().last_seq:
            self._scan()
            with self.database.reading() as connection:
                chunk, contents = self._chunk(connection)
            translated = self._translate(chunk, contents)
            with self.new.writing() as transaction:
                self._take_over(transaction, chunk[-1][0], translated)

    def finish(self) -> OperationsLog:
        """Take the old gallery's place, with every change that it has answered.

        Raises:
            SwitchRefused, GalleryError, StorageError.
        """
        while True:
            self.follow()
            with self.new.writing() as transaction:  # nobody writes to the old one now
                rows = galleries_of(transaction.connection)
                old = next(row for row in rows if row.log_id == self.old.log_id)
                connection = transaction.connection
                self.old.gallery = old
                self._scan(connection)
                chunk, contents = self._chunk(connection)
                if chunk:
                    self._take_over(transaction, chunk[-1][0], self._translate(chunk, contents))
                if transaction.gallery.followed_seq < old.last_seq:
                    continue  # too much to be embedded while everybody waits
                self._check_complete()
                update_gallery(connection, old, state="retired")
                transaction.gallery = update_gallery(
                    connection, transaction.gallery, state="active", follows=None
                )
                # A request that is repeated across the switch is still known.
                connection.execute(
                    sa.update(idempotency)
                    .where(idempotency.c.gallery == old.id)
                    .values(gallery=transaction.gallery.id)
                )
            return self.new

    def _check_complete(self) -> None:
        left_out = (None, False) if self._drop_missing else (None,)
        live = [i for i, (_, able) in self._last.items() if able not in left_out]
        lost = sum(item_id not in self._present for item_id in live)
        if lost:
            raise SwitchRefused(
                f"{lost} of {len(live)} items could not be taken over: their originals are no "
                "longer in the database, which is damaged; add their images again"
            )

    @property
    def _followed(self) -> int:
        return self.new.gallery.followed_seq

    def _scan(self, connection: Connection | None = None) -> None:
        """Learn which operation was the last of each item."""
        while self._scanned < self.old.last_seq:
            inside = self.database.reading() if connection is None else _given(connection)
            with inside as reader:
                for seq, operation in read_operations(
                    reader, self.old.gallery, after=self._scanned, limit=4096
                ):
                    able = None
                    if operation.kind == "upsert":
                        able = operation.original is not None or operation.id in self._own
                    self._last[operation.id] = (seq, able)
                    self._scanned = seq
        self.progress.total = self._scanned

    def _begin(self) -> GalleryRow:
        """The row of the new gallery: one that was begun earlier, or a new one."""
        self._drop_others()
        with self.database.writing() as connection:
            for row in galleries_of(connection):
                if row.state == "building":
                    return row
            # Pictures that the new model was trained on and the old one was not. What was deleted
            # from the old gallery stays deleted.
            fresh = [item_id for item_id in self._own if item_id not in self._last]
            row = add_gallery(
                connection,
                model_id=self._bundle.model_id,
                dim=self._bundle.embedding_dim,
                follows=self.old.gallery.id,
            )
            empty = encode_metadata({})
            return insert_operations(
                connection,
                row,
                (Operation("upsert", i, _packed(self._own[i]), empty) for i in fresh),
            )

    def _drop_others(self) -> None:
        """Remove galleries of earlier switches, and one that was begun for another model."""
        with self.database.reading() as connection:
            rows = galleries_of(connection)
        for row in rows:
            ours = (self._bundle.model_id, self.old.gallery.id)
            if row.state == "retired" or (
                row.state == "building" and (row.model_id, row.follows) != ours
            ):
                drop(self.database, row)

    def _chunk(
        self, connection: Connection
    ) -> tuple[list[tuple[int, Operation]], dict[int, bytes]]:
        """The next operations, and the originals of those of them that still count."""
        limit = min(CHUNK, self.old.last_seq - self._followed)
        chunk: list[tuple[int, Operation]] = []
        contents: dict[int, bytes] = {}
        size = 0
        for seq, operation in read_operations(
            connection, self.old.gallery, after=self._followed, limit=limit
        ):
            if size > CHUNK_BYTES:
                break
            chunk.append((seq, operation))
            if operation.original is not None and self._counts(seq, operation):
                try:
                    content = read_picture(connection, self.old.gallery, seq, "original")
                except PictureGone:  # just now; the operation that did it comes later
                    continue
                assert content is not None
                contents[seq] = content
                size += len(content)
        return chunk, contents

    def _counts(self, seq: int, operation: Operation) -> bool:
        """Whether it was the last of its item when last scanned; others come again later."""
        return self._last[operation.id][0] == seq

    def _translate(
        self, chunk: Sequence[tuple[int, Operation]], contents: Mapping[int, bytes]
    ) -> list[Operation]:
        """The operations that do to the new gallery what `chunk` did to the old one."""
        vectors = dict(zip(contents, self._embed(list(contents.values())), strict=True))
        bad = [v for v in vectors.values() if isinstance(v, str)]
        if bad:
            raise SwitchRefused(
                f"{len(bad)} stored originals cannot be embedded by the new model: {bad[0]}"
            )
        translated = []
        for seq, operation in chunk:
            if not self._counts(seq, operation):
                continue
            if operation.kind == "delete":
                translated.append(operation)
            elif operation.original is None:
                if operation.id in self._own:
                    vector = _packed(self._own[operation.id])
                    translated.append(operation._replace(vector=vector))
                elif self._drop_missing:  # also what it was before it came as a vector
                    translated.append(Operation("delete", operation.id))
                else:
                    raise SwitchRefused(_no_originals(1, self._live()))
            elif seq in vectors:
                embedded = vectors[seq]
                assert not isinstance(embedded, str)
                translated.append(operation._replace(vector=_packed(embedded)))
        return translated

    def _live(self) -> int:
        return sum(able is not None for _, able in self._last.values())

    def _take_over(self, transaction: Writing, up_to: int, translated: Sequence[Operation]) -> None:
        if transaction.gallery != self.new.gallery:
            raise StorageError("another process has gone on with this switch", full=False)
        rows = galleries_of(transaction.connection)
        old = next((row for row in rows if row.log_id == self.old.log_id), None)
        if old is None or old.state != "active":
            raise StorageError("another gallery has become the active one", full=False)
        appended = [o for o in translated if o.kind == "upsert" or o.id in self._present]
        gone = []
        for seq, operation in enumerate(appended, transaction.gallery.last_seq + 1):
            if operation.id in self._present:
                gone.append(self._present[operation.id])
            self._note(seq, operation)
        transaction.append(appended, gone=gone)
        transaction.gallery = update_gallery(
            transaction.connection, transaction.gallery, followed_seq=up_to
        )
        self.progress.done = up_to

    def _note(self, seq: int, operation: Operation) -> None:
        self._present.pop(operation.id, None)
        if operation.kind == "upsert":
            self._present[operation.id] = seq


def drop_building(database: Database) -> int:
    """Remove galleries that were begun and never finished; returns how many."""
    with database.reading() as connection:
        rows = [row for row in galleries_of(connection) if row.state == "building"]
    for row in rows:
        drop(database, row)
    return len(rows)


def drop(database: Database, row: GalleryRow) -> None:
    """Remove a gallery that is not active, a part at a time; what is cut short is done again."""
    assert row.state != "active"
    last = row.last_seq
    for start in range(0, last, _DROP_ROWS):
        with database.writing() as connection:
            for table in (held, operations):
                connection.execute(
                    sa.delete(table).where(
                        table.c.gallery == row.id, table.c.seq <= start + _DROP_ROWS
                    )
                )
    with database.writing() as connection:
        for table in (held, operations, idempotency):
            connection.execute(sa.delete(table).where(table.c.gallery == row.id))
        connection.execute(sa.delete(galleries).where(galleries.c.id == row.id))
        remove_orphans(connection)


@contextlib.contextmanager
def _given(connection: Connection) -> Iterator[Connection]:
    yield connection


def _packed(vector: Vectors) -> bytes:
    return np.asarray(vector, "<f4").tobytes()


def _no_originals(count: int, items: int) -> str:
    return (
        f"{count:,} of {items:,} items have no stored original and are not in the new bundle's "
        "gallery, so the new model has no vector of them. Add their images again with originals = "
        "keep; or stop the service and leave them out by python -m service.switch --drop-missing; "
        "or start the new bundle on an empty state"
    )
