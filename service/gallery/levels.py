"""How a snapshot grows: new rows become a small segment, small segments become larger ones.

In: a snapshot, the rows that a change kills, the records it adds. Out: the next snapshot. Segments
are merged so that each is at least twice as large as the next one: a row is copied only about as
often as the gallery doubles, and a search meets few segments.
"""

from typing import Any

import numpy as np

from service.gallery.faiss_index import FaissSnapshot, Mask
from service.gallery.protocol import Rows
from service.gallery.records import Records, join
from service.gallery.segment import Segment

SMALL_ROWS = 4096  # a last segment up to here is made anew with every change
MAX_DEAD = 512  # dead rows that a segment keeps ...
DEAD_SHARE = 4  # ... or its rows / this, where that is more
# Segments are not merged beyond this while a change waits (about 50 ms at 128 dimensions), and
# larger ones keep their dead rows until the upkeep makes them anew.
MERGED_ROWS = 131_072


def advance(old: FaissSnapshot, *, gone: Rows, fresh: Records, version: int) -> FaissSnapshot:
    """The snapshot after a change.

    Args:
        gone: (n,) live rows of `old` that the change replaces or deletes.
        fresh: what it writes; sequence numbers above all of `old`.
    """
    dead = old.dead.copy()
    dead[gone] = True
    kept = [
        (segment, dead[first : first + len(segment)])
        for segment, first in zip(old.segments, old.firsts.tolist(), strict=False)
    ]
    last = [fresh] if len(fresh) else []
    size = len(fresh)
    while kept and size and _joins(kept[-1][0], size):
        segment, its_dead = kept.pop()
        last.insert(0, _live(segment, its_dead))
        size += len(last[0])
    parts = [_cleared(segment, its_dead, old.gpu) for segment, its_dead in kept]
    if size:
        # A small segment stays off the GPU: it is made anew with every change.
        gpu = old.gpu if size >= SMALL_ROWS else None
        parts.append((Segment.of(join(last), gpu=gpu), np.zeros(size, bool)))
    parts = [(segment, its_dead) for segment, its_dead in parts if len(segment)]
    flags = np.concatenate([np.zeros(0, bool), *(its_dead for _, its_dead in parts)])
    return FaissSnapshot(
        version, old.dim, old.gpu, tuple(s for s, _ in parts), flags, int(flags.sum())
    )


def adopt(current: FaissSnapshot, built: Segment, built_at: int) -> FaissSnapshot:
    """The current snapshot with a segment that was made of all its items as of an older version.

    Args:
        built_at: the version of the snapshot whose live rows `built` holds.
    """
    live = current.rows()
    seqs = current.seqs(live)
    older = int(np.searchsorted(seqs, built_at, side="right"))
    place = np.searchsorted(built.records.seqs, seqs[:older])
    dead = np.ones(len(built), bool)
    dead[place] = False
    assert older == 0 or (built.records.seqs[place] == seqs[:older]).all(), "not of this gallery"
    fresh = current.take(live[older:])
    segments = [built] if len(built) else []
    if len(fresh):
        segments.append(Segment.of(fresh))
        dead = np.concatenate([dead, np.zeros(len(fresh), bool)])
    return FaissSnapshot(
        current.version, current.dim, current.gpu, tuple(segments), dead, int(dead.sum())
    )


def _joins(segment: Segment, size: int) -> bool:
    if segment.kind != "flat" or len(segment) + size > MERGED_ROWS:
        return False
    return len(segment) < SMALL_ROWS or len(segment) < 2 * size


def _live(segment: Segment, dead: Mask) -> Records:
    return segment.records.take(np.flatnonzero(~dead)) if dead.any() else segment.records


def _cleared(segment: Segment, dead: Mask, gpu: Any) -> tuple[Segment, Mask]:
    """Without its dead rows where they are many."""
    count = int(dead.sum())
    kept_whole = segment.kind != "flat" or len(segment) > MERGED_ROWS
    if kept_whole or count <= max(MAX_DEAD, len(segment) // DEAD_SHARE):
        return segment, dead
    records = _live(segment, dead)
    on = gpu if len(records) >= SMALL_ROWS else None
    return Segment.of(records, gpu=on), np.zeros(len(records), bool)
