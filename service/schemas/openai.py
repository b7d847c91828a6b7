"""/v1: the embeddings and models of OpenAI's API, for images."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from service.schemas.fields import VECTOR, EncodedImage, Strict


class EmbeddingsRequest(Strict):
    """The request of OpenAI's POST /v1/embeddings, for images."""

    input: EncodedImage | Annotated[list[EncodedImage], Field(min_length=1, fail_fast=True)]
    model: str = Field(description="`encoder` or the model id.")
    modality: Literal["image"] = "image"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, description="Must be the model's, if given.")
    user: str | None = Field(default=None, description="Means nothing here.")


class EmbeddingEntry(BaseModel):
    """One embedding."""

    object: Literal["embedding"]
    index: int
    embedding: Annotated[Any, WithJsonSchema({"anyOf": [VECTOR, {"type": "string"}]})]


class EmbeddingUsage(BaseModel):
    """Images have no tokens: zero."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The answer of OpenAI's POST /v1/embeddings."""

    object: Literal["list"]
    data: list[EmbeddingEntry]
    model: str
    usage: EmbeddingUsage


class ModelEntry(BaseModel):
    """A model, as OpenAI's API shows it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The models, as OpenAI's API lists them."""

    object: Literal["list"]
    data: list[ModelEntry]
