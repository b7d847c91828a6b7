"""/neighbours: queries in, the most similar items of each out."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from service.schemas.fields import MetadataFilter, Query, Vector

MAX_K = 1000  # http-api: k is 1..1000


class NeighboursRequest(Query):
    """What to look for, and how."""

    k: int = Field(default=10, ge=1, le=MAX_K, description="Neighbours of each query.")
    filter: MetadataFilter = Field(default_factory=dict)
    exact: bool | None = Field(
        default=None,
        description="true: look at every item. Otherwise a large gallery is searched through an "
        "index that finds nearly all of the nearest; the answer says which it was.",
    )
    include: list[Literal["metadata", "vector"]] = Field(default_factory=list)


class Neighbour(BaseModel):
    """One neighbour."""

    id: str
    similarity: float = Field(description="Cosine, -1..1.")
    metadata: dict[str, Any] | None = None
    vector: Vector | None = None


class NeighboursAnswer(BaseModel):
    """Neighbours of each query, most similar first; equal ones in the order of their writing."""

    model: str
    gallery_version: int
    exact: bool = Field(description="Every item was looked at.")
    results: list[list[Neighbour]]
