"""GET /map: the items as points of a plane."""

from typing import Literal

from pydantic import BaseModel, Field

from service.schemas.fields import VectorList


class MapAnswer(BaseModel):
    """Two coordinates for each item of a sample."""

    model: str
    gallery_version: int
    method: Literal["pca", "umap"]
    items: int = Field(description="Of the gallery at that version.")
    ids: list[str] = Field(description="Of the sample, in the order of writing.")
    coordinates: VectorList = Field(description="x and y of each.")


class MapPending(BaseModel):
    """A map that is computed."""

    model: str
    gallery_version: int
    method: Literal["pca", "umap"]
    state: Literal["computing"]
