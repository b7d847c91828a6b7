"""Fields and bases that the shapes of several subjects share: vectors, images, ids, filters."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from trainer.representation.bundle import MAX_ID_LENGTH

MAX_FILTER_FIELDS = 32
MAX_FILTER_VALUES = 1000

VECTOR = {"type": "array", "items": {"type": "number"}}
Vector = Annotated[Any, WithJsonSchema(VECTOR)]
VectorList = Annotated[Any, WithJsonSchema({"type": "array", "items": VECTOR})]

ItemId = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)]
EncodedImage = Annotated[
    str, Field(description="A data URI (data:image/png;base64,...) or bare base64. No URLs.")
]
_Scalar = str | int | float | bool | None
FilterValue = _Scalar | Annotated[list[_Scalar], Field(max_length=MAX_FILTER_VALUES)]
MetadataFilter = Annotated[
    dict[str, FilterValue],
    Field(
        max_length=MAX_FILTER_FIELDS,
        description="Field -> value, or a list of values one of which the item's must equal.",
    ),
]


class Strict(BaseModel):
    """What is sent: an unknown field is an error, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Query(Strict):
    """Exactly one of the three."""

    images: Annotated[list[EncodedImage], Field(min_length=1, fail_fast=True)] | None = None
    vectors: VectorList | None = None
    ids: Annotated[list[ItemId], Field(min_length=1, fail_fast=True)] | None = None
