"""What changes do to the items: worked out before anything is written, and replayed from the log.

In: changes, or the operations that a log holds. Out: operations to append, and the rows that a
snapshot is built of.
"""

from collections.abc import Sequence

import numpy as np

from service.gallery.faiss_index import FaissSnapshot
from service.gallery.oplog import Operation, OperationsLog, encode_metadata
from service.gallery.protocol import Applied, Change
from service.gallery.records import Records, records_of
from trainer.representation.bundle import BundleGallery

Written = tuple[str, bytes, bytes, int]  # id, vector, metadata as JSON, seq


class Plan:
    """Changes worked out one after the other against a snapshot, before anything is written."""

    def __init__(self, snapshot: FaissSnapshot, last_seq: int) -> None:
        self._snapshot = snapshot
        self._last_seq = last_seq
        self.operations: list[Operation] = []
        self.upserts: dict[str, Written] = {}  # what is new, in the order of its last writing
        self.gone: set[int] = set()  # rows of the snapshot that no longer count

    def add(self, change: Change) -> Applied:
        added = updated = deleted = 0
        missing = []
        for item in change.upserts:
            if self._remove(item.id):
                updated += 1
            else:
                added += 1
            vector = item.vector.astype("<f4").tobytes()
            metadata = encode_metadata(item.metadata)
            self._append(Operation("upsert", item.id, vector, metadata))
            self.upserts[item.id] = (item.id, vector, metadata, self._seq)
        for item_id in change.deletes:
            if self._remove(item_id):
                deleted += 1
                self._append(Operation("delete", item_id))
            else:
                missing.append(item_id)
        return Applied(self._seq, added, updated, deleted, tuple(missing), tuple(change.rejected))

    @property
    def _seq(self) -> int:
        return self._last_seq + len(self.operations)

    def _append(self, operation: Operation) -> None:
        self.operations.append(operation)

    def _remove(self, item_id: str) -> bool:
        if self.upserts.pop(item_id, None) is not None:
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


def import_gallery(log: OperationsLog, gallery: BundleGallery) -> Records:
    """Write a bundle's gallery as the first operations of a new log."""
    empty = encode_metadata({})
    vectors = np.ascontiguousarray(gallery.embeddings, "<f4")
    log.append(
        [
            Operation("upsert", item_id, vector.tobytes(), empty)
            for item_id, vector in zip(gallery.ids, vectors, strict=True)
        ]
    )
    count = len(gallery.ids)
    return records_of(
        vectors=vectors,
        ids=gallery.ids,
        metadata=[empty] * count,
        seqs=np.arange(1, count + 1),
    )


def replay(log: OperationsLog, dim: int) -> Records:
    """What is left when every operation of the log is done again."""
    live: dict[str, Written] = {}  # a dict keeps the order in which keys were last inserted
    for seq, (kind, item_id, vector, metadata) in log.replay():
        live.pop(item_id, None)
        if kind == "upsert":
            assert vector is not None
            assert metadata is not None
            live[item_id] = (item_id, vector, metadata, seq)
    return columns(list(live.values()), dim)
