"""What can be read of a gallery in Milvus, behind the protocol's Snapshot as far as that can hold.

A snapshot here is a lower bound and no picture of one moment: every answer holds whatever was
acknowledged up to its version, and may hold what was changed since. Nothing is read from memory but
what the same snapshot was told before. Rows are the sequence numbers of the operations that wrote
the items: a row that is no longer there was replaced or deleted meanwhile, and asking for it is an
ItemsChanged.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from service.gallery.milvus_language import MAX_ROWS, any_of, expression_of
from service.gallery.protocol import (
    Filter,
    Found,
    Item,
    ItemsChanged,
    Page,
    Rows,
    Unsupported,
    Vectors,
)

if TYPE_CHECKING:
    from service.gallery.milvus import Store

# Found beyond k, so that equal similarities at the end of the list are seen and put in order.
EXTRA = 8
_FETCH = 4096  # rows asked for in one query
_SEARCH_BLOCK = 256  # queries of one search: an answer of k = 1000 stays below 32 MiB
_PAGE_SPAN = 4096  # sequence numbers looked through at first for a page


class MilvusSnapshot:
    """The items from one version on; see the head of this file.

    Args:
        version: everything up to it is seen.
        items: how many there were at that version.
        exact: whether the index looks at every item.
        whole_items: how many may be gone through one by one.
    """

    device = "remote"

    def __init__(
        self, store: "Store", version: int, items: int, *, dim: int, exact: bool, whole_items: int
    ) -> None:
        self._store = store
        self.version = version
        self._items = items
        self._dim = dim
        self._exact = exact
        self._whole_items = whole_items
        # What this snapshot was told, so that a row keeps its meaning while a request is answered.
        self._ids: dict[int, str] = {}
        self._known: dict[int, Item] = {}

    def index(self) -> Mapping[str, Any]:
        """How a search without `exact` is done; see protocol.Snapshot. Nothing is held here."""
        kind = "milvus-flat" if self._exact else "milvus-approximate"
        return {"index": kind, "exact": self._exact, "effort": 0, "bytes": 0}

    def __len__(self) -> int:
        return self._items

    def row(self, item_id: str) -> int | None:
        """The row of an item, None when there is none of that id."""
        found = self.rows_of([item_id])
        return None if found[0] < 0 else int(found[0])

    def rows_of(self, ids: Sequence[str]) -> Rows:
        """(n,) -> (n,) rows of these ids, -1 where there is none."""
        rows: dict[str, int] = {}
        for start in range(0, len(ids), _FETCH):
            self._take(f"id in {any_of(ids[start : start + _FETCH])}", rows)
        return np.asarray([rows.get(item_id, -1) for item_id in ids], np.int64)

    def rows(self) -> Rows:
        """The rows of all items, ascending.

        Raises:
            Unsupported: there are more than may be gone through.
        """
        if self._items > self._whole_items:
            raise Unsupported(
                f"the gallery lies in Milvus and holds {self._items:,} items: up to "
                f"{self._whole_items:,} (milvus_whole_items) are gone through one by one, which "
                "groupings and maps of the whole gallery need"
            )
        found: list[int] = []
        after = 0
        while (page := self.page(after=after, limit=_FETCH)).next is not None:
            found += page.rows.tolist()
            after = page.next
        return np.asarray(found + page.rows.tolist(), np.int64)

    def seqs(self, rows: Rows) -> Rows:
        """(n,) -> (n,) sequence numbers: the rows themselves."""
        return np.asarray(rows, np.int64)

    def ids(self, rows: Rows) -> NDArray[np.object_]:
        """(n,) -> (n,) the ids, as str."""
        missing = [row for row in np.asarray(rows).tolist() if row not in self._ids]
        if missing:
            self._fetch(missing)
        found = np.empty(len(rows), np.object_)
        found[:] = [self._ids[row] for row in np.asarray(rows).tolist()]
        return found

    def item(self, row: int) -> Item:
        """The item in a row."""
        (found,) = self.items(np.asarray([row]))
        return found

    def items(self, rows: Rows) -> list[Item]:
        """(n,) -> the items in these rows."""
        wanted = np.asarray(rows).tolist()
        missing = [row for row in wanted if row not in self._known]
        if missing:
            self._fetch(missing)
        return [self._known[row] for row in wanted]

    def vectors(self, rows: Rows) -> Vectors:
        """(n,) -> (n, D)."""
        if not len(rows):
            return np.empty((0, self._dim), np.float32)
        return np.stack([item.vector for item in self.items(rows)])

    def page(self, *, after: int, limit: int, where: Filter | None = None) -> Page:
        """At most `limit` items written after the cursor `after`, in that order.

        Milvus does not sort: a span of sequence numbers with enough items in it is looked for.
        """
        condition = expression_of(where or {})
        first, span = after, max(_PAGE_SPAN, 2 * limit)
        rows: list[int] = []
        while len(rows) <= limit and first < self.version:
            until = first + span
            # The last span is open: what was written again meanwhile has moved there.
            bound = f" and seq <= {until}" if until < self.version else ""
            inside = _both(f"seq > {first}{bound}", condition)
            count = self._store.count(inside)
            if count > MAX_ROWS:
                if span <= _FETCH:  # only an open span holds more items than numbers
                    raise ItemsChanged(count)
                span //= 2
                continue
            if count:
                rows += sorted(self._take(inside, {}))
            first, span = until, 2 * span
        more = len(rows) > limit
        return Page(np.asarray(rows[:limit], np.int64), rows[limit - 1] if more else None)

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        exclude: Rows | None = None,
        where: Filter | None = None,
        exact: bool = True,
    ) -> Found:
        """The k items most similar to each query; see protocol.Snapshot.search.

        Similarities are Milvus' own float32 products. Of more than a few equal ones at the k-th
        place Milvus chooses which are given.

        Raises:
            Unsupported: exact, and the index is not.
        """
        if exact and not self._exact:
            raise Unsupported(
                "the gallery lies in Milvus under an index that does not look at every item, and "
                "Milvus has no other way: ask without `exact`; groups need milvus_index = flat"
            )
        rows = np.full((len(queries), k), -1, np.int64)
        similarities = np.full((len(queries), k), -np.inf, np.float32)
        left_out = None if exclude is None or (exclude < 0).all() else exclude
        count = k + EXTRA + (left_out is not None)
        for start in range(0, len(queries), _SEARCH_BLOCK):
            block = queries[start : start + _SEARCH_BLOCK]
            hits = self._store.search(block, count, expression_of(where or {}))
            for place, found in enumerate(hits, start):
                own = -1 if left_out is None else int(left_out[place])
                ranked = sorted((-s, seq, item_id) for seq, item_id, s in found if seq != own)[:k]
                for column, (negative, seq, item_id) in enumerate(ranked):
                    rows[place, column] = seq
                    similarities[place, column] = min(1.0, max(-1.0, -negative))
                    self._ids[seq] = item_id
        return Found(rows, similarities, exact=self._exact)

    def _fetch(self, rows: Sequence[int]) -> None:
        wanted = sorted(set(rows))
        found: list[int] = []
        for start in range(0, len(wanted), _FETCH):
            found += self._take(f"seq in {any_of(wanted[start : start + _FETCH])}", {})
        if len(found) < len(wanted):
            raise ItemsChanged(len(wanted) - len(found))

    def _take(self, expression: str, rows: dict[str, int]) -> list[int]:
        """Read the items for which the expression holds; returns their rows."""
        fields = ("id", "seq", "metadata", "vector")
        found = self._store.query(self._store.items, expression, fields)
        for given in found:
            seq, item_id = int(given["seq"]), str(given["id"])
            vector = np.asarray(given["vector"], np.float32)
            self._ids[seq], rows[item_id] = item_id, seq
            self._known[seq] = Item(item_id, vector, given["metadata"])
        return [int(given["seq"]) for given in found]


def _both(one: str, other: str) -> str:
    return f"{one} and {other}" if other else one
