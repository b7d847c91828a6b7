"""POST /embed: images in, vectors out."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from service.schemas.fields import VECTOR, EncodedImage, Strict


class EmbedRequest(Strict):
    """Images to embed."""

    images: Annotated[list[EncodedImage], Field(min_length=1, fail_fast=True)]


class RejectedImage(BaseModel):
    """An image that was not embedded."""

    index: int
    reason: str


class EmbedAnswer(BaseModel):
    """Rows in the order of the images; null where one was rejected and skipped."""

    model: str
    output: Literal["embedding", "features"]
    dim: int
    embeddings: Annotated[
        Any, WithJsonSchema({"type": "array", "items": {"anyOf": [VECTOR, {"type": "null"}]}})
    ]
    errors: list[RejectedImage] | None = None
