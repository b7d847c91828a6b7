"""GET /images/{id}: the thumbnail that is kept with an item."""

import hashlib
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from service.catch_up import PARAMETER
from service.errors import Problem
from service.gallery.protocol import GalleryError, StorageError
from service.openapi import problems
from service.routes.access import runtime_of

router = APIRouter(tags=["items"])
MEDIA_TYPE = "image/webp"
# An item may be given another picture at any time: a browser keeps it and asks whether it changed.
_CACHE = "private, no-cache"


@router.get(
    "/images/{item_id:path}",
    response_class=Response,
    responses={
        200: {"content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}},
        204: {"description": "The item has no picture (`missing=empty`)."},
        304: {"description": "It is still the one that If-None-Match names."},
        **problems(404, 422, 429, 500, 503, 504),
    },
    openapi_extra=PARAMETER,
    summary="The thumbnail of an item",
)
async def get_image(
    request: Request,
    item_id: str,
    missing: Annotated[
        Literal["problem", "empty"],
        Query(description="`empty`: 204 for an item without a picture, where it is no error."),
    ] = "problem",
) -> Response:
    """A WebP of at most 256 pixels. The id is the whole rest of the path, slashes included, plain
    or percent-encoded. Items that came as vectors have none.
    """
    runtime = runtime_of(request)
    gallery = runtime.gallery
    async with runtime.deadline():
        await runtime.caught_up(request)
        try:
            content = await runtime.compute(gallery.picture, item_id, "thumbnail")
        except GalleryError as error:
            raise Problem("picture_damaged", str(error)) from None
        except StorageError as error:
            raise Problem("storage_failed", str(error), retry_after_s=5) from None
    if content is None:
        snapshot = gallery.snapshot()
        if await runtime.read(snapshot, snapshot.row, item_id) is None:
            raise Problem(
                "item_not_found", f"there is no item {item_id!r} in the gallery", id=item_id
            )
        if missing == "empty":  # a browser writes every 404 to its console
            return Response(status_code=204, headers={"Cache-Control": _CACHE})
        raise Problem(
            "picture_not_found",
            f"no picture is kept with item {item_id!r}: it came as a vector, or thumbnails = false",
            id=item_id,
        )
    etag = f'"{hashlib.sha256(content).hexdigest()}"'
    headers = {"ETag": etag, "Cache-Control": _CACHE, "X-Content-Type-Options": "nosniff"}
    if _names(request.headers.get("if-none-match", ""), etag):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=MEDIA_TYPE, headers=headers)


def _names(given: str, etag: str) -> bool:
    """Whether an If-None-Match header names this entity tag (RFC 9110, 13.1.2)."""
    tags = [tag.strip().removeprefix("W/") for tag in given.split(",")]
    return etag in tags or tags == ["*"]
