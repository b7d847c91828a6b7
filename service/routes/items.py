"""/items: add or replace, list, look at and delete the items of the gallery."""

import hashlib
from dataclasses import replace
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header, Query, Request
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import UploadFile
from starlette.responses import Response

from service import bodies
from service.answers import json_bytes, json_response
from service.catch_up import PARAMETER
from service.errors import Problem, over_limit, validation_problem
from service.gallery.protocol import Applied, Change, Idempotency, Item, Snapshot, Vectors
from service.openapi import body_of, problems
from service.routes.access import runtime_of
from service.routes.neighbours import filter_of
from service.runtime import Runtime
from service.schemas.fields import MetadataFilter
from service.schemas.items import (
    DeleteAnswer,
    DeleteRequest,
    ItemAnswer,
    ItemLine,
    ItemPage,
    ItemsAnswer,
)
from service.uploads import Upload, from_form, from_ndjson
from trainer.representation.preprocess import ImageRejected

router = APIRouter(tags=["items"])
ACCEPTED = (bodies.NDJSON, bodies.MULTIPART)
MAX_IDEMPOTENCY_KEY = 255
_FILTER: TypeAdapter[dict[str, Any]] = TypeAdapter(MetadataFilter)


@router.post(
    "/items",
    response_model=ItemsAnswer,
    responses=problems(400, 409, 413, 415, 422, 429, 503, 504, 507),
    openapi_extra=body_of(ItemLine, ACCEPTED),
    summary="Add or replace items",
)
async def add_items(
    request: Request,
    idempotency_key: Annotated[str | None, Header(max_length=MAX_IDEMPOTENCY_KEY)] = None,
) -> Response:
    """Multipart: parts `images`, whose file names are the ids, and an optional part `metadata`, a
    JSON list aligned with them. Or NDJSON: one item a line.

    What is answered is on disk. With an `Idempotency-Key`, the same request sent again gets the
    same answer and changes nothing.
    """
    runtime = runtime_of(request)
    async with runtime.deadline() as deadline:
        upload = await _read(request, runtime)
        idempotency = None
        if idempotency_key:
            digest = await runtime.compute(upload.digest)
            idempotency = Idempotency(idempotency_key, digest)
            with runtime.stored():
                snapshot = runtime.gallery.snapshot()
                done = await runtime.read(snapshot, runtime.gallery.recall, idempotency)
            if done is not None:
                return _answer(runtime, done)
        items = await _embed(runtime, upload, deadline)
    # No deadline from here on: a change that is on its way to the disk is answered for.
    change = Change(upserts=items, idempotency=idempotency, rejected=upload.rejected)
    return _answer(runtime, await runtime.apply(change))


@router.get(
    "/items",
    response_model=ItemPage,
    responses=problems(422, 429, 503, 504),
    openapi_extra=PARAMETER,
    summary="List items",
)
async def list_items(
    request: Request,
    limit: Annotated[int, Query(ge=1, description="Items on the page.")] = 100,
    cursor: Annotated[
        str | None, Query(pattern=r"^\d{1,18}$", description="`next` of the page before.")
    ] = None,
    filter: Annotated[
        str | None, Query(description='Only items whose metadata match, as JSON: {"field": value}.')
    ] = None,
    include: Annotated[
        str | None, Query(pattern="^vector$", description="`vector`: answer them too.")
    ] = None,
) -> Response:
    """In the order in which the items were last written."""
    runtime = runtime_of(request)
    most = runtime.settings.max_page
    if limit > most:
        raise over_limit("limit_exceeded", "limit", limit, "max_page", most)
    wanted = None if filter is None else _parse_filter(filter)
    async with runtime.deadline():
        await runtime.caught_up(request)
        with_vectors = include == "vector"
        return await runtime.compute(_page, runtime, limit, int(cursor or 0), wanted, with_vectors)


