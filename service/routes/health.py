"""/livez, /readyz, /health and /metrics: for whoever watches the service. Never behind a key."""

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from service.answers import json_response
from service.errors import Problem
from service.openapi import problems
from service.routes.access import runtime_of
from service.schemas.info import Readiness

router = APIRouter(tags=["health"])


@router.get("/livez", response_class=PlainTextResponse, summary="Is the process alive?")
async def livez() -> Response:
    """Answers as long as the event loop turns; looks at nothing else."""
    return PlainTextResponse("ok\n")


@router.get(
    "/readyz", response_model=Readiness, responses=problems(503), summary="Is the service ready?"
)
@router.get("/health", response_model=Readiness, responses=problems(503), summary="As /readyz")
async def readyz(request: Request) -> Response:
    """503 until model, decoders and gallery are loaded, and while stopping; names what fails."""
    checks = runtime_of(request).checks()
    failing = [f"{name}: {state}" for name, state in checks.items() if state != "ok"]
    if failing:
        raise Problem("not_ready", "; ".join(failing), retry_after_s=1, checks=checks)
    return json_response({"status": "ready", "checks": checks})


@router.get("/metrics", response_class=PlainTextResponse, summary="Prometheus metrics")
async def metrics(request: Request) -> Response:
    """In Prometheus' text format; no user data in labels."""
    return Response(
        runtime_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )
