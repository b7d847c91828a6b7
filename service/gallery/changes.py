"""What changes do to the items: worked out before anything is written, and replayed from the log.

In: changes, or the operations that a log holds. Out: operations to append, and the rows that a
snapshot is built of.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from service.gallery.faiss_index import FaissSnapshot
from service.gallery.pictures import digest
from service.gallery.protocol import Applied, Change, Item, TooManyMatches
from service.gallery.records import Records, records_of
from service.gallery.rows import Operation, encode_metadata
from trainer.representation.bundle import BundleGallery

Written = tuple[str, bytes, bytes, int]  # id, vector, metadata as JSON, seq


class Plan:
    """Changes worked out one after the other against a snapshot, before anything is written."""

    def __init__(self, snapshot: FaissSnapshot, last_seq: int) -> None:
        self._snapshot = snapshot
        self.last_seq = last_seq
        self.operations: list[Operation] = []
        self.pictures: dict[bytes, bytes] = {}  # SHA-256 -> content, of the operations
        self.upserts: dict[str, Written] = {}  # what is new, in the order of its last writing
        self.gone: set[int] = set()  # rows of the snapshot that no longer count
        self._gone_upserts: list[int] = []  # sequence numbers of this plan's that no longer count

    def add(self, change: Change) -> Applied:
        """Work out a change.

        Raises:
            TooManyMatches: nothing of it was taken.
        """
        added = updated = deleted = 0
        missing = []
        deletes = change.deletes
        if change.delete_matching is not None:
            deletes = self._matching(change)
        for item in change.upserts:
            if self._remove(item.id):
                updated += 1
            else:
                added += 1
            self._write(item)
        for item_id in deletes:
            if self._remove(item_id):
                deleted += 1
                self._append(Operation("delete", item_id))
            else:
                missing.append(item_id)
        return Applied(
            self.last_seq, added, updated, deleted, tuple(missing), tuple(change.rejected)
        )

    def follow(self, seq: int, operation: Operation) -> None:
        """Take over an operation that another process has written."""
        self._remove(operation.id)
        if operation.kind == "upsert":
            self.upserts[operation.id] = _written(seq, operation)
        self.last_seq = seq

    def gone_seqs(self) -> list[int]:
        """Sequence numbers of the operations whose items no longer count."""
        rows = np.asarray(sorted(self.gone), np.int64)
        return [*self._snapshot.seqs(rows).tolist(), *self._gone_upserts]

    def _write(self, item: Item) -> None:
        hashes = []
        for content in (item.thumbnail, item.original):
            hashes.append(None if content is None else digest(content))
            if content is not None:
                self.pictures[digest(content)] = content
        vector = item.vector.astype("<f4").tobytes()
        metadata = encode_metadata(item.metadata)
        self._append(Operation("upsert", item.id, vector, metadata, *hashes))
        self.upserts[item.id] = (item.id, vector, metadata, self.last_seq)

    def _append(self, operation: Operation) -> None:
        self.operations.append(operation)
        self.last_seq += 1

    def _matching(self, change: Change) -> list[str]:
        assert change.delete_matching is not None
        assert not self.operations, "a filter sees the snapshot only"
        rows = self._snapshot.matching(change.delete_matching)
        if len(rows) > change.most_matching:
            raise TooManyMatches(len(rows))
        ids: list[str] = self._snapshot.ids(rows).tolist()
        return ids

    def _remove(self, item_id: str) -> bool:
        pending = self.upserts.pop(item_id, None)
        if pending is not None:
            self._gone_upserts.append(pending[3])
            return True
        row = self._snapshot.row(item_id)
        if row is None or row in self.gone:
            return False
        self.gone.add(row)
        return True


def columns(written: Sequence[Written], dim: int) -> Records:
    """Written items as columns."""
    return records_of(
        vectors=np.frombuffer(b"".join(w[1] for w in written), "<f4").reshape(-1, dim),
        ids=[w[0] for w in written],
        metadata=[w[2] for w in written],
        seqs=[w[3] for w in written],
    )


def imported(gallery: BundleGallery) -> Iterator[Operation]:
    """A bundle's gallery as the first operations of a new log."""
    empty = encode_metadata({})
    for item_id, vector in zip(gallery.ids, gallery.embeddings, strict=True):
        yield Operation("upsert", item_id, vector.astype("<f4").tobytes(), empty)


def replay(operations: Iterable[tuple[int, Operation]], dim: int) -> Records:
    """What is left when every operation of a log is done again."""
    live: dict[str, Written] = {}  # a dict keeps the order in which keys were last inserted
    for seq, operation in operations:
        live.pop(operation.id, None)
        if operation.kind == "upsert":
            live[operation.id] = _written(seq, operation)
    return columns(list(live.values()), dim)


def _written(seq: int, operation: Operation) -> Written:
    assert operation.vector is not None
    assert operation.metadata is not None
    return operation.id, operation.vector, operation.metadata, seq
