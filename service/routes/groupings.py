"""/groupings: partitions of the whole gallery, computed in the background."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from service import bodies
from service.answers import json_bytes, json_response
from service.batching import QueueFull
from service.catch_up import PARAMETER
from service.errors import RETRY_AFTER_S, Problem, over_limit, queue_full
from service.groupings import Grouping, Groups
from service.groups import walk_width
from service.openapi import body_of, problems
from service.routes.access import runtime_of
from service.runtime import Runtime
from service.schemas.groups import (
    GroupingAnswer,
    GroupingGroupAnswer,
    GroupingGroupsPage,
    GroupingList,
    GroupingRequest,
)

router = APIRouter(tags=["groupings"])
FIRST_MEMBERS = 9  # of each group in a list: a mosaic of three by three

Limit = Annotated[int, Query(ge=1, description="Entries on the page.")]
Cursor = Annotated[
    str | None, Query(pattern=r"^\d{1,18}$", description="`next` of the page before.")
]


@router.post(
    "/groupings",
    response_model=GroupingAnswer,
    status_code=202,
    responses=problems(400, 415, 422, 429, 503, 504, 507),
    openapi_extra=body_of(GroupingRequest, (bodies.JSON,)) | PARAMETER,
    summary="Group the whole gallery",
)
async def start_grouping(request: Request) -> Response:
    """Answers at once; `Location` names the grouping. The same parameters at the same gallery
    version are the same grouping. It is of the gallery as it is now, whatever changes meanwhile.
    """
    runtime = runtime_of(request)
    if bodies.content_type(request) != bodies.JSON:
        raise bodies.unsupported(request, (bodies.JSON,))
    async with runtime.deadline():
        options = bodies.validate(GroupingRequest, bodies.parse_json(await request.body()))
        await runtime.caught_up(request)
    snapshot, limit = runtime.gallery.snapshot(), runtime.settings.max_grouping_walk
    walks = len(snapshot) * walk_width(options.k, options.steps)
    if walks > limit:
        raise over_limit(
            "limit_exceeded",
            f"items x (k + ... + k^steps) with {len(snapshot):,} items, k = {options.k}, "
            f"steps = {options.steps}",
            walks,
            "max_grouping_walk",
            limit,
        )

    def ask() -> Grouping:
        if snapshot.device == "remote":  # refused now, and not once it is under way
            snapshot.rows()
            snapshot.search(snapshot.vectors(snapshot.rows()[:1]), 1)
        try:
            return runtime.groupings.ask(
                snapshot, k=options.k, steps=options.steps, min_size=options.min_size
            )
        except QueueFull as full:
            raise queue_full("groupings", full.limit, "groupings_pending") from None

    with runtime.stored():
        grouping = await runtime.compute(ask)
    response = json_response(_described(runtime, grouping), status=202)
    response.headers["Location"] = f"/groupings/{grouping.id}"
    if grouping.state in ("queued", "running"):
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response


@router.get(
    "/groupings",
    response_model=GroupingList,
    responses=problems(503),
    summary="List the groupings",
)
async def list_groupings(request: Request) -> Response:
    """Those that are kept (the last `groupings_kept`) and those under way, the newest first."""
    runtime = runtime_of(request)
    listed = [_described(runtime, grouping) for grouping in runtime.groupings.all()]
    return json_response({"items": listed, "next": None})


@router.get(
    "/groupings/{grouping}",
    response_model=GroupingAnswer,
    responses=problems(404, 422, 503),
    summary="Look at one grouping",
)
async def get_grouping(request: Request, grouping: str) -> Response:
    """Its state and, when it has succeeded, `sizes`: they and `ungrouped` add up to `items`."""
    runtime = runtime_of(request)
    found = _known(runtime, grouping)
    answer = _described(runtime, found)
    groups = runtime.groupings.groups(found.id)
    answer["sizes"] = None if groups is None else groups.sizes
    return json_response(json_bytes(answer))


@router.get(
    "/groupings/{grouping}/groups",
    response_model=GroupingGroupsPage,
    responses=problems(404, 409, 422, 503),
    summary="List the groups of a grouping",
)
async def list_groups(
    request: Request, grouping: str, limit: Limit = 100, cursor: Cursor = None
) -> Response:
    """The largest first, with the first members of each."""
    runtime = runtime_of(request)
    found, groups = _finished(runtime, grouping, limit)
    first = min(int(cursor or 0), len(groups))
    last = min(first + limit, len(groups))
    listed = [_group(groups, number, 0, FIRST_MEMBERS) for number in range(first, last)]
    return _page(runtime, found, {"items": listed}, last, len(groups))


@router.get(
    "/groupings/{grouping}/groups/{group}",
    response_model=GroupingGroupAnswer,
    responses=problems(404, 409, 422, 503),
    summary="List the members of a group",
)
async def get_group(
    request: Request, grouping: str, group: int, limit: Limit = 100, cursor: Cursor = None
) -> Response:
    """The representative first, then by closeness to it."""
    runtime = runtime_of(request)
    found, groups = _finished(runtime, grouping, limit)
    if not 0 <= group < len(groups):
        raise Problem(
            "grouping_not_found",
            f"grouping {found.id} has no group {group}; its groups are numbered from 0 and there "
            f"are {len(groups)}",
        )
    size = int(groups.sizes[group])
    first = min(int(cursor or 0), size)
    answer = _group(groups, group, first, limit)
    answer["items"] = answer.pop("members")
    return _page(runtime, found, answer, min(first + limit, size), size)


def _described(runtime: Runtime, grouping: Grouping) -> dict[str, Any]:
    answer = {"model": runtime.embedder.model_id, **asdict(grouping)}
    if grouping.progress is not None:
        answer["progress"] = grouping.progress._asdict()
    return answer


def _known(runtime: Runtime, name: str) -> Grouping:
    grouping = runtime.groupings.get(name)
    if grouping is None:
        raise Problem(
            "grouping_not_found",
            f"there is no grouping {name[:100]!r}: it never was, or it was among the oldest and "
            "made room; GET /groupings lists those that are there",
        )
    return grouping


def _finished(runtime: Runtime, name: str, limit: int) -> tuple[Grouping, Groups]:
    grouping = _known(runtime, name)
    most = runtime.settings.max_page
    if limit > most:
        raise over_limit("limit_exceeded", "limit", limit, "max_page", most)
    groups = runtime.groupings.groups(name)
    if groups is None:
        under_way = grouping.state in ("queued", "running")
        raise Problem(
            "grouping_not_ready",
            f"grouping {name} is {grouping.state}: "
            + ("ask again shortly" if under_way else f"{grouping.error}"),
            retry_after_s=RETRY_AFTER_S if under_way else None,
            state=grouping.state,
        )
    return grouping, groups


def _group(groups: Groups, number: int, start: int, count: int) -> dict[str, Any]:
    return {
        "group": number,
        "size": int(groups.sizes[number]),
        "representative": groups.members(number, 0, 1)[0][0],
        "members": [
            {"id": item_id, "similarity": similarity}
            for item_id, similarity in groups.members(number, start, count)
        ],
    }


def _page(
    runtime: Runtime, grouping: Grouping, answer: dict[str, Any], last: int, total: int
) -> Response:
    facts = {
        "model": runtime.embedder.model_id,
        "gallery_version": grouping.gallery_version,
        "grouping": grouping.id,
    }
    after = str(last) if last < total else None
    return json_response(json_bytes({**facts, **answer, "next": after}))
