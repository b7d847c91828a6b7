"""POST /groups: what propagates from each anchor along the kNN graph."""

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from service.answers import json_bytes, json_response
from service.catch_up import PARAMETER
from service.errors import over_limit
from service.graph import ItemGraph
from service.groups import propagated_groups, walk_width
from service.openapi import body_of, problems
from service.queries import ACCEPTED, Queries, read
from service.routes.access import runtime_of
from service.schemas.groups import GroupsAnswer, GroupsRequest

router = APIRouter(tags=["groups"])


@router.post(
    "/groups",
    response_model=GroupsAnswer,
    responses=problems(400, 404, 413, 415, 422, 429, 503, 504),
    openapi_extra=body_of(GroupsRequest, ACCEPTED) | PARAMETER,
    summary="Find propagated groups",
)
async def groups(request: Request) -> Response:
    """JSON with exactly one of `ids`, `images`, `vectors`; or one image, multipart parts `images`
    or .npy float32 (n, dim) with the options as query parameters. An image or vector that is no
    item reaches its k nearest items as hop 1.
    """
    runtime = runtime_of(request)
    model = runtime.embedder.model_id
    async with runtime.deadline() as deadline:
        options, queries = await read(request, runtime, GroupsRequest, deadline)
        walks = len(queries.vectors) * walk_width(options.k, options.steps)
        limit = runtime.settings.max_group_walk
        if walks > limit:
            raise over_limit(
                "limit_exceeded",
                f"anchors x (k + ... + k^steps) with {len(queries.vectors)} anchors, "
                f"k = {options.k}, steps = {options.steps}",
                walks,
                "max_group_walk",
                limit,
            )
        with runtime.metrics.search_duration.labels("groups").time():
            graph = runtime.graph.graph_of(queries.snapshot, options.k)
            return await runtime.compute(_answer, model, options, queries, graph, deadline)


def _answer(
    model: str,
    options: GroupsRequest,
    queries: Queries,
    graph: ItemGraph | None,
    deadline: float,
) -> Response:
    snapshot = queries.snapshot
    found = propagated_groups(
        snapshot,
        vectors=queries.vectors,
        rows=queries.rows,
        k=options.k,
        steps=options.steps,
        order=options.order,
        limit=options.limit,
        graph=graph,
        deadline=deadline,
    )

    rows = {m.row for group in found for m in group.members}
    rows |= {m.via for group in found for m in group.members if m.via is not None}
    ids = dict(zip(rows, snapshot.ids(np.asarray(list(rows), np.int64)).tolist(), strict=True))
    results = [
        {
            "members": [
                {
                    "id": ids[member.row],
                    "step": member.step,
                    "via": None if member.via is None else ids[member.via],
                    "similarity": member.similarity,
                }
                for member in group.members
            ],
            "reached": group.reached,
            "truncated": group.truncated,
        }
        for group in found
    ]
    return json_response(
        json_bytes({"model": model, "gallery_version": snapshot.version, "results": results})
    )
