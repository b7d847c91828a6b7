"""Exact search over the gallery with faiss: immutable segments, joined by one snapshot.

In: unit vectors in the order in which they were written, with ids, metadata and sequence numbers.
Out: neighbours in an order that does not depend on how the rows are cut into segments, on the batch
or on the device: faiss only proposes candidates, their cosines are computed again in float64.

A segment is never changed once it was searched: faiss must not add and search at the same time.
"""

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import faiss
import numpy as np
from numpy.typing import NDArray

from service.gallery.protocol import Filter, Found, Item, Metadata, Page, Rows, Vectors
from service.gallery.vectors import cosine
from trainer.representation.neighbours import exact_neighbours

# faiss >= 1.14.2 uses matrix multiplication only for about 1000 queries of 128 dimensions together.
# It pays from about nq * d = 800 on, 3 to 8 times (measured on one thread).
faiss.cvar.distance_compute_blas_threshold = 800

# A float32 dot product of unit vectors is within this of the float64 one (128 * 2^-24 = 8e-6).
SCORE_ERROR = 1e-5
EXTRA_CANDIDATES = 8  # proposed beyond k at the first try, so that near ties are seen whole
# Where more candidates than this lie within SCORE_ERROR of the k-th place, any of them are taken.
MAX_CANDIDATES = 4096
GPU_MAX_CANDIDATES = 2048  # faiss' limit of k on a GPU
_RESCORE_FLOATS = 4_000_000  # float64 values gathered at a time: 32 MB
_BLOCK_ROWS = 65_536  # rows of a filtered search gathered at a time


@dataclass(frozen=True)
class Records:
    """N rows as columns, in the order in which they were written."""

    vectors: Vectors  # (N, D) float32, contiguous
    ids: Sequence[str]
    metadata: Sequence[Metadata]
    seqs: Rows  # (N,) sequence number of each row's operation, ascending

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray[np.int64]) -> "Records":
        """These rows alone."""
        return Records(
            self.vectors[rows],
            [self.ids[r] for r in rows],
            [self.metadata[r] for r in rows],
            self.seqs[rows],
        )


def join(parts: Sequence[Records]) -> Records:
    """Records one after the other."""
    return Records(
        np.concatenate([p.vectors for p in parts]),
        [i for p in parts for i in p.ids],
        [m for p in parts for m in p.metadata],
        np.concatenate([p.seqs for p in parts]),
    )


@dataclass(frozen=True)
class Segment:
    """Records with a faiss index of their vectors."""

    records: Records
    row_of: Mapping[str, int]
    index: Any
    # Held while searching: a GPU's scratch memory serves one search at a time. None on the CPU.
    lock: AbstractContextManager[Any] | None

    @classmethod
    def build(cls, records: Records, *, gpu: Any = None) -> "Segment":
        """Index the records; on the GPU where its resources are given."""
        dim = records.vectors.shape[1]
        if gpu is None:
            index: Any = faiss.IndexFlatIP(dim)
        else:
            index = faiss.GpuIndexFlatIP(gpu, dim)
        lock = None if gpu is None else threading.Lock()
        index.add(np.ascontiguousarray(records.vectors))
        return cls(records, {item_id: r for r, item_id in enumerate(records.ids)}, index, lock)

    def candidates(self, queries: Vectors, count: int) -> tuple[Vectors, Rows]:
        """(B, D) -> scores and rows (B, min(count, N)), best first."""
        count = min(count, len(self.records))
        if self.lock is None:
            return cast(tuple[Vectors, Rows], self.index.search(queries, count))
        with self.lock:
            return cast(tuple[Vectors, Rows], self.index.search(queries, count))

    @property
    def most(self) -> int:
        """Candidates that one call can give."""
        return GPU_MAX_CANDIDATES if self.lock is not None else MAX_CANDIDATES