@router.post(
    "/items/delete",
    response_model=DeleteAnswer,
    responses=problems(400, 409, 413, 415, 422, 429, 503, 504, 507),
    openapi_extra=body_of(DeleteRequest, (bodies.JSON,)),
    summary="Delete items",
)
async def delete_items(
    request: Request,
    idempotency_key: Annotated[str | None, Header(max_length=MAX_IDEMPOTENCY_KEY)] = None,
) -> Response:
    """By `ids`: those that are not there are listed as `missing`, the others are deleted. Or by
    `filter`: all items that match at the moment of writing, at most `max_rows`.

    With an `Idempotency-Key`, the same request sent again gets the same answer and changes nothing.
    """
    runtime = runtime_of(request)
    if bodies.content_type(request) != bodies.JSON:
        raise bodies.unsupported(request, (bodies.JSON,))
    async with runtime.deadline():
        wanted = await runtime.compute(_parse_delete, await request.body())
    if wanted.ids is not None:
        bodies.check_count("ids", len(wanted.ids), runtime.settings, "max_rows")
        change = Change(deletes=list(dict.fromkeys(wanted.ids)))
    else:
        assert wanted.filter is not None
        change = Change(
            delete_matching=filter_of(wanted.filter), most_matching=runtime.settings.max_rows
        )
    if idempotency_key:
        change = replace(change, idempotency=Idempotency(idempotency_key, _digest_of(wanted)))
    return _deleted(runtime, await runtime.apply(change))


@router.get(
    "/items/{item_id:path}",
    response_model=ItemAnswer,
    response_model_exclude_none=True,
    responses=problems(404, 422, 503, 504),
    openapi_extra=PARAMETER,
    summary="Look at one item",
)
async def get_item(
    request: Request,
    item_id: str,
    include: Annotated[
        str | None, Query(pattern="^vector$", description="`vector`: answer it too.")
    ] = None,
) -> Response:
    """The id is the whole rest of the path, slashes included, plain or percent-encoded."""
    runtime = runtime_of(request)
    async with runtime.deadline():
        await runtime.caught_up(request)
        snapshot = runtime.gallery.snapshot()
        item = await runtime.read(snapshot, _item_of, snapshot, item_id)
    if item is None:
        raise _not_found(item_id)
    answer: dict[str, Any] = {
        "model": runtime.embedder.model_id,
        "gallery_version": snapshot.version,
        "id": item.id,
        "metadata": item.metadata,
    }
    if include == "vector":
        answer["vector"] = item.vector
    return json_response(json_bytes(answer))


@router.delete(
    "/items/{item_id:path}",
    response_model=DeleteAnswer,
    responses=problems(404, 422, 429, 503, 507),
    summary="Delete one item",
)
async def delete_item(request: Request, item_id: str) -> Response:
    """The id is the whole rest of the path, slashes included, plain or percent-encoded."""
    runtime = runtime_of(request)
    applied = await runtime.apply(Change(deletes=[item_id]))
    if applied.missing:
        raise _not_found(item_id)
    return _deleted(runtime, applied)


def _item_of(snapshot: Snapshot, item_id: str) -> Item | None:
    row = snapshot.row(item_id)
    return None if row is None else snapshot.item(row)


async def _read(request: Request, runtime: Runtime) -> Upload:
    settings, embedder = runtime.settings, runtime.embedder
    kind = bodies.content_type(request)
    if kind == bodies.NDJSON:
        body = await request.body()
        return await runtime.compute(
            lambda: from_ndjson(
                body, settings, model_id=embedder.model_id, dim=embedder.embedding_dim
            )
        )
    if kind != bodies.MULTIPART:
        raise bodies.unsupported(request, ACCEPTED)
    async with bodies.read_form(request, settings, ("metadata",)) as form:
        named = await bodies.form_images(form, settings)
        listed = form.get("metadata")
        metadata = await listed.read() if isinstance(listed, UploadFile) else listed
    encoded = metadata.encode() if isinstance(metadata, str) else metadata
    return await runtime.compute(from_form, named, encoded, settings)


