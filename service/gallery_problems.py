"""What callers are told when their gallery cannot do what they ask.

In: a block that searches or changes a gallery. Out: the same block, whose errors are problems.
"""

import contextlib
import queue
from collections.abc import Iterator

from service.errors import RETRY_AFTER_S, Problem, over_limit, queue_full
from service.gallery.protocol import (
    GalleryRetired,
    GalleryUnreachable,
    IdempotencyConflict,
    ItemsChanged,
    StorageError,
    TooManyMatches,
    Unsupported,
)
from service.settings import Settings


@contextlib.contextmanager
def search_problems() -> Iterator[None]:
    """Of a search in a gallery past one machine.

    Raises:
        Problem: unsupported_by_gallery, gallery_changed, gallery_unreachable.
    """
    try:
        yield
    except Unsupported as error:
        raise Problem("unsupported_by_gallery", str(error)) from None
    except ItemsChanged as error:
        raise Problem(
            "gallery_changed", f"{error}; send the request again", retry_after_s=RETRY_AFTER_S
        ) from None
    except GalleryUnreachable as error:
        raise Problem(
            "gallery_unreachable", f"{error}; send the request again", retry_after_s=5
        ) from None


@contextlib.contextmanager
def storage_problems(settings: Settings) -> Iterator[None]:
    """Of a change, or of whatever else is stored.

    Raises:
        Problem: queue_full, storage_full, storage_failed, gallery_retired, idempotency_conflict,
            too_many.
    """
    try:
        yield
    except queue.Full:
        raise queue_full("changes", settings.max_pending, "max_pending") from None
    except TooManyMatches as error:
        most = settings.max_rows
        raise over_limit("too_many", "items found", error.count, "max_rows", most) from None
    except IdempotencyConflict:
        raise Problem(
            "idempotency_conflict",
            "this Idempotency-Key was used for a request with another content; use a new key "
            "for a new request",
        ) from None
    except GalleryRetired as error:
        raise Problem(
            "gallery_retired",
            f"{error}. Nothing was changed; send the request again: once this service runs "
            "the other bundle, it is answered for that model",
            retry_after_s=5,
        ) from None
    except StorageError as error:
        code = "storage_full" if error.full else "storage_failed"
        cure = "free space on its disk" if error.full else "mend what is named"
        raise Problem(
            code,
            f"{error}. Nothing is acknowledged, searches go on; {cure} and send the request again",
            retry_after_s=5,
        ) from None
