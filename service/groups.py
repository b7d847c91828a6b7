"""Propagated groups: what is reached from an anchor by walking the kNN graph, hop by hop.

In: a gallery snapshot and anchors (rows, or vectors that are no item). Out: the members of each
group. The graph is built around the anchors only, as far as the walks go, and then handed to the
very propagation that finds positives in training.
"""

import math
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.gallery.protocol import Rows, Snapshot, Vectors
from service.gallery.vectors import cosine
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
        deadline: on time.monotonic; looked at before each hop.

    Raises:
        TimeoutError: the deadline passed: whoever asked is gone.
    """
    graph, anchors, row_of = _local_graph(snapshot, vectors, rows, k, steps, deadline)
    reached = propagate_paths(graph, anchors, steps)
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
    number: dict[int, int] = {}
    row_of: list[int] = []
    edges: list[Rows] = []

    def number_of(row: int) -> int:
        if row not in number:
            number[row] = len(row_of)
            row_of.append(row)
        return number[row]

    anchors = np.empty(len(rows), np.int64)
    frontier: list[int] = []  # rows whose edges are still wanted
    strangers: list[int] = []
    for place, row in enumerate(rows):
        if row >= 0:
            known = len(row_of)
            anchors[place] = number_of(int(row))
            if len(row_of) > known:
                frontier.append(int(row))
        else:
            anchors[place] = len(row_of)
            row_of.append(-1)
            strangers.append(place)

    sources: list[int] = []  # numbers, in the order of `edges`
    for hop in range(steps):
        if time.monotonic() > deadline:
            raise TimeoutError
        targets: list[Rows] = []
        if frontier:
            wanted = np.asarray(frontier, np.int64)
            found = snapshot.search(snapshot.vectors(wanted), k, exclude=wanted)
            sources.extend(number[row] for row in frontier)
            targets.append(found.rows)
        if hop == 0 and strangers:
            found = snapshot.search(vectors[strangers], k)
            sources.extend(int(anchors[place]) for place in strangers)
            targets.append(found.rows)
        frontier = []
        for block in targets:
            local = np.full(block.shape, -1, np.int64)
            for at, row in np.ndenumerate(block):
                if row >= 0:
                    known = len(row_of)
                    local[at] = number_of(int(row))
                    if len(row_of) > known:
                        frontier.append(int(row))
            edges.append(local)

    neighbours = np.full((len(row_of), k), -1, np.int64)
    if sources:
        neighbours[np.asarray(sources)] = np.concatenate(edges)
    unused = np.empty((len(row_of), 0), np.float32)  # propagation reads the neighbours alone
    return KnnGraph(neighbours, unused), anchors, np.asarray(row_of, np.int64)


def _ranking(similarities: Vectors, order: Order) -> NDArray[np.int64] | Sequence[int]:
    """Places in the wanted order; equal ones stay in the order of discovery."""
    if order == "step":
        return range(len(similarities))
    keys = similarities if order == "hardest" else -similarities
    return np.argsort(keys, kind="stable")
