"""The application: settings in, a FastAPI application out. Every seam is an argument.

Order of the layers, from outside: request id, log line and metrics; keys and roles; rates and
sizes; errors as problem documents; the routes.
"""

import contextlib
import importlib.metadata
from collections.abc import AsyncIterator
from typing import Any

import structlog
from fastapi import FastAPI

from service.admission import Admit
from service.arguments import settings_from_environment
from service.auth import Authorise
from service.datasets import open_registry
from service.embedder import Embedder
from service.errors import install_handlers
from service.gallery.protocol import Gallery
from service.jobs import Jobs
from service.keys import ApiKeys
from service.observability import ObserveRequests
from service.openapi import describe_admission
from service.policy import Policy
from service.routes import (
    datasets,
    docs,
    embed,
    evaluations,
    groupings,
    groups,
    health,
    images,
    inference,
    info,
    items,
    map,
    neighbours,
    openai,
    page,
)
from service.routes.direct import AnswerDirectly
from service.runtime import Runtime
from service.schemas.problem import ProblemDocument
from service.settings import Settings

_log = structlog.get_logger("service")

DESCRIPTION = (
    "Embeddings, nearest neighbours and propagated groups of images, from an encoder pretrained "
    "by Invariance Propagation. Errors are RFC 9457 problem documents with a stable `code`."
)


class _Application(FastAPI):
    """Adds the shape of a problem to the OpenAPI document; routes refer to it by name."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas[ProblemDocument.__name__] = ProblemDocument.model_json_schema()
        # Declared by FastAPI for its own validation answers, which are problems here.
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        describe_admission(document)
        return document


def create_app(
    settings: Settings | None = None,
    *,
    embedder: Embedder | None = None,
    gallery: Gallery | None = None,
    jobs: Jobs | None = None,
) -> FastAPI:
    """Make the application; it loads its parts when it starts.

    Args:
        settings: None reads the environment.
        embedder: None loads the bundle's encoder.
        gallery: None opens the one of the state directory; one that is given is not closed here.
        jobs: the table of evaluations; None opens that of the state directory or database.

    Raises:
        SettingsError: the environment was read, and is wrong.
        KeysError: the API keys cannot be read.
        RegistryError: the file of data sets cannot be read.
    """
    if settings is None:
        settings = settings_from_environment()
    keys = ApiKeys(settings.api_keys, settings.api_keys_file)
    runtime = Runtime(
        settings,
        embedder=embedder,
        gallery=gallery,
        keys=keys,
        datasets=open_registry(settings.datasets),
        jobs=jobs,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with runtime.running():
            yield

    app = _Application(
        title="invprop",
        version=importlib.metadata.version("invprop"),
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,  # ids may end in a slash
        docs_url=None,  # FastAPI's page loads its script from elsewhere; ours loads nothing
        redoc_url=None,
    )
    app.state.runtime = runtime
    policy = Policy()
    app.add_middleware(AnswerDirectly)
    app.add_middleware(Admit, settings=settings, rates=runtime.rates, metrics=runtime.metrics)
    app.add_middleware(Authorise, keys=keys, policy=policy)
    app.add_middleware(ObserveRequests, metrics=runtime.metrics)
    install_handlers(app)
    for module in (
        embed,
        items,
        images,
        neighbours,
        groups,
        groupings,
        map,
        datasets,
        evaluations,
        openai,
        inference,
        info,
        health,
        docs,
        page,
    ):
        app.include_router(module.router)
        for route in module.router.routes:
            if not policy.covers(route):
                _log.error("route_without_policy", route=getattr(route, "path", ""))
    return app
