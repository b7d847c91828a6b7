"""A run of rows that is searched as one: columns, an id map, postings, and what speeds up a search.

In: records. Out: candidates of a search, best first. A segment is never changed once it was made:
faiss must not add and search at the same time. The vectors are held once; faiss works on the array.
"""

import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import faiss
import numpy as np

from service.gallery.approximate import Approximate, build
from service.gallery.choice import Choice, Kind
from service.gallery.postings import Postings
from service.gallery.protocol import Rows, Vectors
from service.gallery.records import Records

# faiss >= 1.14.2 uses matrix multiplication only for about 1000 queries of 128 dimensions together.
# It pays from about nq * d = 800 on, 3 to 8 times (measured on one thread).
faiss.cvar.distance_compute_blas_threshold = 800

GPU_MAX_CANDIDATES = 2048  # faiss' limit of k on a GPU
_BLOCK_ROWS = 65_536


@dataclass(frozen=True, eq=False)
class Segment:
    """Records and how they are searched."""

    records: Records
    row_of: Mapping[str, int]
    postings: Postings
    on_gpu: Any = None  # a flat faiss index on the GPU
    # Held while searching a GPU: its scratch memory serves one search at a time.
    lock: AbstractContextManager[Any] = field(default_factory=nullcontext)
    halves: Any = None  # a flat faiss index of half precision, in place of vectors in memory
    approximate: Approximate | None = None
    effort: int = 0  # of `approximate`

    @classmethod
    def of(cls, records: Records, *, gpu: Any = None) -> "Segment":
        """Records that are searched by looking at all; on the GPU where its resources are given."""
        row_of = dict(zip(records.ids.tolist(), range(len(records)), strict=True))
        segment = cls(records, row_of, Postings(records.metadata))
        if gpu is None:
            return segment
        on_gpu = faiss.GpuIndexFlatIP(gpu, records.vectors.shape[1])
        on_gpu.add(records.vectors)
        return replace(segment, on_gpu=on_gpu, lock=threading.Lock())

    @classmethod
    def indexed(
        cls,
        records: Records,
        choice: Choice,
        *,
        gpu: Any = None,
        directory: Path,
        ready: Approximate | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> "Segment":
        """Records under the index that was chosen for them.

        Args:
            directory: where the vectors go that are not held in memory; it may be removed later.
            ready: the index, where it was built before.
            stopping: asked from time to time; True calls the building off.

        Raises:
            Stopped: it was called off.
            OSError: the vectors cannot be written to the directory.
        """
        if choice.vectors_on_disk and not _is_mapped(records.vectors):
            records = replace(records, vectors=_on_disk(records.vectors, directory))
        if choice.is_exact:
            segment = cls.of(records, gpu=gpu)
            if choice.kind == "flat":
                return segment
            return replace(segment, halves=_halves(records.vectors))
        made = ready or build(choice.kind, records.vectors, gpu=gpu, stopping=stopping)
        return replace(cls.of(records), approximate=made, effort=choice.effort)

    def __len__(self) -> int:
        return len(self.records)

    def with_effort(self, effort: int) -> "Segment":
        """The same rows and index, looked at with another effort."""
        return replace(self, effort=effort)

    @property
    def kind(self) -> Kind:
        """What the rows are searched with."""
        if self.approximate is not None:
            return cast(Kind, self.approximate.kind)
        return "flat" if self.halves is None else "flat-fp16"

    @property
    def num_bytes(self) -> int:
        """What it takes in memory; what lies in mapped files, and the ids' text, not counted."""
        records = self.records.num_bytes
        if _is_mapped(self.records.vectors):
            records -= self.records.vectors.nbytes
        if self.halves is not None:
            records += self.records.vectors.nbytes // 2
        return records + (0 if self.approximate is None else self.approximate.num_bytes)

    @property
    def error(self) -> float:
        """How far the score of a candidate may be from the float64 product."""
        error = score_error(self.records.vectors.shape[1])
        return error if self.halves is None else error + HALF_ERROR

    def candidates(self, queries: Vectors, count: int) -> tuple[Vectors, Rows]:
        """(B, D) -> scores and rows (B, min(count, N)), best first, of all rows."""
        count = min(count, len(self.records))
        if self.on_gpu is not None and count <= GPU_MAX_CANDIDATES:
            with self.lock:
                return cast(tuple[Vectors, Rows], self.on_gpu.search(queries, count))
        if self.halves is not None:
            return cast(tuple[Vectors, Rows], self.halves.search(queries, count))
        return nearest(queries, self.records.vectors, count)


# Rounding a unit vector to half precision moves a product by at most half a unit in the last of 11
# places, and by 2^-25 for each of the numbers too small for that.
HALF_ERROR = 2.0**-11 + 2.0**-20


def nearest(queries: Vectors, vectors: Vectors, count: int) -> tuple[Vectors, Rows]:
    """(B, D), (n, D) -> float32 products and rows (B, count), best first; count <= n."""
    scores, rows = faiss.knn(queries, vectors, count, metric=faiss.METRIC_INNER_PRODUCT)
    return scores, rows


def score_error(dim: int) -> float:
    """How far a float32 product of unit vectors may be from the float64 one: a sum of `dim`."""
    return 1.25 * dim * 2.0**-24


def _halves(vectors: Vectors) -> Any:
    index = faiss.IndexScalarQuantizer(
        vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    for start in range(0, len(vectors), _BLOCK_ROWS):
        index.add(np.ascontiguousarray(vectors[start : start + _BLOCK_ROWS]))
    return index


def _on_disk(vectors: Vectors, directory: Path) -> Vectors:
    """The same in a file without a name, which goes when nothing looks at it any more."""
    with tempfile.TemporaryFile(dir=directory) as file:
        vectors.tofile(file)
        file.flush()
        return np.asarray(np.memmap(file, np.float32, "r", shape=vectors.shape))


def _is_mapped(vectors: Vectors) -> bool:
    base: Any = vectors
    while base is not None:
        if isinstance(base, np.memmap):
            return True
        base = getattr(base, "base", None)
    return False