@dataclass(frozen=True)
class FaissSnapshot:
    """The items at one version: a large segment, a small one of the last changes, the dead rows.

    Rows number `main` and then `tail`. Rows of `main` that were replaced or deleted stay in its
    index until it is built anew; `tail` is built with every change and has none.
    """

    version: int
    device: str
    main: Segment
    tail: Segment
    dead: NDArray[np.bool_] = field(repr=False)  # (rows,) of main and tail
    num_dead: int

    def __len__(self) -> int:
        return len(self.dead) - self.num_dead

    def row(self, item_id: str) -> int | None:
        """The row of an item, None when there is none of that id."""
        row = self.tail.row_of.get(item_id)
        row = self.main.row_of.get(item_id) if row is None else row + len(self.main.records)
        return None if row is None or self.dead[row] else row

    def rows(self) -> Rows:
        """The rows of all items, ascending; see protocol.Snapshot."""
        return np.flatnonzero(~self.dead)

    def seqs(self, rows: Rows) -> Rows:
        """(n,) -> (n,) sequence numbers; see protocol.Snapshot."""
        return np.concatenate([self.main.records.seqs, self.tail.records.seqs])[rows]

    def item(self, row: int) -> Item:
        """The item in a row."""
        records, inside = self._locate(row)
        return Item(records.ids[inside], records.vectors[inside], records.metadata[inside])

    def vectors(self, rows: Rows) -> Vectors:
        """(n,) -> (n, D)."""
        rows = np.asarray(rows, np.int64)
        boundary = len(self.main.records)
        gathered = np.empty((len(rows), self.main.records.vectors.shape[1]), np.float32)
        in_main = rows < boundary
        gathered[in_main] = self.main.records.vectors[rows[in_main]]
        gathered[~in_main] = self.tail.records.vectors[rows[~in_main] - boundary]
        return gathered

    def matching(self, filter: Filter) -> Rows:
        """Rows of the live items whose metadata match, ascending."""
        wanted = [(name, [_typed(v) for v in values]) for name, values in filter.items()]
        columns = (self.main.records.metadata, self.tail.records.metadata)
        found = [
            row
            for row, metadata in enumerate(m for column in columns for m in column)
            if not self.dead[row]
            and all(
                name in metadata and _typed(metadata[name]) in values for name, values in wanted
            )
        ]
        return np.asarray(found, np.int64)

    def page(self, *, after: int, limit: int, among: Rows | None = None) -> Page:
        """At most `limit` live rows with a sequence number above `after`, in that order."""
        rows = self.rows() if among is None else among
        seqs = self.seqs(rows)
        first = int(np.searchsorted(seqs, after, side="right"))
        chosen = rows[first : first + limit]
        more = first + limit < len(rows)
        return Page(chosen, int(seqs[first + len(chosen) - 1]) if more else None)

    def search(
        self, queries: Vectors, k: int, *, exclude: Rows | None = None, among: Rows | None = None
    ) -> Found:
        """The k items most similar to each query, exactly; see protocol.Snapshot.search."""
        queries = np.ascontiguousarray(queries, np.float32)
        left_out = np.full(len(queries), -1, np.int64) if exclude is None else exclude
        found = Found(
            np.full((len(queries), k), -1, np.int64),
            np.full((len(queries), k), -np.inf, np.float32),
        )
        if among is not None:
            self._fill(
                found, np.arange(len(queries)), queries, left_out, self._scan(queries, k, among)
            )
            return found
        pending, extra = np.arange(len(queries)), EXTRA_CANDIDATES
        while len(pending):
            candidates, complete = self._propose(queries[pending], k, left_out[pending], extra)
            self._fill(found, pending, queries[pending], left_out[pending], candidates)
            pending, extra = pending[~complete], extra * 8
        return found

    def _propose(
        self, queries: Vectors, k: int, left_out: Rows, extra: int
    ) -> tuple[Rows, NDArray[np.bool_]]:
        """Candidate rows (B, W), and for which queries no row outside them can be among the k."""
        parts, complete = [], np.ones(len(queries), bool)
        for segment, first, dead in (
            (self.main, 0, self.num_dead),
            (self.tail, len(self.main.records), 0),
        ):
            if not len(segment.records):
                continue
            count = min(k + dead + 1 + extra, max(segment.most, k + dead + 1))
            scores, rows = segment.candidates(queries, count)
            rows = rows + first
            parts.append(rows)
            if scores.shape[1] < len(segment.records) and count < segment.most:
                usable = ~self.dead[rows] & (rows != left_out[:, None])
                kth = np.argmax(np.cumsum(usable, axis=1) == k, axis=1)  # place of the k-th usable
                floor = np.take_along_axis(scores, kth[:, None], axis=1)[:, 0]
                complete &= scores[:, -1] < floor - 2 * SCORE_ERROR
        if not parts:
            return np.empty((len(queries), 0), np.int64), complete
        return np.concatenate(parts, axis=1), complete

    def _scan(self, queries: Vectors, k: int, among: Rows) -> Rows:
        """Candidates among some rows only: a plain scan of them, block by block."""
        parts = [np.empty((len(queries), 0), np.int64)]
        for start in range(0, len(among), _BLOCK_ROWS):
            block = among[start : start + _BLOCK_ROWS]
            best = exact_neighbours(
                queries, self.vectors(block), min(len(block), k + 1 + EXTRA_CANDIDATES)
            ).ids
            parts.append(np.where(best >= 0, block[best], -1))
        return np.concatenate(parts, axis=1)

    def _fill(
        self, found: Found, places: Rows, queries: Vectors, left_out: Rows, candidates: Rows
    ) -> None:
        """Score the candidates of each query again and write the best into its place."""
        width, k = candidates.shape[1], found.rows.shape[1]
        step = max(1, _RESCORE_FLOATS // max(1, width * queries.shape[1]))
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            rows = candidates[part]
            usable = (rows >= 0) & (rows != left_out[part, None])
            usable[usable] = ~self.dead[rows[usable]]
            cosines = np.full(rows.shape, -np.inf, np.float32)
            owner, column = np.nonzero(usable)
            flat = rows[owner, column]
            cosines[owner, column] = cosine(queries[part][owner], self.vectors(flat))
            order = np.lexsort((rows, -cosines), axis=1)[:, :k]
            best = np.take_along_axis(cosines, order, axis=1)
            kept = min(k, width)
            found.similarities[places[part], :kept] = best
            found.rows[places[part], :kept] = np.where(
                best > -np.inf, np.take_along_axis(rows, order, axis=1), -1
            )

    def _locate(self, row: int) -> tuple[Records, int]:
        boundary = len(self.main.records)
        if row < boundary:
            return self.main.records, row
        return self.tail.records, row - boundary


def _typed(value: Any) -> Any:
    """JSON's true is not 1, Python's is."""
    return (bool, value) if isinstance(value, bool) else value
