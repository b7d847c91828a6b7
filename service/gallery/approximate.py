"""Indexes that find most of the nearest rows without looking at all: HNSW, IVF, CAGRA on a GPU.

In: the vectors of a segment. Out: candidates of a search, best first, and the index as bytes, so
that it need not be built again. The vectors themselves stay outside: an HNSW graph works on the
segment's own array; an IVF holds half-precision copies for galleries whose vectors stay on disk.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast

import faiss as _stubbed
import numpy as np
from numpy.typing import NDArray

from service.gallery.protocol import Rows, Vectors

faiss: Any = _stubbed  # its type stubs lack half of what is used here

# M of HNSW: links of a node; twice as many on the lowest level. 32 is what recall of 0.95 at a
# million items needs with a small breadth (measured), at about 270 bytes an item.
HNSW_LINKS = 32
HNSW_BUILD_BREADTH = 80
HNSW_BYTES = 4 * 2 * HNSW_LINKS + 16  # of links, for each item
# Added at a time: between blocks a service that stops calls the building off.
HNSW_BLOCK_ROWS, IVF_BLOCK_ROWS = 8192, 65_536
IVF_SAMPLE = 64  # rows for each list that the lists are learned from

Bits = NDArray[np.uint8]  # one bit a row, lowest first: which rows count


class Approximate(Protocol):
    """An index over N rows."""

    kind: str
    num_bytes: int  # beside the segment's own vectors

    def search(
        self, queries: Vectors, count: int, *, effort: int, allowed: Bits | None
    ) -> tuple[Vectors, Rows]:
        """(B, D) -> scores and rows (B, count), best first, row -1 where it found fewer.

        Args:
            effort: how much it looks at: breadth of HNSW, lists of IVF.
            allowed: only these rows.
        """
        ...

    def to_bytes(self) -> NDArray[np.uint8] | None:
        """What `load` takes; None where building it again is as good."""
        ...


class Stopped(Exception):
    """Building was called off."""


def build(
    kind: str,
    vectors: Vectors,
    *,
    gpu: Any = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Approximate:
    """Build an index of (N, D) vectors; uses as many threads as faiss has in this thread.

    Args:
        stopping: asked from time to time.

    Raises:
        Stopped: `stopping` said so.
    """
    return cast(Approximate, _KINDS[kind].build(vectors, gpu, stopping))


def load(kind: str, content: NDArray[np.uint8], vectors: Vectors) -> Approximate:
    """An index out of its bytes, which must be verified: faiss' reader trusts them.

    Raises:
        ValueError: the bytes do not fit the vectors.
    """
    reader = faiss.ZeroCopyIOReader(faiss.swig_ptr(content), content.nbytes)
    index = faiss.read_index(reader, faiss.IO_FLAG_SKIP_STORAGE)
    if index.ntotal != len(vectors) or index.d != vectors.shape[1]:
        raise ValueError(
            f"the index holds {index.ntotal} rows of {index.d}, wanted {vectors.shape}"
        )
    return cast(Approximate, _KINDS[kind].around(index, vectors, content))


def default_effort(kind: str, rows: int) -> int:
    """What gave a recall@10 above 0.95 where it was measured; service.tune finds the gallery's."""
    if kind == "ivf":
        return max(1, _lists(rows) // 16)
    return 64 if rows <= 250_000 else 96


class Hnsw:
    """A graph of near neighbours, walked from far to near."""

    kind = "hnsw"

    def __init__(self, index: Any, vectors: Vectors, content: Any = None) -> None:
        assert vectors.dtype == np.float32
        assert vectors.flags.c_contiguous
        self._index = index
        self._vectors = vectors
        self._content = content  # which the index looks at, where it was loaded
        # The graph compares with the segment's array, not with a copy of its own.
        self._storage = faiss.IndexFlatIP(vectors.shape[1])
        self._storage.codes = faiss.MaybeOwnedVectorUInt8.create_view(
            faiss.swig_ptr(vectors.reshape(-1).view(np.uint8)),
            vectors.nbytes,
            self._storage.codes.owner,
        )
        self._storage.ntotal = len(vectors)
        copy = index.storage
        index.storage, index.own_fields = self._storage, False
        if copy is not None:
            copy.this.own(True)  # faiss' copy goes with this name
        self.num_bytes = HNSW_BYTES * len(vectors)

    @classmethod
    def build(cls, vectors: Vectors, gpu: Any, stopping: Callable[[], bool]) -> "Hnsw":
        """Build the graph."""
        del gpu
        index = faiss.IndexHNSWFlat(vectors.shape[1], HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = HNSW_BUILD_BREADTH
        for block in _blocks(vectors, HNSW_BLOCK_ROWS, stopping):
            index.add(block)
        return cls(index, vectors)

    @classmethod
    def around(cls, index: Any, vectors: Vectors, content: NDArray[np.uint8]) -> "Hnsw":
        """An index that was read."""
        return cls(index, vectors, content)

    def search(
        self, queries: Vectors, count: int, *, effort: int, allowed: Bits | None
    ) -> tuple[Vectors, Rows]:
        """See Approximate.search."""
        options = faiss.SearchParametersHNSW(efSearch=max(effort, count))
        if allowed is not None:
            options = faiss.SearchParametersHNSW(
                efSearch=max(effort, count), sel=faiss.IDSelectorBitmap(allowed)
            )
        scores, rows = self._index.search(queries, count, params=options)
        return scores, rows

    def to_bytes(self) -> NDArray[np.uint8] | None:
        """The graph alone."""
        return _bytes_of(self._index)


class Ivf:
    """Rows in lists by the nearest of some centres, in half precision; near lists are read."""

    kind = "ivf"

    def __init__(self, index: Any, content: Any = None) -> None:
        self._index = index
        self._content = content
        self.num_bytes = (2 * index.d + 8) * index.ntotal + 4 * index.d * index.nlist

    @classmethod
    def build(cls, vectors: Vectors, gpu: Any, stopping: Callable[[], bool]) -> "Ivf":
        """Learn the centres from a sample of the rows and sort the rows into the lists."""
        del gpu
        dim, lists = vectors.shape[1], _lists(len(vectors))
        index = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(dim),
            dim,
            lists,
            faiss.ScalarQuantizer.QT_fp16,
            faiss.METRIC_INNER_PRODUCT,
            False,  # the vectors themselves, not what is left beside their centre
        )
        step = max(1, len(vectors) // (IVF_SAMPLE * lists))
        index.train(np.ascontiguousarray(vectors[::step]))
        for block in _blocks(vectors, IVF_BLOCK_ROWS, stopping):
            index.add(block)
        return cls(index)

    @classmethod
    def around(cls, index: Any, vectors: Vectors, content: NDArray[np.uint8]) -> "Ivf":
        """An index that was read."""
        del vectors
        return cls(index, content)

    def search(
        self, queries: Vectors, count: int, *, effort: int, allowed: Bits | None
    ) -> tuple[Vectors, Rows]:
        """See Approximate.search."""
        options = faiss.SearchParametersIVF(nprobe=effort)
        if allowed is not None:
            options = faiss.SearchParametersIVF(nprobe=effort, sel=faiss.IDSelectorBitmap(allowed))
        scores, rows = self._index.search(queries, count, params=options)
        return scores, rows

    def to_bytes(self) -> NDArray[np.uint8] | None:
        """Centres and lists."""
        return _bytes_of(self._index)


class Cagra:
    """A graph on the GPU, where faiss was built with cuVS."""

    kind = "cagra"
    num_bytes = 0  # of the host's memory

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def build(cls, vectors: Vectors, gpu: Any, stopping: Callable[[], bool]) -> "Cagra":
        """Build the graph on the GPU."""
        index = faiss.GpuIndexCagra(gpu, vectors.shape[1], faiss.METRIC_INNER_PRODUCT)
        del stopping  # seconds at most
        index.train(vectors)
        return cls(index)

    @classmethod
    def around(cls, index: Any, vectors: Vectors, content: NDArray[np.uint8]) -> "Cagra":
        """Never called: `to_bytes` gives none."""
        raise ValueError("an index of kind cagra is built anew, not loaded")

    def search(
        self, queries: Vectors, count: int, *, effort: int, allowed: Bits | None
    ) -> tuple[Vectors, Rows]:
        """See Approximate.search; rows that do not count are left out of what was found."""
        options = faiss.SearchParametersCagra()
        options.itopk_size = max(effort, count)
        scores, rows = self._index.search(queries, count, params=options)
        if allowed is not None:
            flags = np.unpackbits(allowed, bitorder="little").astype(bool)
            rows = np.where((rows >= 0) & flags[rows], rows, -1)
        return scores, rows

    def to_bytes(self) -> NDArray[np.uint8] | None:
        """Built anew on the GPU sooner than read."""
        return None


_KINDS: Mapping[str, Any] = {"hnsw": Hnsw, "ivf": Ivf, "cagra": Cagra}


def _blocks(vectors: Vectors, rows: int, stopping: Callable[[], bool]) -> Iterator[Vectors]:
    for start in range(0, len(vectors), rows):
        if stopping():
            raise Stopped
        yield np.ascontiguousarray(vectors[start : start + rows])


def _lists(rows: int) -> int:
    return int(max(1, min(4 * rows**0.5, rows // 39)))  # faiss warns below 39 rows a list


def _bytes_of(index: Any) -> NDArray[np.uint8]:
    writer = faiss.VectorIOWriter()
    faiss.write_index(index, writer, faiss.IO_FLAG_SKIP_STORAGE)
    content: NDArray[np.uint8] = faiss.vector_to_array(writer.data)
    return content
