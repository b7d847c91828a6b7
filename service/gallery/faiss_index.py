"""Search over the gallery with faiss: immutable segments, joined by one snapshot.

In: unit vectors in the order in which they were written, with ids, metadata and sequence numbers.
Out: neighbours in an order that does not depend on how the rows are cut into segments, on the batch
or on the device: faiss only proposes candidates, their cosines are computed again in float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from service.gallery.approximate import Bits
from service.gallery.protocol import Filter, Found, Item, Page, Rows, Vectors
from service.gallery.records import Records, join, none_of
from service.gallery.segment import Segment, nearest, score_error

EXTRA_CANDIDATES = 8  # proposed beyond k at the first try, so that near ties are seen whole
# Where more candidates than this are too close to tell apart, all rows are looked at instead.
MAX_CANDIDATES = 4096
# A filter that leaves less than this share of the rows is searched in a copy of their vectors.
GATHERED_SHARE = 0.1
_RESCORE_FLOATS = 4_000_000  # float64 values gathered at a time: 32 MB
_BLOCK_ROWS = 65_536  # rows of a filtered search gathered at a time

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class FaissSnapshot:
    """The items at one version: segments one after the other, and which of their rows are dead.

    Rows number the segments' rows in their order. Rows that were replaced or deleted stay in their
    segment until it is made anew. Every id lives in one row at most.
    """

    version: int
    dim: int
    gpu: Any  # faiss' resources where segments live on a GPU, else None
    segments: tuple[Segment, ...]  # none of them empty
    dead: Mask = field(repr=False)  # (rows,)
    num_dead: int

    @classmethod
    def of(cls, records: Records, version: int, *, gpu: Any = None) -> "FaissSnapshot":
        """All records in one segment."""
        segments = (Segment.of(records, gpu=gpu),) if len(records) else ()
        dim = records.vectors.shape[1]
        return cls(version, dim, gpu, segments, np.zeros(len(records), bool), 0)

    @property
    def device(self) -> str:
        """Where the large segments are searched."""
        return "cpu" if self.gpu is None else "gpu"

    def index(self) -> Mapping[str, Any]:
        """How a search without `exact` is done; see protocol.Snapshot."""
        kind, effort = "flat", 0
        if self.segments:
            kind, effort = self.segments[0].kind, self.segments[0].effort
        return {"index": kind, "exact": not effort, "effort": effort, "bytes": self.num_bytes}

    def __len__(self) -> int:
        return len(self.dead) - self.num_dead

    @cached_property
    def firsts(self) -> Rows:
        """(segments + 1,) the first row of each segment, and the number of all rows."""
        return np.cumsum([0, *map(len, self.segments)])

    def row(self, item_id: str) -> int | None:
        """The row of an item, None when there is none of that id."""
        for number in reversed(range(len(self.segments))):  # older segments hold older writings
            inside = self.segments[number].row_of.get(item_id)
            if inside is not None:
                row = int(self.firsts[number]) + inside
                return None if self.dead[row] else row
        return None

    @cached_property
    def _live(self) -> Rows:
        rows = np.flatnonzero(~self.dead)
        rows.flags.writeable = False
        return rows

    def rows_of(self, ids: Sequence[str]) -> Rows:
        """(n,) -> (n,) rows of these ids, -1 where there is none."""
        found = (self.row(item_id) for item_id in ids)
        return np.asarray([-1 if row is None else row for row in found], np.int64)

    def rows(self) -> Rows:
        """The rows of all items, ascending; see protocol.Snapshot."""
        return self._live

    def seqs(self, rows: Rows) -> Rows:
        """(n,) -> (n,) sequence numbers; see protocol.Snapshot."""
        return self._gather(rows, np.empty(len(rows), np.int64), lambda r: r.seqs)

    def ids(self, rows: Rows) -> NDArray[np.object_]:
        """(n,) -> (n,) str; see protocol.Snapshot."""
        return self._gather(rows, np.empty(len(rows), np.object_), lambda r: r.ids)

    def vectors(self, rows: Rows) -> Vectors:
        """(n,) -> (n, D)."""
        gathered = np.empty((len(rows), self.dim), np.float32)
        return self._gather(rows, gathered, lambda r: r.vectors)

    def item(self, row: int) -> Item:
        """The item in a row."""
        number = int(np.searchsorted(self.firsts, row, side="right")) - 1
        records, inside = self.segments[number].records, row - int(self.firsts[number])
        return Item(records.ids[inside], records.vectors[inside], records.parsed(inside))

    def items(self, rows: Rows) -> list[Item]:
        """(n,) -> the items in these rows."""
        return [self.item(row) for row in np.asarray(rows).tolist()]

    def matching(self, filter: Filter) -> Rows:
        """Rows of the live items whose metadata match, ascending."""
        if not filter:
            return self.rows()
        parts = [
            segment.postings.matching(filter) + first
            for segment, first in zip(self.segments, self.firsts, strict=False)
        ]
        rows = np.concatenate([np.empty(0, np.int64), *parts])
        return rows[~self.dead[rows]] if self.num_dead else rows

    def page(self, *, after: int, limit: int, where: Filter | None = None) -> Page:
        """At most `limit` live rows with a sequence number above `after`, in that order."""
        rows = self.matching(where or {})
        first = self._rows_until(after, rows)
        chosen = rows[first : first + limit]
        more = first + limit < len(rows)
        return Page(chosen, int(self.seqs(chosen[-1:])[0]) if more else None)

    def take(self, rows: Rows) -> Records:
        """Ascending rows as columns."""
        parts = []
        for segment, first in zip(self.segments, self.firsts.tolist(), strict=False):
            inside = rows[(rows >= first) & (rows < first + len(segment))] - first
            whole = len(inside) == len(segment)
            parts.append(segment.records if whole else segment.records.take(inside))
        return join([none_of(self.dim), *parts])

    @property
    def num_bytes(self) -> int:
        """What the index takes in memory; see Segment.num_bytes."""
        return sum(segment.num_bytes for segment in self.segments)

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        exclude: Rows | None = None,
        where: Filter | None = None,
        among: Rows | None = None,
        exact: bool = True,
    ) -> Found:
        """The k items most similar to each query; see protocol.Snapshot.search.

        Args:
            among: only these rows count, in place of a filter.
        """
        if where:
            among = self.matching(where)
        queries = np.ascontiguousarray(queries, np.float32)
        if not exact and among is None and self.segments:
            first = self.segments[0]
            if first.approximate is not None:
                return self._approximately(first, queries, k, exclude)
        best = _Best(queries, k, exclude)
        if among is not None and len(among) < GATHERED_SHARE * len(self.dead):
            for start in range(0, len(among), _BLOCK_ROWS):
                block = among[start : start + _BLOCK_ROWS]
                best.take(_gathered(block, self.vectors(block)))
            return best.found
        allowed = ~self.dead if self.num_dead else None
        if among is not None:
            allowed = np.zeros(len(self.dead), bool)
            allowed[among] = True
        for segment, first in zip(self.segments, self.firsts.tolist(), strict=False):
            mine = None if allowed is None else allowed[first : first + len(segment)]
            best.take(_part_of(segment, first, mine))
        return best.found

    def _approximately(
        self, first: Segment, queries: Vectors, k: int, exclude: Rows | None
    ) -> Found:
        """What the index of the first segment finds, and the best of all other rows."""
        assert first.approximate is not None
        left_out = None if exclude is None or (exclude < 0).all() else exclude
        count = min(k if left_out is None else k + 1, len(first))
        similarities, rows = first.approximate.search(
            queries,
            count,
            # What is dead is met on the way like the living: more has to be looked at.
            effort=first.effort * len(first) // max(1, self._living_of_first),
            allowed=self._allowed,
        )
        np.clip(similarities, -1, 1, out=similarities)
        similarities[rows < 0] = -np.inf
        plain = left_out is None and len(self.segments) == 1 and count == k
        if left_out is not None:
            own = rows == left_out[:, None]
            rows[own], similarities[own] = -1, -np.inf
        if len(self.segments) > 1:
            best = _Best(queries, k, exclude)
            for segment, start in zip(self.segments[1:], self.firsts[1:].tolist(), strict=False):
                live = ~self.dead[start : start + len(segment)]
                best.take(_part_of(segment, start, live))
            rows = np.concatenate([rows, best.found.rows], axis=1)
            similarities = np.concatenate([similarities, best.found.similarities], axis=1)
        if not plain or (similarities[:, 1:] == similarities[:, :-1]).any():
            order = np.lexsort((rows, -similarities), axis=1)[:, :k]
            rows = np.take_along_axis(rows, order, axis=1)
            similarities = np.take_along_axis(similarities, order, axis=1)
        wanted = min(k, len(self) - (left_out is not None))
        short = np.flatnonzero((rows >= 0).sum(axis=1) < wanted)
        if len(short):  # a graph whose near nodes are dead may give fewer
            of = None if exclude is None else exclude[short]
            found = self.search(queries[short], k, exclude=of)
            if rows.shape[1] < k:
                return self.search(queries, k, exclude=exclude)
            rows[short], similarities[short] = found.rows, found.similarities
        if rows.shape[1] < k:
            missing = ((0, 0), (0, k - rows.shape[1]))
            rows = np.pad(rows, missing, constant_values=-1)
            similarities = np.pad(similarities, missing, constant_values=-np.inf)
        return Found(rows, similarities, exact=False)

    @cached_property
    def _living_of_first(self) -> int:
        return int((~self.dead[: len(self.segments[0])]).sum())

    @cached_property
    def _allowed(self) -> Bits | None:
        """Which rows of the first segment live, as bits; None: all of them."""
        dead = self.dead[: len(self.segments[0])]
        return np.packbits(~dead, bitorder="little") if dead.any() else None

    def _rows_until(self, seq: int, rows: Rows) -> int:
        """How many of these ascending rows were written up to a sequence number."""
        before = 0  # numbers ascend with the rows, from segment to segment too
        for segment in self.segments:
            inside = int(np.searchsorted(segment.records.seqs, seq, side="right"))
            before += inside
            if inside < len(segment):
                break
        return int(np.searchsorted(rows, before))

    def _gather(
        self,
        rows: Rows,
        into: NDArray[Any],
        column: Callable[[Records], NDArray[Any]],
    ) -> NDArray[Any]:
        rows = np.asarray(rows, np.int64)
        owner = np.searchsorted(self.firsts, rows, side="right") - 1
        for number, segment in enumerate(self.segments):
            mine = slice(None) if len(self.segments) == 1 else owner == number
            into[mine] = column(segment.records)[rows[mine] - self.firsts[number]]
        return into


@dataclass(frozen=True)
class _Part:
    """Rows that are looked at together."""

    candidates: Callable[[Vectors, int], tuple[Vectors, Rows]]
    vectors: Vectors  # (n, D)
    first: int  # row of the snapshot of the first one ...
    rows: Rows | None  # ... or the row of each
    allowed: Mask | None  # (n,) which of them count; None: all do
    error: float  # of the candidates' scores

    def numbers(self, inside: Rows) -> Rows:
        """Rows of the snapshot."""
        return inside + self.first if self.rows is None else self.rows[inside]


def _part_of(segment: Segment, first: int, allowed: Mask | None) -> _Part:
    vectors = segment.records.vectors
    return _Part(segment.candidates, vectors, first, None, allowed, segment.error)


def _gathered(rows: Rows, vectors: Vectors) -> _Part:
    def candidates(queries: Vectors, count: int) -> tuple[Vectors, Rows]:
        return nearest(queries, vectors, count)

    return _Part(candidates, vectors, 0, rows, None, score_error(vectors.shape[1]))


class _Best:
    """The k best of each query so far: float64 cosines as float32, equal ones by row."""

    def __init__(self, queries: Vectors, k: int, exclude: Rows | None) -> None:
        self._queries = queries
        self._error = score_error(queries.shape[1])
        self._left_out = None if exclude is None or (exclude < 0).all() else exclude
        self._k = k
        self._empty = True
        self.found = Found(
            np.full((len(queries), k), -1, np.int64),
            np.full((len(queries), k), -np.inf, np.float32),
        )

    def take(self, part: _Part) -> None:
        """Take what a part has to offer; parts come in the order of their rows."""
        size = len(part.vectors)
        share = 1.0 if part.allowed is None else float(part.allowed.mean())
        if not share:
            return
        places: Rows | None = None  # all queries
        count = int((self._k + 1) / share) + EXTRA_CANDIDATES
        while count <= MAX_CANDIDATES or count >= size:
            scores, inside = part.candidates(_some(self._queries, places), min(count, size))
            rows = part.numbers(inside)
            usable = None if part.allowed is None else part.allowed[inside]
            if self._left_out is not None:
                others = rows != _some(self._left_out, places)[:, None]
                usable = others if usable is None else usable & others
            if count >= size:
                self._merge(places, part, inside, rows, usable)
                return
            floor = self._floor(places, scores, usable) - 2 * part.error
            whole = scores[:, -1] < floor
            if whole.all():  # what lies below the floor of every query need not be scored again
                width = int((scores >= floor[:, None]).sum(axis=1).max())
                kept = None if usable is None else usable[:, :width]
                self._merge(places, part, inside[:, :width], rows[:, :width], kept)
                return
            every = np.arange(len(self._queries)) if places is None else places
            self._merge(
                every[whole],
                part,
                inside[whole],
                rows[whole],
                None if usable is None else usable[whole],
            )
            places, count = every[~whole], count * 8
        for place in range(len(self._queries)) if places is None else places.tolist():
            self._look_at_all(place, part)

    def _floor(self, places: Rows | None, scores: Vectors, usable: Mask | None) -> Vectors:
        """(b,) a score that the k-th best of all rows has at least, up to the error of scores."""
        so_far = _some(self.found.similarities, places)[:, -1]
        if usable is None:
            kth = scores[:, self._k - 1]
        else:
            enough = np.cumsum(usable, axis=1) >= self._k
            kth = np.take_along_axis(scores, enough.argmax(axis=1)[:, None], axis=1)[:, 0]
            kth = np.where(enough[:, -1], kth, np.float32(-np.inf))
        return cast(Vectors, np.maximum(so_far, kth))

    def _look_at_all(self, place: int, part: _Part) -> None:
        """Take what cannot be told apart by its scores: all that may be among the k best."""
        scores = part.vectors @ self._queries[place]
        counts = np.ones(len(scores), bool) if part.allowed is None else part.allowed.copy()
        if self._left_out is not None:
            counts &= part.numbers(np.arange(len(scores))) != self._left_out[place]
        inside = np.flatnonzero(counts)
        if len(inside) > self._k:
            floor = np.partition(scores[inside], -self._k)[-self._k] - 2 * self._error
            inside = inside[scores[inside] >= floor]
        step = max(1, _RESCORE_FLOATS // self._queries.shape[1])
        for start in range(0, len(inside), step):
            some = inside[None, start : start + step]
            self._merge(np.asarray([place]), part, some, part.numbers(some), None)

    def _merge(
        self, places: Rows | None, part: _Part, inside: Rows, rows: Rows, usable: Mask | None
    ) -> None:
        """Score candidates (b, w) of the queries in `places` again and keep the k best of all."""
        width, dim = inside.shape[1], self._queries.shape[1]
        step = max(1, _RESCORE_FLOATS // max(1, width * dim))
        for start in range(0, len(inside), step):
            chunk = slice(start, start + step)
            if places is None and step >= len(inside):
                place: Rows | slice = slice(None)
            else:
                place = np.arange(len(inside))[chunk] if places is None else places[chunk]
            vectors = part.vectors[inside[chunk]].astype(np.float64)
            queries = self._queries[place].astype(np.float64)
            cosines = np.einsum("bwd,bd->bw", vectors, queries)
            similarities = cosines.clip(-1, 1).astype(np.float32)
            numbers = rows[chunk]
            if usable is not None:
                similarities[~usable[chunk]] = -np.inf
                numbers = np.where(usable[chunk], numbers, -1)
            if not self._empty:
                similarities = np.concatenate(
                    [self.found.similarities[place], similarities], axis=1
                )
                numbers = np.concatenate([self.found.rows[place], numbers], axis=1)
            order = np.lexsort((numbers, -similarities), axis=1)[:, : self._k]
            kept = order.shape[1]
            each = np.arange(len(order))[:, None]
            self.found.similarities[place, :kept] = similarities[each, order]
            self.found.rows[place, :kept] = numbers[each, order]
        self._empty = self._empty and not len(inside)


def _some(values: NDArray[Any], places: Rows | None) -> NDArray[Any]:
    return values if places is None else values[places]
