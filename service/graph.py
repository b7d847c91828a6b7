"""The exact kNN graph of the gallery, carried from one version to the next instead of built anew.

In: snapshots. Out: for each item its nearest other items, the same that a search would find, equal
similarities in the order of writing. Items are named by the sequence numbers that wrote them: rows
mean nothing in another snapshot, sequence numbers do.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.gallery.protocol import Rows, Snapshot, Vectors
from service.gallery.vectors import cosine

# Told the lists done and the lists to do; may raise, to end the work between two blocks.
Progress = Callable[[int, int], None]

_SEARCH_BLOCK = 256  # queries of one search: some 50 ms at 50,000 items, then requests get a turn
_SCAN_ROWS, _SCAN_ADDED = 8192, 1024  # one block of similarities: 32 MB
# More lists to search than this share of all: cheaper to search all than to scan besides.
_REBUILD_SHARE = 0.5


@dataclass(frozen=True)
class ItemGraph:
    """The k nearest other items of each of N items, at one version. 12 k bytes an item."""

    snapshot: Snapshot
    rows: Rows  # (N,) of the items in that snapshot, ascending
    seqs: Rows  # (N,) their sequence numbers, ascending
    neighbours: Rows  # (N, k) int64 sequence numbers, best first, -1 where there are fewer
    similarities: Vectors  # (N, k) float32, -inf where there are fewer

    def __len__(self) -> int:
        return len(self.seqs)

    @property
    def version(self) -> int:
        """The gallery_version that it belongs to."""
        return self.snapshot.version

    @property
    def k(self) -> int:
        """Neighbours kept of each item."""
        return int(self.neighbours.shape[1])

    @property
    def size_bytes(self) -> int:
        """Memory of the lists."""
        return self.neighbours.nbytes + self.similarities.nbytes

    def edges(self, snapshot: Snapshot, rows: Rows, k: int) -> Rows:
        """(n,) rows -> (n, k) rows of their nearest others, -1 where there are fewer.

        Args:
            snapshot: of this version; its rows may be numbered otherwise than those of ours.
            k: at most our own.
        """
        assert snapshot.version == self.version
        assert k <= self.k
        numbered = self.rows if snapshot is self.snapshot else snapshot.rows()
        wanted = self.neighbours[np.searchsorted(numbered, rows), :k]
        # -1 is found at place 0 and masked.
        return np.where(wanted >= 0, numbered[np.searchsorted(self.seqs, wanted)], -1)


def built_graph(snapshot: Snapshot, k: int, *, progress: Progress) -> ItemGraph:
    """The graph of all items by searching for each of them: N x N comparisons."""
    graph = _blank(snapshot, k)
    _search(graph, np.arange(len(graph)), progress)
    return graph


def carried_graph(old: ItemGraph, snapshot: Snapshot, *, progress: Progress) -> ItemGraph:
    """The graph of `snapshot`, from that of another version of the same gallery.

    What b items more cost is one scan of b x N: their own lists, and whose lists they enter. What a
    deleted item costs is a search for each list that held it. Where that comes to more than
    building, it is built. `old` is not changed.
    """
    graph = _blank(snapshot, old.k)
    if not len(old):
        _search(graph, np.arange(len(graph)), progress)
        return graph
    seqs = graph.seqs
    place = np.searchsorted(old.seqs, seqs).clip(max=len(old) - 1)
    kept = np.equal(old.seqs[place], seqs)
    wanted = ~kept  # whose lists are to be searched
    gone = old.seqs[~np.isin(old.seqs, seqs, assume_unique=True)]
    if len(gone):
        held = np.flatnonzero(np.isin(old.neighbours, gone).any(axis=1))
        wanted |= np.isin(place, held)
    if wanted.sum() > _REBUILD_SHARE * len(graph):
        _search(graph, np.arange(len(graph)), progress)
        return graph
    stay = np.flatnonzero(~wanted)
    graph.neighbours[stay] = old.neighbours[place[stay]]
    graph.similarities[stay] = old.similarities[place[stay]]
    _search(graph, np.flatnonzero(wanted), progress)
    _enter(graph, stay, np.flatnonzero(~kept), progress)
    return graph


def _blank(snapshot: Snapshot, k: int) -> ItemGraph:
    rows = snapshot.rows()
    return ItemGraph(
        snapshot,
        rows,
        snapshot.seqs(rows),
        np.full((len(rows), k), -1, np.int64),
        np.full((len(rows), k), -np.inf, np.float32),
    )


def _search(graph: ItemGraph, places: Rows, progress: Progress) -> None:
    """Fill the lists at these places by searching."""
    for start in range(0, len(places), _SEARCH_BLOCK):
        progress(start, len(places))
        block = places[start : start + _SEARCH_BLOCK]
        rows = graph.rows[block]
        found = graph.snapshot.search(graph.snapshot.vectors(rows), graph.k, exclude=rows)
        at = np.searchsorted(graph.rows, found.rows)
        graph.neighbours[block] = np.where(
            found.rows >= 0, graph.seqs[at.clip(max=len(graph) - 1)], -1
        )
        graph.similarities[block] = found.similarities


def _enter(graph: ItemGraph, stay: Rows, added: Rows, progress: Progress) -> None:
    """Let the items at the places `added` enter the lists at `stay` that they belong in."""
    dim = graph.snapshot.vectors(graph.rows[:1]).shape[1]
    # A float32 product of unit vectors is within D 2^-24 of the true one; twice, for their lengths.
    slack = np.float32(2 * dim * 2.0**-24)
    for first in range(0, len(added), _SCAN_ADDED):
        news = added[first : first + _SCAN_ADDED]
        new_vectors = graph.snapshot.vectors(graph.rows[news])
        for start in range(0, len(stay), _SCAN_ROWS):
            progress(0, len(added))
            places = stay[start : start + _SCAN_ROWS]
            vectors = graph.snapshot.vectors(graph.rows[places])
            floor = graph.similarities[places, -1]  # -inf where a list has room
            row, column = np.nonzero(vectors @ new_vectors.T >= (floor - slack)[:, None])
            exact = cosine(vectors[row], new_vectors[column])
            # One as similar as the last of the list was written later than it: it stays outside.
            enters = exact > floor[row]
            if enters.any():
                _merge(graph, places[row[enters]], graph.seqs[news[column[enters]]], exact[enters])


def _merge(graph: ItemGraph, places: Rows, seqs: Rows, similarities: Vectors) -> None:
    """Put entries (place of a list, sequence number, similarity) into lists, the k best stay."""
    touched, owner = np.unique(places, return_inverse=True)
    old_seqs, old_similarities = graph.neighbours[touched], graph.similarities[touched]
    old_owner, old_column = np.nonzero(old_seqs >= 0)
    owner = np.concatenate([old_owner, owner])
    seqs = np.concatenate([old_seqs[old_owner, old_column], seqs])
    similarities = np.concatenate([old_similarities[old_owner, old_column], similarities])
    order = np.lexsort((seqs, -similarities, owner))
    owner, seqs, similarities = owner[order], seqs[order], similarities[order]
    rank = np.arange(len(owner)) - np.searchsorted(owner, owner, side="left")
    best = rank < graph.k
    graph.neighbours[touched] = -1
    graph.similarities[touched] = -np.inf
    graph.neighbours[touched[owner[best]], rank[best]] = seqs[best]
    graph.similarities[touched[owner[best]], rank[best]] = similarities[best]


def marks_of(snapshot: Snapshot, rows: Rows) -> NDArray[np.uint64]:
    """(n,) -> (n,) a number for each item's vector that another vector hardly has."""
    marks = np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), _SCAN_ROWS):
        bits = snapshot.vectors(rows[start : start + _SCAN_ROWS]).astype("<f4").view("<u4")
        # Odd multipliers from a fixed stream: each bit of each component counts.
        odd = np.random.default_rng(0).integers(2**63, size=bits.shape[1], dtype=np.uint64) * 2 + 1
        marks[start : start + len(bits)] = (bits.astype(np.uint64) * odd).sum(
            axis=1, dtype=np.uint64
        )
    return marks
