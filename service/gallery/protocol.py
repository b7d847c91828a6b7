"""What a gallery is to the rest of the service, whichever engine holds it.

A gallery hands out snapshots: immutable, consistent, named by a version that grows with every
acknowledged change. Searching and reading happen on a snapshot; changes go to the gallery.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Metadata = Mapping[str, Any]
Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
Filter = Mapping[str, Sequence[Any]]  # field -> values, one of which the item's must equal
PictureKind = Literal["thumbnail", "original"]


class Item(NamedTuple):
    """One item as it stands in a snapshot."""

    id: str  # 1..512 characters
    vector: Vectors  # (D,) unit length
    metadata: Metadata
    # Encoded pictures to be kept with an item that is written; a snapshot's items come without.
    thumbnail: bytes | None = None
    original: bytes | None = None


class Page(NamedTuple):
    """A part of a listing, in the order in which the items were last written."""

    rows: Rows
    next: int | None  # the cursor that continues after it, None at the end


class Found(NamedTuple):
    """The nearest items of each of B queries."""

    rows: Rows  # (B, K) int64 rows of the snapshot, best first, -1 where there are fewer
    similarities: Vectors  # (B, K) float32 in [-1, 1], descending, -inf where the row is -1
    exact: bool = True  # every item was looked at


@dataclass(frozen=True)
class Change:
    """What one request wants to change, all or nothing."""

    upserts: Sequence[Item] = ()
    deletes: Sequence[str] = ()
    delete_matching: Filter | None = None  # as of the moment of writing; alone in its change
    most_matching: int = 0  # TooManyMatches where the filter finds more
    idempotency: "Idempotency | None" = None
    rejected: Sequence[Mapping[str, Any]] = ()  # kept with the answer, for a repeated request


@dataclass(frozen=True)
class Idempotency:
    """A caller's key and the digest of the request it stands for."""

    key: str
    digest: str


@dataclass(frozen=True)
class Applied:
    """What a change did; on disk when the caller sees it."""

    gallery_version: int
    added: int = 0
    updated: int = 0
    deleted: int = 0
    missing: Sequence[str] = ()  # ids that were to be deleted and are not there
    rejected: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


class GalleryError(Exception):
    """The gallery cannot be opened; the message names what is wrong and what to do."""


class StorageError(Exception):
    """A change could not be stored and was not applied; `full` when the disk is."""

    def __init__(self, message: str, *, full: bool) -> None:
        super().__init__(message)
        self.full = full


class GalleryUnreachable(StorageError):
    """What holds the gallery cannot be reached: not even reads go on."""

    def __init__(self, message: str) -> None:
        super().__init__(message, full=False)


class GalleryRetired(StorageError):
    """Another gallery has taken this one's place: it can be read and no longer changed."""

    def __init__(self, message: str) -> None:
        super().__init__(message, full=False)


class IdempotencyConflict(Exception):
    """The key was used for another request."""


class PictureGone(Exception):
    """The item that a picture was kept for was replaced or deleted, unless there is damage."""


class TooManyMatches(Exception):
    """A filter finds more items than may be deleted at a time; `count` of them."""

    def __init__(self, count: int) -> None:
        super().__init__(f"the filter finds {count} items")
        self.count = count


class Unsupported(Exception):
    """The engine that holds the gallery cannot do this; the message says what it can."""


class ItemsChanged(Exception):
    """Items were replaced or deleted while they were read, where a snapshot is no picture of one
    moment; `count` of them. Reading again helps."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} items were replaced or deleted while they were read")
        self.count = count


class Snapshot(Protocol):
    """The items at one version. Rows number them; they mean nothing in another snapshot."""

    @property
    def version(self) -> int:
        """Sequence number of the last change in it."""
        ...

    @property
    def device(self) -> str:
        """Where search runs: "cpu", "gpu", or "remote": then every call waits for a network, and
        may raise StorageError, ItemsChanged and Unsupported."""
        ...

    def index(self) -> Mapping[str, Any]:
        """How a search without `exact` is done: `index` (kind), `exact`, `effort`, `bytes`."""
        ...

    def __len__(self) -> int:
        """Number of items."""
        ...

    def row(self, item_id: str) -> int | None:
        """The row of an item, None when there is none of that id."""
        ...

    def rows_of(self, ids: Sequence[str]) -> Rows:
        """(n,) -> (n,) rows of these ids, -1 where there is none."""
        ...

    def rows(self) -> Rows:
        """The rows of all items, ascending: the order in which they were last written."""
        ...

    def seqs(self, rows: Rows) -> Rows:
        """(n,) -> (n,) sequence numbers of the operations that wrote these rows, > 0.

        An item keeps its number until it is written again or deleted, and no number is used twice:
        it names the same vector in every snapshot of a gallery, as a row does not.
        """
        ...

    def ids(self, rows: Rows) -> NDArray[np.object_]:
        """(n,) -> (n,) the ids, as str."""
        ...

    def item(self, row: int) -> Item:
        """The item in a row that `row`, `search` or `page` gave."""
        ...

    def items(self, rows: Rows) -> list[Item]:
        """(n,) -> the items in these rows."""
        ...

    def vectors(self, rows: Rows) -> Vectors:
        """(n,) -> (n, D)."""
        ...

    def page(self, *, after: int, limit: int, where: Filter | None = None) -> Page:
        """At most `limit` items written after the cursor `after` (0 = from the start); only those
        that match `where`."""
        ...

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        exclude: Rows | None = None,
        where: Filter | None = None,
        exact: bool = True,
    ) -> Found:
        """The k items most similar to each query.

        Args:
            queries: (B, D) float32 of unit length.
            exclude: (B,) a row each query leaves out, -1 for none.
            where: only items whose metadata have, for each field, one of its values; None and
                an empty one for all. Searched exactly where the engine can.
            exact: False lets an index choose what it looks at, where the gallery has one.

        Returns:
            similarity descending, equal similarities in the order of the rows (the order in which
            the items were last written).
        """
        ...


class Gallery(Protocol):
    """Items that can be changed and looked at."""

    model_id: str

    def snapshot(self) -> Snapshot:
        """The newest acknowledged state."""
        ...

    def recall(self, idempotency: Idempotency) -> Applied | None:
        """What the request of this key did, None when the key is new.

        Raises:
            IdempotencyConflict: the key stands for another request.
        """
        ...

    def apply(self, change: Change) -> "Future[Applied]":
        """Queue a change. The future is done when the change is on disk and in `snapshot`.

        Its errors: StorageError, GalleryRetired, IdempotencyConflict, TooManyMatches.

        Raises:
            queue.Full: too many changes are waiting.
        """
        ...

    def picture(self, item_id: str, kind: PictureKind) -> bytes | None:
        """A picture of an item as it was kept; None when there is no such item or picture.

        Raises:
            StorageError: the database is gone.
            GalleryError: the picture is damaged.
        """
        ...

    def trouble(self) -> str | None:
        """What keeps the gallery from being used as it should be; None when nothing does."""
        ...

    def on_change(self, listener: "Callable[[Snapshot], None]") -> None:
        """Call `listener` with every new snapshot, before the change is answered.

        It runs in the writer's thread and must not take long: note the snapshot, wake a thread.
        """
        ...

    def refresh(self) -> None:
        """Look soon for what other processes have changed; returns at once."""
        ...

    def close(self) -> None:
        """Finish what is queued and release the storage."""
        ...
