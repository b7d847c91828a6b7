"""The shapes of requests and answers, as they stand in openapi.json.

Options are validated through these models. Vectors are not: lists of floats go from orjson straight
to numpy and back (a list of pydantic floats costs 35 times as much), so their fields are `Any` here
and an array of numbers in the document.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from trainer.representation.bundle import MAX_ID_LENGTH

MAX_K = 1000  # http-api: k is 1..1000
MAX_GROUP_K = 50
MAX_GROUP_STEPS = 6
MAX_FILTER_FIELDS = 32
MAX_FILTER_VALUES = 1000

_VECTOR = {"type": "array", "items": {"type": "number"}}
Vector = Annotated[Any, WithJsonSchema(_VECTOR)]
VectorList = Annotated[Any, WithJsonSchema({"type": "array", "items": _VECTOR})]

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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class EmbedRequest(_Strict):
    """Images to embed."""

    images: Annotated[list[EncodedImage], Field(min_length=1, fail_fast=True)]


class _Query(_Strict):
    """Exactly one of the three."""

    images: Annotated[list[EncodedImage], Field(min_length=1, fail_fast=True)] | None = None
    vectors: VectorList | None = None
    ids: Annotated[list[ItemId], Field(min_length=1, fail_fast=True)] | None = None


class NeighboursRequest(_Query):
    """What to look for, and how."""

    k: int = Field(default=10, ge=1, le=MAX_K, description="Neighbours of each query.")
    filter: MetadataFilter = Field(default_factory=dict)
    exact: bool | None = Field(
        default=None,
        description="true: look at every item. Otherwise a large gallery is searched through an "
        "index that finds nearly all of the nearest; the answer says which it was.",
    )
    include: list[Literal["metadata", "vector"]] = Field(default_factory=list)


class GroupsRequest(_Query):
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


class GroupingRequest(_Strict):
    """How to partition the whole gallery."""

    k: int = Field(
        default=4, ge=1, le=MAX_GROUP_K, description="Edges of each node of the kNN graph."
    )
    steps: int = Field(default=3, ge=1, le=MAX_GROUP_STEPS, description="Hops.")
    min_size: int = Field(
        default=3, ge=1, le=1_000_000, description="Smaller groups are left ungrouped."
    )


class ItemLine(_Strict):
    """One line of an NDJSON body: exactly one of `image` and `vector`."""

    id: ItemId
    image: EncodedImage | None = None
    vector: Vector | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    model: str | None = Field(
        default=None, description="The model a vector comes from; must be ours."
    )


class DeleteRequest(_Strict):
    """Items to delete: exactly one of the two."""

    ids: Annotated[list[ItemId], Field(fail_fast=True)] | None = None
    filter: MetadataFilter | None = None


class RejectedImage(BaseModel):
    """An image that was not embedded."""

    index: int
    reason: str


class RejectedItem(BaseModel):
    """An item that was not stored."""

    id: str | None = Field(description="null where the line could not be read.")
    reason: str
    line: int | None = Field(default=None, description="Line of an NDJSON body, from 1.")


class EmbedAnswer(BaseModel):
    """Rows in the order of the images; null where one was rejected and skipped."""

    model: str
    output: Literal["embedding", "features"]
    dim: int
    embeddings: Annotated[
        Any, WithJsonSchema({"type": "array", "items": {"anyOf": [_VECTOR, {"type": "null"}]}})
    ]
    errors: list[RejectedImage] | None = None


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


class DatasetAnswer(BaseModel):
    """A labelled data set that the operator registered."""

    name: str = Field(description="What an evaluation names it by.")
    kind: str
    state: Literal["counting", "ready", "failed"] = Field(
        description="`counting`: it is being opened in the background; ask again."
    )
    task: Literal["single_label", "multi_label"] | None = Field(
        description="Whether its images have one class each, or several. Null unless ready."
    )
    classes: int | None = Field(description="Their number. Null unless ready.")
    class_names: list[str] | None = Field(description="The first 1,000.")
    counts: dict[str, int] | None = Field(
        description="Images of each split: train, test, perhaps validation. Null unless ready."
    )
    divided_by_seed: bool | None = Field(
        description="It has no test split of its own: an evaluation's seed divides it."
    )
    fingerprint: str | None = Field(description="sha256 of what it holds, as reports name it.")
    problem: str | None = Field(description="Why it cannot be evaluated on, where failed.")


class DatasetList(BaseModel):
    """The registered data sets, by name."""

    items: list[DatasetAnswer]
    problem: str | None = Field(
        description="Why the last change of the file was not taken over; null where it was."
    )
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


class Readiness(BaseModel):
    """What the service waits for."""

    status: str
    checks: dict[str, str]


class LimitInfo(BaseModel):
    """A limit of requests."""

    limit: int | float
    setting: str


class InfoAnswer(BaseModel):
    """What is running here."""

    model: str
    gallery_version: int
    dims: dict[str, int]
    input: dict[str, Any]
    training: dict[str, Any] | None
    parity: dict[str, Any] | None
    execution_provider: str
    precision: str = Field(description="Of the graph that embeds: fp32, fp16 or int8.")
    variants: dict[str, Any] = Field(
        description="The bundle's other precisions: how far each is from fp32, or why it is absent."
    )
    speed: dict[str, Any] | None = Field(
        description="Images per second of each precision, timed at the export on its machine."
    )
    search: dict[str, Any]
    gallery: dict[str, Any]
    limits: dict[str, LimitInfo]
    versions: dict[str, str]


class EmbeddingsRequest(_Strict):
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
    embedding: Annotated[Any, WithJsonSchema({"anyOf": [_VECTOR, {"type": "string"}]})]


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


class Liveness(BaseModel):
    """The process is alive."""

    live: bool


class ModelReady(BaseModel):
    """The model answers."""

    ready: bool


class ServerMetadata(BaseModel):
    """What serves here."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """An input or output; -1 for any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The model's inputs, of which a request gives one, and its outputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class InferOutput(BaseModel):
    """One output; its values stand in `data` or, by binary_data_size, behind the JSON part."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: Vector | None = None


class InferAnswer(BaseModel):
    """The answer of an inference."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[InferOutput]


class ProblemDocument(BaseModel):
    """RFC 9457; further members depend on the code."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    limit: int | float | None = None
    setting: str | None = None
    errors: list[dict[str, Any]] | None = None
