"""Groups: what is reached from given anchors (POST /groups), and partitions of the whole gallery
(/groupings)."""

from typing import Literal

from pydantic import BaseModel, Field

from service.schemas.fields import Query, Strict

MAX_GROUP_K = 50
MAX_GROUP_STEPS = 6


class GroupsRequest(Query):
    """Anchors, and how far to walk from them."""

    k: int = Field(
        default=4, ge=1, le=MAX_GROUP_K, description="Edges of each node of the kNN graph."
    )
    steps: int = Field(default=3, ge=1, le=MAX_GROUP_STEPS, description="Hops.")
    order: Literal["nearest", "hardest", "step"] = Field(
        default="nearest",
        description="`hardest`: least similar to the anchor first, the paper's hard positives.",
    )
    limit: int = Field(
        default=200, ge=1, le=1_000_000, description="Members returned of each group."
    )


class GroupMember(BaseModel):
    """One item that was reached."""

    id: str
    step: int = Field(description="The hop at which it was discovered, from 1.")
    via: str | None = Field(description="The item through which; null: the anchor is no item.")
    similarity: float = Field(description="Cosine to the anchor, -1..1.")


class GroupAnswer(BaseModel):
    """What was reached from one anchor."""

    members: list[GroupMember]
    reached: int
    truncated: bool


class GroupsAnswer(BaseModel):
    """One group for each anchor."""

    model: str
    gallery_version: int
    results: list[GroupAnswer]


class GroupingRequest(Strict):
    """How to partition the whole gallery."""

    k: int = Field(
        default=4, ge=1, le=MAX_GROUP_K, description="Edges of each node of the kNN graph."
    )
    steps: int = Field(default=3, ge=1, le=MAX_GROUP_STEPS, description="Hops.")
    min_size: int = Field(
        default=3, ge=1, le=1_000_000, description="Smaller groups are left ungrouped."
    )


class GroupingProgress(BaseModel):
    """What is being done."""

    stage: str
    done: int
    total: int


class GroupingAnswer(BaseModel):
    """A partition of the gallery as it was at `gallery_version`. Times in seconds since 1970."""

    model: str
    id: str
    gallery_version: int
    k: int
    steps: int
    min_size: int
    state: Literal["queued", "running", "succeeded", "failed"]
    created_at: float
    started_at: float | None
    finished_at: float | None
    items: int = Field(description="Of that version: grouped + ungrouped.")
    grouped: int | None
    ungrouped: int | None
    groups: int | None
    message: str | None = Field(description="Why there is no group.")
    error: str | None = Field(description="Why it failed.")
    progress: GroupingProgress | None = Field(description="While it is running.")
    sizes: list[int] | None = Field(
        default=None, description="Of all groups, descending; not in lists."
    )


class GroupingList(BaseModel):
    """The groupings, the newest first."""

    items: list[GroupingAnswer]
    next: str | None = Field(description="Always null: they are few.")


class GroupingMember(BaseModel):
    """One member of a group."""

    id: str
    similarity: float = Field(description="Cosine to the representative, -1..1.")


class ListedGroup(BaseModel):
    """One group of a grouping."""

    group: int = Field(description="From 0, the largest first.")
    size: int
    representative: str = Field(description="The item that most others mutually reach.")
    members: list[GroupingMember] = Field(description="The first ones.")


class GroupingGroupsPage(BaseModel):
    """A page of the groups of a grouping."""

    model: str
    gallery_version: int
    grouping: str
    items: list[ListedGroup]
    next: str | None = Field(description="The cursor of the next page.")


class GroupingGroupAnswer(BaseModel):
    """A page of the members of a group, by closeness to the representative."""

    model: str
    gallery_version: int
    grouping: str
    group: int
    size: int
    representative: str
    items: list[GroupingMember]
    next: str | None = Field(description="The cursor of the next page.")
