"""How positives propagate along the kNN graph (Wang et al., NeurIPS 2020, section 3.1).

In: a graph and anchors. Out: every node within `steps` directed hops of each anchor, in the order a
breadth-first search meets them. One body serves numpy (service) and torch (training), no
data-dependent shapes, so that it also runs inside a captured CUDA graph.
"""

from typing import NamedTuple

from array_api_compat import array_namespace, device

from trainer.representation.neighbours import Array, KnnGraph


class Reached(NamedTuple):
    """What was reached from each of B anchors; -1 in all three where there is nothing more."""

    ids: Array  # (B, W) int64, each id once, in order of discovery; the anchor left out
    steps: Array  # (B, W) int64, the hop (1..steps) at which it was discovered
    via: Array  # (B, W) int64, the node whose edge discovered it (the anchor at hop 1)


def propagate(graph: KnnGraph, anchors: Array, steps: int) -> Array:
    """Return the ids reached from each anchor in 1..steps hops: true breadth-first.

    Args:
        graph: only `neighbours` (N, K) is read; -1 entries lead nowhere.
        anchors: (B,) int64 node ids in 0..N-1.
        steps: number of hops, >= 1.

    Returns:
        (B, K + K^2 + ... + K^steps) int64: each id once, in order of discovery, the anchor left
        out, filled up with -1.
    """
    return propagate_paths(graph, anchors, steps).ids


def propagate_paths(graph: KnnGraph, anchors: Array, steps: int) -> Reached:
    """Like `propagate`, and say at which hop and through which node each id was discovered."""
    walks = all_walks(graph, anchors, steps)
    xp = array_namespace(walks.ids)
    new = (walks.ids >= 0) & (walks.ids != anchors[:, None]) & _first_in_row(walks.ids)
    # New ids move to the front, each group keeping its order: the breadth-first order, because the
    # first walk that ends in a node is a shortest one and comes from the first discovered parent.
    order = xp.argsort(xp.astype(~new, xp.int8), axis=1, stable=True)
    kept = xp.take_along_axis(new, order, axis=1)
    return Reached(
        *(
            xp.where(kept, xp.take_along_axis(values, order, axis=1), -1)
            for values in (walks.ids, walks.steps, walks.via)
        )
    )


def all_walks(graph: KnnGraph, anchors: Array, steps: int) -> Reached:
    """List the end of every walk of 1..steps hops: repeats and the anchor itself are kept.

    This is the concatenation that the authors' released code uses as its set of positives.

    Returns:
        three (B, K + K^2 + ... + K^steps) int64 arrays, hop by hop; -1 where a walk broke off.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    xp = array_namespace(graph.neighbours, anchors)
    batch, k = anchors.shape[0], graph.neighbours.shape[1]
    frontier = anchors[:, None]  # (B, 1), then (B, K), (B, K^2), ...
    ids, hops, via = [], [], []
    for hop in range(1, steps + 1):
        alive = frontier >= 0
        rows = xp.reshape(xp.where(alive, frontier, 0), (-1,))
        width = frontier.shape[1]  # stated, not -1: a batch of none leaves -1 undetermined
        nexts = xp.reshape(xp.take(graph.neighbours, rows, axis=0), (batch, width, k))
        nexts = xp.where(alive[:, :, None], nexts, -1)  # (B, width, K)
        parents = xp.broadcast_to(frontier[:, :, None], nexts.shape)
        frontier = xp.reshape(nexts, (batch, width * k))
        ids.append(frontier)
        broken = frontier < 0
        where = {"device": device(frontier)}
        hop_here = xp.full(frontier.shape, hop, dtype=frontier.dtype, **where)
        hops.append(xp.where(broken, -1, hop_here))
        via.append(xp.where(broken, -1, xp.reshape(parents, (batch, width * k))))
    return Reached(*(xp.concat(parts, axis=1) for parts in (ids, hops, via)))


def hardest_positives(reached: Array, similarities: Array, count: int) -> Array:
    """Pick the `count` reached ids that are least similar to the anchor: its hard positives.

    Args:
        reached: (B, W) ids, -1 where there is none.
        similarities: (B, W) of each id to the anchor; read only where the id is not -1.
        count: P, how many to pick, >= 1.

    Returns:
        (B, P) ids, least similar first (equal ones in their order in `reached`), -1 where fewer.
    """
    return pick_positives(reached, similarities, count, hardest=True)[0]


def pick_positives(
    reached: Array, similarities: Array, count: int, *, hardest: bool
) -> tuple[Array, Array]:
    """Pick positives and say how similar they are.

    Args:
        reached, similarities, count: as in `hardest_positives`.
        hardest: the least similar; otherwise the most similar, the paper's ablation.

    Returns:
        (B, P) ids, -1 where fewer, and their (B, P) similarities, 0 where the id is -1.
    """
    if count < 1:
        raise ValueError(f"the number of positives must be at least 1, got {count}")
    xp = array_namespace(reached, similarities)
    keys = xp.where(reached >= 0, similarities if hardest else -similarities, xp.inf)
    order = xp.argsort(keys, axis=1, stable=True)[:, :count]
    ids = xp.take_along_axis(reached, order, axis=1)
    picked = xp.where(ids >= 0, xp.take_along_axis(similarities, order, axis=1), 0.0)
    shape = (ids.shape[0], count - ids.shape[1])
    if shape[1] > 0:
        none = xp.full(shape, -1, dtype=ids.dtype, device=device(ids))
        ids = xp.concat([ids, none], axis=1)
        zeros = xp.zeros(shape, dtype=picked.dtype, device=device(picked))
        picked = xp.concat([picked, zeros], axis=1)
    return ids, picked


def _first_in_row(ids: Array) -> Array:
    """(B, W) -> bool: True where an id stands for the first time in its row."""
    xp = array_namespace(ids)
    order = xp.argsort(ids, axis=1, stable=True)
    ranked = xp.take_along_axis(ids, order, axis=1)
    first = xp.concat(
        [xp.ones_like(ranked[:, :1], dtype=xp.bool), ranked[:, 1:] != ranked[:, :-1]], axis=1
    )
    return xp.take_along_axis(first, xp.argsort(order, axis=1), axis=1)
