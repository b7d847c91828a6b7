"""Which index a gallery gets: by its items, the memory it may take, and what was measured.

In: items, dimension, bytes, and the report of service.tune where there is one. Out: a kind and how
much it looks at. Up to `exact_items` every search looks at every item.
"""

from dataclasses import dataclass
from typing import Literal

from service.gallery.approximate import HNSW_BYTES, default_effort

# A search of so many items of 128 dimensions takes about 5 ms on one core.
EXACT_ITEMS = 200_000

Kind = Literal["flat", "flat-fp16", "hnsw", "ivf", "cagra"]


@dataclass(frozen=True)
class Choice:
    """An index and its effort."""

    kind: Kind
    effort: int = 0  # breadth of HNSW, lists of IVF; 0 where every item is looked at
    fits: bool = True  # in the memory that was allowed

    @property
    def is_exact(self) -> bool:
        """Whether every item is looked at."""
        return self.kind in ("flat", "flat-fp16")

    @property
    def vectors_on_disk(self) -> bool:
        """Whether the float32 vectors stay in a file that is mapped into memory."""
        return self.kind in ("flat-fp16", "ivf")


def memory_bytes(kind: Kind, items: int, dim: int) -> int:
    """What an index of this kind keeps in memory, vectors included, ids and metadata not."""
    per_item = {
        "flat": 4 * dim,
        "flat-fp16": 2 * dim,
        "hnsw": 4 * dim + HNSW_BYTES,
        "ivf": 2 * dim + 8,
        "cagra": 4 * dim,
    }
    return items * per_item[kind]


@dataclass(frozen=True)
class SearchOptions:
    """What an operator chooses.

    allowed_bytes: what the index may keep in memory, vectors included.
    exact_items: up to so many items search is exact.
    snapshot_every: operations between two generations on disk.
    """

    allowed_bytes: int = 2**63
    exact_items: int = EXACT_ITEMS
    snapshot_every: int = 50_000


@dataclass(frozen=True)
class Policy:
    """What the choice depends on beside the gallery.

    allowed_bytes: what the index may keep in memory.
    exact_items: up to so many items search is exact.
    cagra: there is a GPU, and faiss can build such a graph on it.
    tuned: what was measured to be best on this gallery; taken where it fits, and is exact or not
        as the number of items asks for.
    """

    allowed_bytes: int
    exact_items: int = EXACT_ITEMS
    cagra: bool = False
    tuned: Choice | None = None

    def choose(self, items: int, dim: int) -> Choice:
        """The index for a gallery of so many items."""
        tuned = self.tuned
        if (
            tuned is not None
            and tuned.is_exact == (items <= self.exact_items)
            and self._fits(tuned.kind, items, dim)
        ):
            return tuned
        order: tuple[Kind, ...] = ("flat", "flat-fp16")
        if items > self.exact_items:
            order = ("cagra", "hnsw", "ivf") if self.cagra else ("hnsw", "ivf")
        for kind in order:
            if self._fits(kind, items, dim):
                return Choice(kind, effort_of(kind, items))
        return Choice(order[-1], effort_of(order[-1], items), fits=False)

    def _fits(self, kind: Kind, items: int, dim: int) -> bool:
        return memory_bytes(kind, items, dim) <= self.allowed_bytes


def effort_of(kind: Kind, items: int) -> int:
    """The effort where nothing was measured."""
    return 0 if kind in ("flat", "flat-fp16") else default_effort(kind, items)
