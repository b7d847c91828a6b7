"""Propagated groups: what is reached from an anchor by walking the kNN graph, hop by hop.

In: a gallery snapshot and anchors (rows, or vectors that are no item). Out: the members of each
group. Edges come from the kept graph, or are searched for around the anchors only, as far as the
walks go; then the very propagation that finds positives in training runs on them.
"""

import math
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.gallery.protocol import Rows, Snapshot, Vectors
from service.gallery.vectors import cosine
from service.graph import ItemGraph
from trainer.representation.neighbours import KnnGraph
from trainer.representation.propagation import propagate_paths

Order = Literal["nearest", "hardest", "step"]


class Member(NamedTuple):
    """One item of a group."""

    row: int  # of the snapshot
    step: int  # the hop at which it was discovered, from 1
    via: int | None  # the row whose edge discovered it; None: an anchor that is no item
    similarity: np.float32  # cosine to the anchor


class Group(NamedTuple):
    """What was reached from one anchor."""

    members: list[Member]
    reached: int  # how many there are; more than the members where truncated
    truncated: bool


def walk_width(k: int, steps: int) -> int:
    """k + k^2 + ... + k^steps: the walks from one anchor."""
    return sum(k**step for step in range(1, steps + 1))


def propagated_groups(
    snapshot: Snapshot,
    *,
    vectors: Vectors,
    rows: Rows,
    k: int,
    steps: int,
    order: Order,
    limit: int,
    graph: ItemGraph | None = None,
    deadline: float = math.inf,
) -> list[Group]:
    """Find the group of each anchor.

    Args:
        vectors: (B, D) the anchors' vectors.
        rows: (B,) the anchors' rows in the snapshot, -1 for one that is no item.
        k: edges of each node of the graph, >= 1.
        steps: hops, >= 1.
        order: "nearest" or "hardest" (least similar) to the anchor first, or by discovery.
        limit: members returned of each group.
        graph: of the snapshot's version with at least k neighbours; None: edges are searched for,
            which gives the same.
        deadline: on time.monotonic; looked at before each hop.

    Raises:
        TimeoutError: the deadline passed: whoever asked is gone.
    """
    edges, anchors, row_of = _local_graph(snapshot, graph, vectors, rows, k, steps, deadline)
    reached = propagate_paths(edges, anchors, steps)
    groups = []
    for anchor, ids, hops, via in zip(range(len(anchors)), *reached, strict=True):
        count = int((ids >= 0).sum())  # the entries stand in front
        members = row_of[ids[:count]]
        similarities = cosine(
            np.broadcast_to(vectors[anchor], (count, vectors.shape[1])), snapshot.vectors(members)
        )
        ranking = _ranking(similarities, order)[:limit]
        parents = row_of[via[:count]]
        groups.append(
            Group(
                [
                    Member(
                        int(members[i]),
                        int(hops[i]),
                        int(parents[i]) if parents[i] >= 0 else None,
                        similarities[i],
                    )
                    for i in ranking
                ],
                reached=count,
                truncated=count > limit,
            )
        )
    return groups


def _local_graph(
    snapshot: Snapshot,
    graph: ItemGraph | None,
    vectors: Vectors,
    rows: Rows,
    k: int,
    steps: int,
    deadline: float,
) -> tuple[KnnGraph, Rows, Rows]:
    """The edges that walks of `steps` hops from the anchors can use.

    Returns:
        the graph in numbers of its own; the anchors (B,) in these numbers; and the snapshot's row
        of each number, -1 for an anchor that is no item. Nodes met at the last hop have no edges.
    """
    strangers = np.flatnonzero(rows < 0)
    sources, targets = [], []  # rows, and the rows that their edges lead to
    reached = frontier = np.unique(rows[rows >= 0])  # all rows met; those whose edges are wanted
    from_strangers = np.empty((0, k), np.int64)
    for hop in range(steps):
        if time.monotonic() > deadline:
            raise TimeoutError
        met = [reached]
        if len(frontier):
            sources.append(frontier)
            targets.append(_edges(snapshot, graph, frontier, k))
            met.append(targets[-1].ravel())
        if hop == 0 and len(strangers):
            from_strangers = snapshot.search(vectors[strangers], k).rows
            met.append(from_strangers.ravel())
        together = np.unique(np.concatenate(met))
        together = together[together >= 0]
        frontier = np.setdiff1d(together, reached, assume_unique=True)
        reached = together

    # Rows are numbered in ascending order, strangers after them.
    row_of = np.concatenate([reached, np.full(len(strangers), -1, np.int64)])
    anchors = np.searchsorted(reached, rows)
    anchors[strangers] = len(reached) + np.arange(len(strangers))
    neighbours = np.full((len(row_of), k), -1, np.int64)
    if sources:
        ends = np.concatenate(targets)
        local = np.where(ends >= 0, np.searchsorted(reached, ends), -1)
        neighbours[np.searchsorted(reached, np.concatenate(sources))] = local
    if len(strangers):
        local = np.where(from_strangers >= 0, np.searchsorted(reached, from_strangers), -1)
        neighbours[anchors[strangers]] = local
    unused = np.empty((len(row_of), 0), np.float32)  # propagation reads the neighbours alone
    return KnnGraph(neighbours, unused), anchors, row_of


def _edges(snapshot: Snapshot, graph: ItemGraph | None, rows: Rows, k: int) -> Rows:
    """(n,) -> (n, k) rows of the nearest others: from the graph, or by searching for them."""
    if graph is not None:
        return graph.edges(snapshot, rows, k)
    return snapshot.search(snapshot.vectors(rows), k, exclude=rows).rows


def _ranking(similarities: Vectors, order: Order) -> NDArray[np.int64] | Sequence[int]:
    """Places in the wanted order; equal ones stay in the order of discovery."""
    if order == "step":
        return range(len(similarities))
    keys = similarities if order == "hardest" else -similarities
    return np.argsort(keys, kind="stable")
