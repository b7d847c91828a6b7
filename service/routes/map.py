"""GET /map: two coordinates for each item of a sample, for a picture of the whole gallery."""

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from service.answers import NPZ, json_bytes, json_response, npz_response, wants
from service.batching import QueueFull
from service.catch_up import PARAMETER
from service.errors import RETRY_AFTER_S, Problem, over_limit, queue_full
from service.map import LEAST_ITEMS, Failure, Key, Map, Method
from service.openapi import problems
from service.routes.access import runtime_of
from service.schemas.map import MapAnswer, MapPending

router = APIRouter(tags=["map"])
DEFAULT_SAMPLE = 5000


@router.get(
    "/map",
    response_model=MapAnswer,
    responses={
        **problems(404, 422, 429, 503, 504, alternatives={200: [NPZ]}),
        202: {"model": MapPending, "description": "It is computed; ask `Location` again."},
    },
    openapi_extra=PARAMETER,
    summary="Lay the gallery out in two dimensions",
)
async def get_map(
    request: Request,
    method: Annotated[Method, Query(description="`umap` is computed in the background.")] = "pca",
    sample: Annotated[
        int | None,
        Query(ge=1, description=f"Items; default {DEFAULT_SAMPLE} or as many as are allowed."),
    ] = None,
    version: Annotated[
        int | None,
        Query(ge=0, description="Of this gallery version, as `Location` of a 202 says it."),
    ] = None,
) -> Response:
    """A map is of one gallery version. `Location` of a 202 names that version, so that who waits
    gets the map although the gallery has changed meanwhile.

    With `Accept: application/x-npz` the answer holds the arrays `ids` (n,) and `coordinates`
    (n, 2).
    """
    runtime = runtime_of(request)
    async with runtime.deadline():
        await runtime.caught_up(request)
    model, snapshot, most = (
        runtime.embedder.model_id,
        runtime.gallery.snapshot(),
        runtime.settings.max_map_sample,
    )
    if sample is not None and sample > most:
        raise over_limit("limit_exceeded", "sample", sample, "max_map_sample", most)
    size = min(DEFAULT_SAMPLE, most) if sample is None else sample
    outcome: Map | Failure | Key | None
    if version is not None and version != snapshot.version:
        outcome, at = runtime.maps.look(Key(version, method, size)), version
    else:
        at = snapshot.version
        if len(snapshot) < LEAST_ITEMS[method]:
            raise Problem(
                "invalid_request",
                f"method={method} wants at least {LEAST_ITEMS[method]} items, the gallery has "
                f"{len(snapshot)}" + ("; method=pca takes fewer" if method == "umap" else ""),
            )

        def ask() -> Map | Failure | Key:
            try:
                return runtime.maps.ask(snapshot, method, size)
            except QueueFull as full:
                raise queue_full("maps", full.limit, "maps_pending") from None

        async with runtime.deadline():
            outcome = await runtime.compute(ask)
    if outcome is None:
        raise Problem(
            "map_not_found",
            f"no map of gallery version {version} with these parameters is kept; ask without "
            "`version` for one of the gallery as it is now",
        )
    if isinstance(outcome, Failure):
        met: dict[str, Any] = {}
        if outcome.setting is not None:
            met = {"limit": outcome.limit, "setting": outcome.setting}
        raise Problem("map_failed", outcome.reason, **met)
    if isinstance(outcome, Key):
        response = json_response(
            {"model": model, "gallery_version": at, "method": method, "state": "computing"},
            status=202,
        )
        response.headers["Location"] = f"/map?method={method}&sample={outcome.sample}&version={at}"
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
        return response
    if wants(request, NPZ):
        headers = {"X-Model-Id": model, "X-Gallery-Version": str(at)}
        ids = np.asarray(outcome.ids.tolist(), dtype=np.str_)
        return npz_response({"ids": ids, "coordinates": outcome.coordinates}, headers)
    return json_response(
        json_bytes(
            {
                "model": model,
                "gallery_version": at,
                "method": method,
                "items": outcome.items,
                "ids": outcome.ids.tolist(),
                "coordinates": np.ascontiguousarray(outcome.coordinates),
            }
        )
    )
