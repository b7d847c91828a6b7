"""POST /neighbours: the most similar items of each query."""

from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from service.answers import NPZ, json_bytes, json_response, npz_response, wants
from service.catch_up import PARAMETER
from service.errors import over_limit
from service.gallery.protocol import Filter, Found
from service.openapi import body_of, problems
from service.queries import ACCEPTED, Queries, read
from service.routes.access import runtime_of
from service.schemas.fields import FilterValue
from service.schemas.neighbours import NeighboursAnswer, NeighboursRequest

router = APIRouter(tags=["neighbours"])
# A search of so many products (queries x items x D) takes about as long as asking another thread
# for it and being told: 0.1 ms.
INLINE_PRODUCTS = 1_000_000
_INLINE_RESULTS = 200  # queries x k


@router.post(
    "/neighbours",
    response_model=NeighboursAnswer,
    response_model_exclude_none=True,
    responses=problems(400, 404, 413, 415, 422, 429, 503, 504, alternatives={200: [NPZ]}),
    openapi_extra=body_of(NeighboursRequest, ACCEPTED) | PARAMETER,
    summary="Find the nearest items",
)
async def neighbours(request: Request) -> Response:
    """JSON with exactly one of `images`, `vectors`, `ids`; or one image, multipart parts `images`
    or .npy float32 (n, dim) with the options as query parameters (`filter` as JSON, `include` with
    commas). A query by id leaves that item out.

    With `Accept: application/x-npz` the answer holds the arrays `ids` (n, k) and `similarities`
    (n, k); a row that is shorter than others ends in empty ids and NaN. The header `X-Exact` says
    what `exact` says in JSON: whether every item was looked at.

    A large gallery is searched through an index that finds nearly all of the nearest; `exact: true`
    looks at every item, and so does a `filter`.
    """
    runtime = runtime_of(request)
    model = runtime.embedder.model_id
    async with runtime.deadline() as deadline:
        options, queries = await read(request, runtime, NeighboursRequest, deadline)
        asked, limit = len(queries.vectors) * options.k, runtime.settings.max_results
        if asked > limit:
            raise over_limit("limit_exceeded", "queries x k", asked, "max_results", limit)
        arguments = (model, options, queries, wants(request, NPZ))
        with runtime.metrics.search_duration.labels("neighbours").time():
            if _is_short(options, queries):
                return _answer(*arguments)
            return await runtime.compute(_answer, *arguments)


def _is_short(options: NeighboursRequest, queries: Queries) -> bool:
    """Whether the event loop may search itself: no wait, no metadata, few products."""
    snapshot = queries.snapshot
    return (
        not options.filter
        and not options.include
        and snapshot.device == "cpu"
        and len(queries.vectors) * options.k <= _INLINE_RESULTS
        and queries.vectors.size * len(snapshot) <= INLINE_PRODUCTS
    )


def _answer(model: str, options: NeighboursRequest, queries: Queries, as_npz: bool) -> Response:
    snapshot = queries.snapshot
    k = min(options.k, max(1, len(snapshot)))
    found = snapshot.search(
        queries.vectors,
        k,
        exclude=queries.rows if queries.by_id else None,
        where=filter_of(options.filter),
        exact=options.exact is True,
    )
    if as_npz:
        headers = {
            "X-Model-Id": model,
            "X-Gallery-Version": str(snapshot.version),
            "X-Exact": "true" if found.exact else "false",
        }
        return npz_response(_arrays(queries, found), headers)
    results = []
    for rows, similarities in zip(found.rows, found.similarities, strict=True):
        rows = rows[rows >= 0]
        hits: list[dict[str, Any]] = [
            {"id": item_id, "similarity": similarity}
            for item_id, similarity in zip(snapshot.ids(rows), similarities, strict=False)
        ]
        if options.include:
            for item, hit in zip(snapshot.items(rows), hits, strict=True):
                if "metadata" in options.include:
                    hit["metadata"] = item.metadata
                if "vector" in options.include:
                    hit["vector"] = item.vector
        results.append(hits)
    answer = {"model": model, "gallery_version": snapshot.version, "exact": found.exact}
    return json_response(json_bytes({**answer, "results": results}))


def _arrays(queries: Queries, found: Found) -> dict[str, Any]:
    present = found.rows >= 0
    if present.all():
        ids = queries.snapshot.ids(found.rows.reshape(-1)).reshape(found.rows.shape)
        return {"ids": ids.astype(np.str_), "similarities": found.similarities}
    width = int(present.sum(axis=1).max(initial=0))
    ids = np.full((len(found.rows), width), "", np.object_)
    ids[present[:, :width]] = queries.snapshot.ids(found.rows[present])
    similarities = np.where(present, found.similarities, np.float32(np.nan))[:, :width]
    return {"ids": ids.astype(np.str_), "similarities": similarities}


def filter_of(given: dict[str, FilterValue]) -> Filter:
    """The contract's filter, with every value as a list."""
    return {name: value if isinstance(value, list) else [value] for name, value in given.items()}
