"""What a nearest neighbour and a kNN graph are, and the plain exact search, the reference for all.

In: float32 rows of unit length. Out: ids and cosine similarities, best first; equal similarities in
ascending order of id (equal as float32: blocks of another size may round the last bit otherwise).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = Any  # numpy.ndarray or torch.Tensor: whatever the array API serves

# Queries taken together: with blocks of 8192 gallery rows one block of similarities is 32 MB.
QUERY_BLOCK = 1024


class Neighbours(NamedTuple):
    """The K best gallery rows for each of B queries."""

    ids: Array  # (B, K) int64, best first, -1 where there are fewer than K
    similarities: Array  # (B, K) float32, descending, -inf where the id is -1


class KnnGraph(NamedTuple):
    """K directed edges from each of N nodes to its nearest other nodes."""

    neighbours: Array  # (N, K) int64; row i never contains i; -1 where a node has fewer
    similarities: Array  # (N, K) float32


def exact_neighbours(
    queries: Array,
    gallery: Array,
    k: int,
    *,
    exclude: Array | None = None,
    block: int = 8192,
) -> Neighbours:
    """Find the k gallery rows of highest inner product with each query, by looking at all of them.

    Args:
        queries: (B, D) float; unit length makes the product a cosine in [-1, 1].
        gallery: (N, D) float.
        k: how many to return, >= 1. Where the gallery holds fewer, rows end in -1 / -inf.
        exclude: (B,) one gallery row to leave out for each query, -1 for none.
        block: gallery rows compared at a time; memory is QUERY_BLOCK x block floats.

    Raises:
        ValueError: shapes that do not fit, or k < 1.
    """
    queries, gallery = np.asarray(queries), np.asarray(gallery)
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"queries {queries.shape} and gallery {gallery.shape} must be (B, D) and (N, D)"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    left_out = np.full(len(queries), -1) if exclude is None else np.asarray(exclude)
    if left_out.shape != (len(queries),):
        raise ValueError(f"exclude must be ({len(queries)},), got {left_out.shape}")

    found = Neighbours(
        np.full((len(queries), k), -1, np.int64),
        np.full((len(queries), k), -np.inf, np.float32),
    )
    for first in range(0, len(queries), QUERY_BLOCK):
        rows = slice(first, first + QUERY_BLOCK)
        ids, similarities = found.ids[rows], found.similarities[rows]  # views, filled in place
        for start in range(0, len(gallery), block):
            scores = queries[rows] @ gallery[start : start + block].T  # (b, block)
            own = left_out[rows] - start
            inside = np.flatnonzero((own >= 0) & (own < scores.shape[1]))
            scores[inside, own[inside]] = -np.inf
            _merge_best(ids, similarities, scores.astype(np.float32, copy=False), start)
    return found


def exact_graph(embeddings: Array, k: int, *, block: int = 8192) -> KnnGraph:
    """Build the exact kNN graph of (N, D) unit rows: (N, k) neighbours, no node its own."""
    found = exact_neighbours(
        embeddings, embeddings, k, exclude=np.arange(len(embeddings)), block=block
    )
    return KnnGraph(found.ids, found.similarities)


def _merge_best(
    ids: NDArray[np.int64],
    similarities: NDArray[np.float32],
    scores: NDArray[np.float32],
    start: int,
) -> None:
    """Keep the k best of what was found so far (b, k) and of a block of scores (b, width)."""
    k, width = ids.shape[1], scores.shape[1]
    # What cannot reach the k-th place is dropped first; a tie with it stays for the sort to decide.
    floor = similarities[:, -1]
    if width > k:
        floor = np.maximum(floor, np.partition(scores, width - k, axis=1)[:, width - k])
    row, column = np.nonzero((scores >= floor[:, None]) & (scores > -np.inf))
    old_row, old_column = np.nonzero(ids >= 0)
    row = np.concatenate([old_row, row])
    candidate = np.concatenate([ids[old_row, old_column], column + start])
    score = np.concatenate([similarities[old_row, old_column], scores[row[len(old_row) :], column]])
    order = np.lexsort((candidate, -score, row))
    row, candidate, score = row[order], candidate[order], score[order]
    place = np.arange(len(row)) - np.searchsorted(row, row, side="left")  # rank within its row
    kept = place < k
    ids.fill(-1)
    similarities.fill(-np.inf)
    ids[row[kept], place[kept]] = candidate[kept]
    similarities[row[kept], place[kept]] = score[kept]