async def _embed(runtime: Runtime, upload: Upload, deadline: float) -> list[Item]:
    """The items of an upload; images that are rejected are noted in it."""
    encoded: bodies.EncodedImages = [
        d.content for d in upload.drafts if isinstance(d.content, bytes)
    ]
    settings = runtime.settings
    outcomes = iter(await _embedded(runtime, encoded, deadline))
    items = []
    for draft in upload.drafts:
        if not isinstance(draft.content, bytes):
            items.append(Item(draft.id, draft.content, draft.metadata))
            continue
        outcome = next(outcomes)
        if isinstance(outcome, ImageRejected):
            upload.reject(draft.id, str(outcome), draft.line)
        else:
            vector, thumbnail = outcome
            original = draft.content if settings.originals == "keep" else None
            items.append(Item(draft.id, vector, draft.metadata, thumbnail, original))
    return items


async def _embedded(
    runtime: Runtime, encoded: bodies.EncodedImages, deadline: float
) -> list[tuple[Vectors, bytes | None] | ImageRejected]:
    """A vector of each image, with its thumbnail where those are kept."""
    if not encoded:
        return []
    if not runtime.settings.thumbnails:
        rows = await runtime.images.embed(encoded, deadline)
        return [o if isinstance(o, ImageRejected) else (o[0], None) for o in rows]
    pictured = await runtime.images.embed_pictured(encoded, deadline)
    return [o if isinstance(o, ImageRejected) else (o[0][0], o[1]) for o in pictured]


def _answer(runtime: Runtime, applied: Applied) -> Response:
    return json_response(
        {
            "model": runtime.embedder.model_id,
            "gallery_version": applied.gallery_version,
            "added": applied.added,
            "updated": applied.updated,
            "rejected": list(applied.rejected),
        }
    )


def _deleted(runtime: Runtime, applied: Applied) -> Response:
    return json_response(
        {
            "model": runtime.embedder.model_id,
            "gallery_version": applied.gallery_version,
            "deleted": applied.deleted,
            "missing": list(applied.missing),
        }
    )


def _page(
    runtime: Runtime,
    limit: int,
    after: int,
    wanted: dict[str, Any] | None,
    with_vectors: bool,
) -> Response:
    snapshot = runtime.gallery.snapshot()
    page = snapshot.page(after=after, limit=limit, where=filter_of(wanted or {}))
    items: list[dict[str, Any]] = []
    for item in snapshot.items(page.rows):
        items.append({"id": item.id, "metadata": item.metadata})
        if with_vectors:
            items[-1]["vector"] = item.vector
    return json_response(
        json_bytes(
            {
                "model": runtime.embedder.model_id,
                "gallery_version": snapshot.version,
                "items": items,
                "next": None if page.next is None else str(page.next),
            }
        )
    )


def _parse_filter(text: str) -> dict[str, Any]:
    values = bodies.parse_json(text.encode(), "filter")
    try:
        return _FILTER.validate_python(values, strict=True)
    except ValidationError as error:
        raise validation_problem(
            [{**entry, "loc": ("filter", *entry["loc"])} for entry in error.errors()]
        ) from None


def _parse_delete(body: bytes) -> DeleteRequest:
    wanted = bodies.validate(DeleteRequest, bodies.parse_json(body))
    if (wanted.ids is None) == (wanted.filter is None):
        got = "none of them" if wanted.ids is None else "both"
        raise Problem("invalid_request", f"wanted exactly one of ids and filter; got {got}")
    if wanted.filter is not None and not wanted.filter:
        raise Problem(
            "invalid_request",
            "filter: wanted at least one field; an empty one would find all items",
        )
    return wanted


def _digest_of(wanted: DeleteRequest) -> str:
    """The same for the same request; other than that of any POST /items."""
    content = orjson.dumps(["delete", wanted.model_dump()], option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(content).hexdigest()


def _not_found(item_id: str) -> Problem:
    return Problem("item_not_found", f"there is no item {item_id!r} in the gallery", id=item_id)
