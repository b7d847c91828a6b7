"""What the service answers, as frozen dataclasses with the field names of its JSON. Nothing here is
shared with the service: a contract test compares the two.

Arrays are numpy arrays where numpy is installed, else lists.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from client import tables
from client.errors import Rejected

if TYPE_CHECKING:
    from client.tables import DataFrame

Json = Mapping[str, Any]
Array = Any  # numpy.ndarray, or a list of lists of floats without numpy


@dataclass(frozen=True)
class Embeddings:
    """Answer of embed()."""

    model: str  # model_id of the bundle
    output: str  # "embedding" or "features"
    dim: int
    embeddings: Array  # (n, dim) float32 in input order; NaN rows (None without numpy): rejected
    errors: tuple[Rejected, ...] = ()  # only with on_error="skip"

    def to_pandas(self) -> "DataFrame":
        """One row per picture, one column per dimension."""
        rows = self.embeddings
        if isinstance(rows, list):
            rows = [[float("nan")] * self.dim if row is None else row for row in rows]
        return tables.matrix(rows, dim=self.dim)


@dataclass(frozen=True)
class RejectedItem:
    """An item that was not added."""

    id: str | None  # None: the service could not read the line
    reason: str
    line: int | None = None  # counted from 1 over the items of the call


@dataclass(frozen=True)
class Added:
    """Answer of add()."""

    model: str
    gallery_version: int  # grows with each change
    added: int
    updated: int
    rejected: tuple[RejectedItem, ...]


@dataclass(frozen=True)
class RefusedFile:
    """A file of a folder that is not in the gallery."""

    id: str  # its path from the folder
    reason: str


@dataclass(frozen=True)
class FolderAdded:
    """Answer of add_folder()."""

    added: int
    updated: int
    already: int  # answered in an earlier run and unchanged since: not sent
    refused: tuple[RefusedFile, ...]  # unreadable, no pictures, or rejected by the service
    gallery_version: int
    journal: str  # its path; delete it to have everything sent again


@dataclass(frozen=True)
class Deleted:
    """Answer of delete() and delete_items()."""

    model: str
    gallery_version: int
    deleted: int
    missing: tuple[str, ...]  # ids that were not there


@dataclass(frozen=True)
class Item:
    """One item of the gallery."""

    id: str
    metadata: Json = field(default_factory=dict)
    vector: Array | None = None  # (dim,) where it was asked for


@dataclass(frozen=True)
class Neighbour:
    """An item near a query."""

    id: str
    similarity: float  # cosine, -1..1
    metadata: Json | None = None  # with include=["metadata"]
    vector: Array | None = None  # (dim,), with include=["vector"]


@dataclass(frozen=True)
class Neighbours:
    """Answer of neighbours()."""

    model: str
    gallery_version: int
    exact: bool  # False: an approximate index answered
    results: tuple[tuple[Neighbour, ...], ...]  # one tuple per query, best first

    def to_pandas(self) -> "DataFrame":
        """One row per neighbour: query (its place, from 0), rank (from 0), id, similarity,
        metadata."""
        found = [(q, r, n) for q, row in enumerate(self.results) for r, n in enumerate(row)]
        return tables.frame(
            {
                "query": [query for query, _, _ in found],
                "rank": [rank for _, rank, _ in found],
                "id": [neighbour.id for _, _, neighbour in found],
                "similarity": [neighbour.similarity for _, _, neighbour in found],
                "metadata": [neighbour.metadata for _, _, neighbour in found],
            }
        )


@dataclass(frozen=True)
class Member:
    """An item that propagation reached from an anchor."""

    id: str
    step: int  # the hop at which it was discovered, 1..steps
    via: str | None  # the item through which; None: directly from an anchor that is no item
    similarity: float  # to the anchor, cosine


@dataclass(frozen=True)
class Group:
    """What propagation reached from one anchor."""

    members: tuple[Member, ...]
    reached: int  # how many were reached before `limit`
    truncated: bool


@dataclass(frozen=True)
class Groups:
    """Answer of groups()."""

    model: str
    gallery_version: int
    results: tuple[Group, ...]  # one per anchor

    def to_pandas(self) -> "DataFrame":
        """One row per member: anchor (its place, from 0), id, step, via, similarity."""
        found = [(a, m) for a, group in enumerate(self.results) for m in group.members]
        return tables.frame(
            {
                "anchor": [anchor for anchor, _ in found],
                "id": [member.id for _, member in found],
                "step": [member.step for _, member in found],
                "via": [member.via for _, member in found],
                "similarity": [member.similarity for _, member in found],
            }
        )


@dataclass(frozen=True)
class Grouping:
    """A partition of the gallery as it was at `gallery_version`. Times in seconds since 1970."""

    model: str
    id: str
    gallery_version: int
    k: int
    steps: int
    min_size: int
    state: str  # "queued", "running", "succeeded" or "failed"
    created_at: float
    started_at: float | None
    finished_at: float | None
    items: int  # grouped + ungrouped
    grouped: int | None  # this and the following once it has succeeded
    ungrouped: int | None
    groups: int | None
    message: str | None  # why there is no group
    error: str | None  # why it failed
    progress: Json | None  # stage, done, total while it is running
    sizes: tuple[int, ...] | None = None  # of all groups, descending; not in lists


@dataclass(frozen=True)
class GroupingMember:
    """A member of a group of a grouping."""

    id: str
    similarity: float  # to the representative, cosine


@dataclass(frozen=True)
class ListedGroup:
    """A group of a grouping."""

    group: int  # its number, the largest is 0
    size: int
    representative: str  # id
    members: tuple[GroupingMember, ...]  # the first ones; grouping_members() has all


@dataclass(frozen=True)
class Map:
    """Two coordinates for each item of a sample of the gallery."""

    model: str
    gallery_version: int
    method: str  # "pca" or "umap"
    items: int  # of the gallery
    ids: tuple[str, ...]  # of the sample
    coordinates: Array  # (n, 2)

    def to_pandas(self) -> "DataFrame":
        """One row per item of the sample: id, x, y."""
        return tables.frame(
            {
                "id": self.ids,
                "x": [place[0] for place in self.coordinates],
                "y": [place[1] for place in self.coordinates],
            }
        )


@dataclass(frozen=True)
class PendingMap:
    """A map that is computed: ask again with this version."""

    model: str
    gallery_version: int
    method: str
    state: str  # "computing"


@dataclass(frozen=True)
class Dataset:
    """A labelled set that the operator registered, for evaluations."""

    name: str
    kind: str
    classes: int | None  # None, as most of what follows, until it was counted
    counts: Mapping[str, int] | None  # images of each split
    state: str | None = None  # "counting", "ready" or "failed"
    task: str | None = None  # "single_label" or "multi_label"
    class_names: tuple[str, ...] | None = None  # the first 1,000
    divided_by_seed: bool | None = None  # it has no test split of its own
    fingerprint: str | None = None
    problem: str | None = None  # why it cannot be evaluated on, where failed


# What an evaluation does not leave any more.
ENDED = frozenset({"succeeded", "failed", "cancelled", "lost"})


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, as it was when it was asked for."""

    id: str
    status: str  # "queued", "running", "succeeded", "failed", "cancelled" or "lost"
    protocol: str | None = None
    dataset: str | None = None
    settings: Json | None = None
    seed: int | None = None
    model: str | None = None  # model_id of the encoder that is evaluated
    queue: str | None = None  # "cpu" or "gpu"
    waiting_for: str | None = None  # what is missing, where it is queued in vain
    progress: Json | None = None  # stage, done, total
    attempts: int | None = None
    created_at: Any = None
    started_at: Any = None
    finished_at: Any = None
    report: Json | None = None  # once it has succeeded
    error: Any = None  # once it has failed

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.status in ENDED


@dataclass(frozen=True)
class Readiness:
    """Answer of ready(); true or false by itself."""

    status: str  # in a word
    checks: Mapping[str, str]  # name of a check -> "ok", or what is wrong or waited for

    def __bool__(self) -> bool:
        return all(state == "ok" for state in self.checks.values())


@dataclass(frozen=True)
class Limit:
    """One limit of the service."""

    limit: float
    setting: str  # what the operator changes to move it


@dataclass(frozen=True)
class Info:
    """Answer of info()."""

    model: str
    gallery_version: int
    dims: Mapping[str, int]  # of the outputs: "embedding" and "features"
    input: Json  # the input contract: how a picture is prepared
    training: Json | None  # what the bundle tells of its training
    parity: Json | None  # how far its graph is from the network that was trained
    execution_provider: str  # where the encoder runs
    precision: str  # of the graph that embeds: "fp32", "fp16" or "int8"
    variants: Json  # the bundle's other precisions: how far from fp32, or why absent
    speed: Json | None  # images per second, as timed at the export
    search: Json  # how the gallery is searched
    gallery: Json  # its size
    limits: Mapping[str, Limit]
    versions: Mapping[str, str]
