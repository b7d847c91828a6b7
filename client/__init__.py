"""Talk to an invprop service from Python: embeddings, neighbours, propagated groups.

In: pictures, vectors or ids. Out: numpy arrays and frozen dataclasses. Needs only httpx2.

    with Client("http://127.0.0.1:8000") as service:
        vectors = service.embed(["cat.jpg", "dog.jpg"]).embeddings
"""

from typing import TYPE_CHECKING, Any

from client.errors import (
    BadRequest,
    BodyTooLarge,
    ConnectionFailed,
    DatasetNotFound,
    DeadlineExceeded,
    DecoderUnavailable,
    EvaluationNotFound,
    EvaluationNotReady,
    FolderNotAdded,
    Forbidden,
    GalleryBehind,
    GalleryChanged,
    GalleryRetired,
    GalleryUnreachable,
    GroupingNotFound,
    GroupingNotReady,
    HeadersTooLarge,
    IdempotencyConflict,
    ImageRejected,
    IncompatibleVersion,
    InternalError,
    InvalidField,
    InvalidRequest,
    InvpropError,
    ItemNotFound,
    LimitExceeded,
    Loading,
    MapFailed,
    MapNotFound,
    MethodNotAllowed,
    ModelMismatch,
    ModelNotFound,
    NoSuchWorker,
    NotReady,
    Overloaded,
    PictureDamaged,
    PictureNotFound,
    QueueFull,
    RateLimited,
    Rejected,
    RequestTimeout,
    RouteNotFound,
    ServiceError,
    StorageFailed,
    StorageFull,
    TimedOut,
    TooMany,
    Unauthenticated,
    UnexpectedAnswer,
    UnsupportedByGallery,
    UnsupportedMediaType,
    UrlTooLong,
)
from client.models import (
    Added,
    Dataset,
    Deleted,
    Embeddings,
    Evaluation,
    FolderAdded,
    Group,
    Grouping,
    GroupingMember,
    Groups,
    Info,
    Item,
    Limit,
    ListedGroup,
    Map,
    Member,
    Neighbour,
    Neighbours,
    PendingMap,
    Readiness,
    RefusedFile,
    RejectedItem,
)

if TYPE_CHECKING:
    from client.awaitable import AsyncClient
    from client.blocking import Client

__all__ = [
    "Added",
    "AsyncClient",
    "BadRequest",
    "BodyTooLarge",
    "Client",
    "ConnectionFailed",
    "Dataset",
    "DatasetNotFound",
    "DeadlineExceeded",
    "DecoderUnavailable",
    "Deleted",
    "Embeddings",
    "Evaluation",
    "EvaluationNotFound",
    "EvaluationNotReady",
    "FolderAdded",
    "FolderNotAdded",
    "Forbidden",
    "GalleryBehind",
    "GalleryChanged",
    "GalleryRetired",
    "GalleryUnreachable",
    "Group",
    "Grouping",
    "GroupingMember",
    "GroupingNotFound",
    "GroupingNotReady",
    "Groups",
    "HeadersTooLarge",
    "IdempotencyConflict",
    "ImageRejected",
    "IncompatibleVersion",
    "Info",
    "InternalError",
    "InvalidField",
    "InvalidRequest",
    "InvpropError",
    "Item",
    "ItemNotFound",
    "Limit",
    "LimitExceeded",
    "ListedGroup",
    "Loading",
    "Map",
    "MapFailed",
    "MapNotFound",
    "Member",
    "MethodNotAllowed",
    "ModelMismatch",
    "ModelNotFound",
    "Neighbour",
    "Neighbours",
    "NoSuchWorker",
    "NotReady",
    "Overloaded",
    "PendingMap",
    "PictureDamaged",
    "PictureNotFound",
    "QueueFull",
    "RateLimited",
    "Readiness",
    "RefusedFile",
    "Rejected",
    "RejectedItem",
    "RequestTimeout",
    "RouteNotFound",
    "ServiceError",
    "StorageFailed",
    "StorageFull",
    "TimedOut",
    "TooMany",
    "Unauthenticated",
    "UnexpectedAnswer",
    "UnsupportedByGallery",
    "UnsupportedMediaType",
    "UrlTooLong",
]


def __getattr__(name: str) -> Any:
    """Client and AsyncClient when they are asked for: the HTTP library takes most of the time of
    an import, and whoever only catches errors or reads models does not pay for it."""
    if name == "Client":
        from client.blocking import Client

        return Client
    if name == "AsyncClient":
        from client.awaitable import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
