"""A partition of all items into groups by mutual propagated reach.

In: a gallery snapshot and its kNN graph. Out: which group each item belongs to. The definition:

- `reach(i)`: what propagation meets from item i in 1..steps hops over the k nearest.
- i and j are partners where each is in the other's reach. Reach alone goes one way: an item at the
  edge reaches into the middle of a cluster that never reaches back.
- `support(i)`: how many partners i has. Where supports are equal, that of the item that was written
  earlier counts as greater.
- The guide of i is the most similar of its partners of greater support (of equally similar ones
  that which was written first). An item without one is a peak.
- Whoever follows guides ends at a peak. Those who end at the same peak are a group, and the peak is
  its representative. Groups of fewer than min_size items are dissolved: their items are ungrouped.

Connected components of partners were tried first: one bridge is enough to join two clusters, and on
real images one component holds three quarters of everything (service/README.md has the figures).
Following guides crosses no valley of support, so that bridges join nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.gallery.protocol import Rows, Snapshot, Vectors
from service.gallery.vectors import cosine
from trainer.representation.neighbours import KnnGraph
from trainer.representation.propagation import propagate

# Told what is being done, and how much of it; may raise, to end the work between two blocks.
Report = Callable[[str, int, int], None]
_WALKS_TOGETHER = 500_000  # ends of walks propagated at a time: some 50 MB
_PAIRS_TOGETHER = 100_000  # similarities computed at a time: 100 MB at 128 dimensions
# Pairs are sorted in so many parts, so that sorting takes no second copy of all of them.
_PARTS = 16


class Partition(NamedTuple):
    """Groups of items, by place (0..N-1 in the order of writing)."""

    members: NDArray[np.int64]  # (M,) places, group by group, the representative of each first
    similarities: Vectors  # (M,) float32 to the representative, descending within a group
    starts: NDArray[np.int64]  # (G + 1,) group g is members[starts[g] : starts[g + 1]]
    largest_dissolved: int  # size of the largest group below min_size, 0 where there is none


def partition(
    snapshot: Snapshot,
    rows: Rows,
    neighbours: NDArray[np.int64],
    *,
    steps: int,
    min_size: int,
    report: Report,
) -> Partition:
    """Partition the items, the larger groups first (equal ones: the earlier representative first).

    Args:
        rows: (N,) of all items, ascending.
        neighbours: (N, k) places of the k nearest of each, -1 where there are fewer.
        steps: hops, >= 1.
        min_size: of a group, >= 1.
    """
    count = len(rows)
    one, other = mutual_pairs(neighbours, steps, report)
    guides = _guides(snapshot, rows, one, other, report)
    peaks = _followed(guides)
    sizes = np.bincount(peaks, minlength=count)
    listed = np.flatnonzero(sizes >= max(1, min_size))
    listed = listed[np.lexsort((listed, -sizes[listed]))]
    rank = np.full(count, -1, np.int64)
    rank[listed] = np.arange(len(listed))
    members = np.flatnonzero(rank[peaks] >= 0)
    representatives = peaks[members]
    similarities = _similarities(snapshot, rows, members, representatives, "members", report)
    # The representative stands first, whatever else has the same vector.
    order = np.lexsort((members, -similarities, members != representatives, rank[representatives]))
    small = sizes[(sizes > 0) & (sizes < min_size)]
    return Partition(
        members[order],
        similarities[order],
        np.concatenate([[0], np.cumsum(sizes[listed])]).astype(np.int64),
        int(small.max(initial=0)),
    )


def mutual_pairs(
    neighbours: NDArray[np.int64], steps: int, report: Report
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pairs (one < other) of places that reach each other in at most `steps` hops.

    Memory: 8 bytes for each of the N x (k + ... + k^steps) walks at most, and a sixteenth of that.
    """
    count, k = neighbours.shape
    graph = KnnGraph(neighbours, np.empty((count, 0), np.float32))
    width = sum(k**step for step in range(1, steps + 1))
    block = max(1, _WALKS_TOGETHER // width)
    chunk = max(1, -(-count // _PARTS))
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(_PARTS)]
    for start in range(0, count, block):
        report("propagating", start, count)
        anchors = np.arange(start, min(start + block, count))
        reached = propagate(graph, anchors, steps)
        row, column = np.nonzero(reached >= 0)
        here, there = anchors[row], reached[row, column]
        first = np.minimum(here, there)
        keys = first * count + np.maximum(here, there)
        part = first // chunk
        order = np.argsort(part, kind="stable")
        ends = np.searchsorted(part[order], np.arange(_PARTS + 1))
        for number in range(_PARTS):
            if ends[number] < ends[number + 1]:
                parts[number].append(keys[order[ends[number] : ends[number + 1]]])
    found = [np.empty(0, np.int64)]
    for number in range(_PARTS):
        report("matching", number, _PARTS)
        if parts[number]:
            keys = np.concatenate(parts[number])
            parts[number] = []
            keys.sort()
            found.append(keys[1:][keys[1:] == keys[:-1]])  # met from both sides
    pairs = np.concatenate(found)
    return pairs // max(1, count), pairs % max(1, count)


def _guides(
    snapshot: Snapshot,
    rows: Rows,
    one: NDArray[np.int64],
    other: NDArray[np.int64],
    report: Report,
) -> NDArray[np.int64]:
    """(N,) the guide of each item, itself where it is a peak."""
    count = len(rows)
    support = np.bincount(one, minlength=count) + np.bincount(other, minlength=count)
    # Of a pair the one of greater support guides the other; `one` was written earlier.
    upwards = support[one] >= support[other]
    guided, guide = np.where(upwards, other, one), np.where(upwards, one, other)
    similarities = _similarities(snapshot, rows, guided, guide, "guiding", report)
    order = np.lexsort((guide, -similarities, guided))
    guided, guide = guided[order], guide[order]
    first = np.ones(len(guided), bool)
    first[1:] = guided[1:] != guided[:-1]
    guides = np.arange(count)
    guides[guided[first]] = guide[first]
    return guides


def _followed(guides: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) where each ends who follows guides; paths are halved at each turn."""
    while True:
        further = guides[guides]
        if np.array_equal(further, guides):
            return guides
        guides = further


def _similarities(
    snapshot: Snapshot,
    rows: Rows,
    ones: NDArray[np.int64],
    others: NDArray[np.int64],
    stage: str,
    report: Report,
) -> Vectors:
    similarities = np.empty(len(ones), np.float32)
    for start in range(0, len(ones), _PAIRS_TOGETHER):
        report(stage, start, len(ones))
        part = slice(start, start + _PAIRS_TOGETHER)
        similarities[part] = cosine(
            snapshot.vectors(rows[ones[part]]), snapshot.vectors(rows[others[part]])
        )
    return similarities
