"""/evaluations: ask for one, watch it, read its report, cancel it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response, StreamingResponse

from service import bodies
from service.answers import json_bytes, json_response
from service.errors import Problem, over_limit
from service.evaluations import Evaluations, not_found
from service.openapi import body_of, problems
from service.routes.access import runtime_of
from service.routes.items import MAX_IDEMPOTENCY_KEY
from service.runtime import Runtime
from service.schemas.evaluations import EvaluationAnswer, EvaluationList, EvaluationRequest, Status

router = APIRouter(tags=["evaluations"])
MAX_BYTES = 64 * 1024  # of a request: a few dozen numbers
EVENT_STREAM = "text/event-stream"
_LOOK_S = 0.5  # between two looks at an evaluation that is watched
_COMMENT_EVERY = 30  # looks; so that proxies do not take the stream for dead
# The report is a page of its own that runs nothing and loads nothing.
_REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'; sandbox"
)


@router.post(
    "/evaluations",
    response_model=EvaluationAnswer,
    status_code=202,
    responses=problems(400, 404, 409, 413, 415, 422, 429, 503, 504, 507),
    openapi_extra=body_of(EvaluationRequest, (bodies.JSON,)),
    summary="Evaluate the encoder",
)
async def submit(
    request: Request,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=MAX_IDEMPOTENCY_KEY)
    ] = None,
) -> Response:
    """Of the model that is served now, by a worker, in the background; `Location` names it. What is
    answered is on disk and ends as succeeded, failed, cancelled or lost, whatever is killed
    meanwhile. With an `Idempotency-Key` the same request sent again is the same evaluation.
    """
    runtime = runtime_of(request)
    if bodies.content_type(request) != bodies.JSON:
        raise bodies.unsupported(request, (bodies.JSON,))
    async with runtime.deadline():
        body = await request.body()
        if len(body) > MAX_BYTES:
            raise Problem(
                "body_too_large",
                f"the request has {len(body):,} bytes, and no evaluation needs more than "
                f"{MAX_BYTES:,}; send names and settings only",
                limit=MAX_BYTES,
            )
        asked = bodies.validate(EvaluationRequest, bodies.parse_json(body))
        bodies.check_keys_once(body)

        def accept() -> dict[str, Any]:
            evaluations = runtime.evaluations
            job = evaluations.submit(
                asked.protocol,
                asked.dataset,
                asked.settings,
                asked.seed,
                device=asked.device,
                model=runtime.embedder.model_id,
                key=idempotency_key,
            )
            return evaluations.described(job)

        with runtime.stored():
            answer = await runtime.compute(accept)
    response = json_response(answer, status=202)
    response.headers["Location"] = f"/evaluations/{answer['id']}"
    return response


@router.get(
    "/evaluations",
    response_model=EvaluationList,
    responses=problems(422, 429, 503),
    summary="List the evaluations",
)
async def list_evaluations(
    request: Request,
    status: Annotated[Status | None, Query(description="Only those.")] = None,
    limit: Annotated[int, Query(ge=1, description="Entries on the page.")] = 100,
    cursor: Annotated[
        str | None, Query(pattern=r"^\d{1,18}$", description="`next` of the page before.")
    ] = None,
) -> Response:
    """The newest first, without their reports."""
    runtime = runtime_of(request)
    most = runtime.settings.max_page
    if limit > most:
        raise over_limit("limit_exceeded", "limit", limit, "max_page", most)

    def listed() -> dict[str, Any]:
        evaluations = runtime.evaluations
        before = None if cursor is None else int(cursor)
        jobs = evaluations.jobs.list(status=status, before=before, limit=limit + 1)
        more = str(jobs[limit - 1].seq) if len(jobs) > limit else None
        return {"items": [evaluations.described(job) for job in jobs[:limit]], "next": more}

    with runtime.stored():
        return json_response(json_bytes(await runtime.compute(listed)))


@router.get(
    "/evaluations/{evaluation}",
    response_model=EvaluationAnswer,
    responses=problems(404, 422, 429, 503),
    summary="Look at one evaluation",
)
async def get_evaluation(request: Request, evaluation: str) -> Response:
    """With its report once it has succeeded."""
    runtime = runtime_of(request)
    with runtime.stored():
        found = await runtime.compute(_looked_at, runtime.evaluations, evaluation, True)
    return json_response(json_bytes(found))


@router.delete(
    "/evaluations/{evaluation}",
    response_model=EvaluationAnswer,
    responses=problems(404, 422, 429, 503),
    summary="Cancel an evaluation",
)
async def cancel(request: Request, evaluation: str) -> Response:
    """A queued one at once; a running one within 10 s, also where its worker is dead. One that
    has ended stays as it is.
    """
    runtime = runtime_of(request)

    def ask() -> dict[str, Any]:
        job = runtime.evaluations.cancel(evaluation)
        if job is None:
            raise not_found(evaluation)
        return runtime.evaluations.described(job)

    with runtime.stored():
        return json_response(json_bytes(await runtime.compute(ask)))


@router.get(
    "/evaluations/{evaluation}/report",
    response_class=Response,
    responses={
        200: {"content": {"text/html": {"schema": {"type": "string"}}}},
        **problems(404, 409, 422, 429, 503),
    },
    summary="Read the report of an evaluation",
)
async def report(request: Request, evaluation: str) -> Response:
    """A page for people, with curves and tables; it loads nothing and runs nothing."""
    runtime = runtime_of(request)

    def read() -> bytes:
        jobs = runtime.evaluations.jobs
        job = jobs.get(evaluation)
        if job is None:
            raise not_found(evaluation)
        found = jobs.report(evaluation)
        if found is None:
            raise Problem(
                "evaluation_not_ready",
                f"evaluation {evaluation} is {job.status}: only one that succeeded has a report",
                state=job.status,
            )
        return found[1]

    with runtime.stored():
        page = await runtime.compute(read)
    headers = {"Content-Security-Policy": _REPORT_POLICY, "X-Frame-Options": "SAMEORIGIN"}
    return Response(page, media_type="text/html; charset=utf-8", headers=headers)


@router.get(
    "/evaluations/{evaluation}/events",
    response_class=Response,
    responses={
        200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}},
        **problems(404, 422, 429, 503),
    },
    summary="Watch an evaluation",
)
async def events(request: Request, evaluation: str) -> Response:
    """Server-sent events: the evaluation now and whenever it has changed, until it has ended."""
    runtime = runtime_of(request)
    with runtime.stored():
        first = await runtime.compute(_looked_at, runtime.evaluations, evaluation, False)
    runtime.evaluations.begin_stream()
    return StreamingResponse(
        _watched(runtime, evaluation, first),
        media_type=EVENT_STREAM,
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _watched(
    runtime: Runtime, evaluation: str, found: dict[str, Any]
) -> AsyncIterator[bytes]:
    sent: dict[str, Any] = {}
    quiet = 0
    try:
        while not runtime.draining:
            if found != sent:
                sent, quiet = found, 0
                yield b"data: " + json_bytes(found) + b"\n\n"
                if found["finished_at"] is not None:
                    return
            elif (quiet := quiet + 1) % _COMMENT_EVERY == 0:
                yield b": still here\n\n"
            await asyncio.sleep(_LOOK_S)
            with runtime.stored():
                found = await runtime.compute(_looked_at, runtime.evaluations, evaluation, False)
    except Problem:  # the answer has begun: the stream ends, and whoever watches asks again
        return
    finally:
        runtime.evaluations.end_stream()


def _looked_at(evaluations: Evaluations, evaluation: str, report: bool) -> dict[str, Any]:
    job = evaluations.jobs.get(evaluation)
    if job is None:
        raise not_found(evaluation)
    return evaluations.described(job, report=report)
