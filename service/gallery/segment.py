"""A run of rows that is searched as one: columns, an id map, postings, and what speeds up a search.

In: records. Out: candidates of a search, best first. A segment is never changed once it was made:
faiss must not add and search at the same time. The vectors are held once; faiss works on the array.
"""

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import faiss

from service.gallery.postings import Postings
from service.gallery.protocol import Rows, Vectors
from service.gallery.records import Records

# faiss >= 1.14.2 uses matrix multiplication only for about 1000 queries of 128 dimensions together.
# It pays from about nq * d = 800 on, 3 to 8 times (measured on one thread).
faiss.cvar.distance_compute_blas_threshold = 800

GPU_MAX_CANDIDATES = 2048  # faiss' limit of k on a GPU


@dataclass(frozen=True)
class Segment:
    """Records and how they are searched."""

    records: Records
    row_of: Mapping[str, int]
    postings: Postings
    on_gpu: Any = None  # a flat faiss index on the GPU
    # Held while searching a GPU: its scratch memory serves one search at a time.
    lock: AbstractContextManager[Any] = field(default_factory=nullcontext)

    @classmethod
    def of(cls, records: Records, *, gpu: Any = None) -> "Segment":
        """Index the records; on the GPU too where its resources are given."""
        row_of = dict(zip(records.ids.tolist(), range(len(records)), strict=True))
        segment = cls(records, row_of, Postings(records.metadata))
        if gpu is None:
            return segment
        on_gpu = faiss.GpuIndexFlatIP(gpu, records.vectors.shape[1])
        on_gpu.add(records.vectors)
        return replace(segment, on_gpu=on_gpu, lock=threading.Lock())

    def __len__(self) -> int:
        return len(self.records)

    def candidates(self, queries: Vectors, count: int) -> tuple[Vectors, Rows]:
        """(B, D) -> scores and rows (B, min(count, N)), best first."""
        count = min(count, len(self.records))
        if self.on_gpu is not None and count <= GPU_MAX_CANDIDATES:
            with self.lock:
                return cast(tuple[Vectors, Rows], self.on_gpu.search(queries, count))
        return nearest(queries, self.records.vectors, count)


def nearest(queries: Vectors, vectors: Vectors, count: int) -> tuple[Vectors, Rows]:
    """(B, D), (n, D) -> float32 products and rows (B, count), best first; count <= n."""
    scores, rows = faiss.knn(queries, vectors, count, metric=faiss.METRIC_INNER_PRODUCT)
    return scores, rows


def score_error(dim: int) -> float:
    """How far a float32 product of unit vectors may be from the float64 one: a sum of `dim`."""
    return 1.25 * dim * 2.0**-24
