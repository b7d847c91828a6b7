"""Items as columns: vectors, ids, metadata and sequence numbers of N rows.

In: what was written, in that order. Out: arrays, shared between snapshots and never changed. A
million items are a few arrays here, not a million objects: metadata stay the bytes that the log
holds and are parsed when somebody asks for them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import orjson
from numpy.typing import NDArray

from service.gallery.protocol import Metadata, Rows, Vectors

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Blobs:
    """N byte strings in one array."""

    data: Bytes  # (total,)
    ends: NDArray[np.int64]  # (N + 1,) from 0: row r is data[ends[r] : ends[r + 1]]

    @classmethod
    def of(cls, values: Iterable[bytes]) -> "Blobs":
        """Join the values."""
        values = list(values)
        ends = np.zeros(len(values) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, values), np.int64, len(values)), out=ends[1:])
        return cls(np.frombuffer(b"".join(values), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, row: int) -> bytes:
        return self.data[self.ends[row] : self.ends[row + 1]].tobytes()

    def take(self, rows: Rows) -> "Blobs":
        """These rows alone."""
        starts, lengths = self.ends[rows], self.ends[rows + 1] - self.ends[rows]
        ends = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=ends[1:])
        # Where each byte comes from: its row's start, and how far it stands behind it.
        source = np.repeat(starts - ends[:-1], lengths) + np.arange(ends[-1])
        return Blobs(self.data[source], ends)


@dataclass(frozen=True)
class Records:
    """N rows as columns, in the order in which they were written."""

    vectors: Vectors  # (N, D) float32, contiguous
    ids: NDArray[np.object_]  # (N,) str
    metadata: Blobs  # (N,) JSON objects
    seqs: Rows  # (N,) sequence number of each row's operation, ascending

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_bytes(self) -> int:
        """What the columns take in memory, the ids' text not counted."""
        metadata = self.metadata.data.nbytes + self.metadata.ends.nbytes
        return self.vectors.nbytes + self.ids.nbytes + metadata + self.seqs.nbytes

    def parsed(self, row: int) -> Metadata:
        """The metadata of one row."""
        return cast(Metadata, orjson.loads(self.metadata[row]))

    def take(self, rows: Rows) -> "Records":
        """These rows alone."""
        return Records(
            self.vectors[rows], self.ids[rows], self.metadata.take(rows), self.seqs[rows]
        )


def records_of(
    *,
    vectors: Vectors,
    ids: Sequence[str],
    metadata: Iterable[bytes],
    seqs: Sequence[int] | NDArray[Any],
) -> Records:
    """Columns of N rows that come as sequences."""
    column = np.empty(len(ids), np.object_)
    column[:] = ids
    return Records(
        np.ascontiguousarray(vectors, np.float32),
        column,
        Blobs.of(metadata),
        np.asarray(seqs, np.int64),
    )


def none_of(dim: int) -> Records:
    """No rows."""
    return records_of(vectors=np.empty((0, dim), np.float32), ids=[], metadata=[], seqs=[])


def join(parts: Sequence[Records]) -> Records:
    """Records one after the other; without a copy where one part alone has rows."""
    filled = [p for p in parts if len(p)]
    if len(filled) < 2:
        return filled[0] if filled else parts[0]
    parts = filled
    shifts = np.cumsum([0, *(len(p.metadata.data) for p in parts)])
    ends = [p.metadata.ends[1:] + shift for p, shift in zip(parts, shifts[:-1], strict=True)]
    return Records(
        np.concatenate([p.vectors for p in parts]),
        np.concatenate([p.ids for p in parts]),
        Blobs(
            np.concatenate([p.metadata.data for p in parts]),
            np.concatenate([np.zeros(1, np.int64), *ends]),
        ),
        np.concatenate([p.seqs for p in parts]),
    )
