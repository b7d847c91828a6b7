"""/items: what is stored, deleted, read one at a time and listed."""

from typing import Annotated, Any

from pydantic import BaseModel, Field

from service.schemas.fields import EncodedImage, ItemId, MetadataFilter, Strict, Vector


class ItemLine(Strict):
    """One line of an NDJSON body: exactly one of `image` and `vector`."""

    id: ItemId
    image: EncodedImage | None = None
    vector: Vector | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    model: str | None = Field(
        default=None, description="The model a vector comes from; must be ours."
    )


class DeleteRequest(Strict):
    """Items to delete: exactly one of the two."""

    ids: Annotated[list[ItemId], Field(fail_fast=True)] | None = None
    filter: MetadataFilter | None = None


class RejectedItem(BaseModel):
    """An item that was not stored."""

    id: str | None = Field(description="null where the line could not be read.")
    reason: str
    line: int | None = Field(default=None, description="Line of an NDJSON body, from 1.")


class ItemsAnswer(BaseModel):
    """What was stored; it survives a kill of the service."""

    model: str
    gallery_version: int
    added: int
    updated: int
    rejected: list[RejectedItem]


class DeleteAnswer(BaseModel):
    """What was deleted; it stays deleted after a kill of the service."""

    model: str
    gallery_version: int
    deleted: int
    missing: list[str] = Field(description="Ids that were not there.")


class ItemAnswer(BaseModel):
    """One item."""

    model: str
    gallery_version: int
    id: str
    metadata: dict[str, Any]
    vector: Vector | None = None


class ListedItem(BaseModel):
    """One item of a list."""

    id: str
    metadata: dict[str, Any]
    vector: Vector | None = None


class ItemPage(BaseModel):
    """A page of items, in the order in which they were last written."""

    model: str
    gallery_version: int
    items: list[ListedItem]
    next: str | None = Field(description="The cursor of the next page.")
