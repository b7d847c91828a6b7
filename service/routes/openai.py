"""/v1: the shape of OpenAI's API, so that the `openai` package embeds images here.

Errors carry the member `error` that it reads, beside the problem's own.
"""

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from service import bodies
from service.answers import json_bytes, json_response
from service.errors import Problem
from service.openapi import body_of, problems
from service.queries import rejected_images, rejections
from service.routes.access import runtime_of
from service.runtime import Runtime
from service.schemas.openai import EmbeddingList, EmbeddingsRequest, ModelEntry, ModelList

router = APIRouter(tags=["openai"], prefix="/v1")
MODEL = "encoder"  # what the model may be called beside its id


@router.post(
    "/embeddings",
    response_model=EmbeddingList,
    responses=problems(400, 404, 413, 415, 422, 429, 503, 504),
    openapi_extra=body_of(EmbeddingsRequest, (bodies.JSON,)),
    summary="Embed images",
)
async def embeddings(request: Request) -> Response:
    """`input`: one image or a list, as data URIs or bare base64. `model`: `encoder` or the model
    id. `base64`: little-endian float32. A bad image fails the request.
    """
    runtime = runtime_of(request)
    model = runtime.embedder.model_id
    if bodies.content_type(request) != bodies.JSON:
        raise bodies.unsupported(request, (bodies.JSON,))
    async with runtime.deadline() as deadline:
        body = await request.body()
        options, images = await runtime.compute(_parse, body, runtime)
        outcomes = await runtime.images.embed(images, deadline)
        if rejections(outcomes):
            raise rejected_images(outcomes)
        return await runtime.compute(_answer, model, options, outcomes)


@router.get("/models", response_model=ModelList, responses=problems(503), summary="List the model")
async def models(request: Request) -> Response:
    """The one model that is served."""
    model = runtime_of(request).embedder.model_id
    return json_response({"object": "list", "data": [_entry(model)]})


@router.get(
    "/models/{name}",
    response_model=ModelEntry,
    responses=problems(404, 422, 503),
    summary="Look at the model",
)
async def model(request: Request, name: str) -> Response:
    """`encoder` or the model id."""
    served = runtime_of(request).embedder.model_id
    _check_model(name, served)
    return json_response(_entry(served))


def _parse(body: bytes, runtime: Runtime) -> tuple[EmbeddingsRequest, bodies.EncodedImages]:
    options = bodies.validate(EmbeddingsRequest, bodies.parse_json(body))
    _check_model(options.model, runtime.embedder.model_id)
    dim = runtime.embedder.embedding_dim
    if options.dimensions not in (None, dim):
        raise Problem(
            "invalid_request",
            f"dimensions: this model gives {dim}, {options.dimensions} were asked for",
        )
    texts = [options.input] if isinstance(options.input, str) else options.input
    bodies.check_count("images", len(texts), runtime.settings, "max_images")
    return options, [bodies.decode_image_text(text) for text in texts]


def _answer(model: str, options: EmbeddingsRequest, rows: list[Any]) -> Response:
    as_text = options.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(np.asarray(row, "<f4").tobytes()).decode()
            if as_text
            else row,
        }
        for index, (row, _) in enumerate(rows)
    ]
    usage = {"prompt_tokens": 0, "total_tokens": 0}
    return json_response(
        json_bytes({"object": "list", "data": data, "model": model, "usage": usage})
    )


def _check_model(name: str, served: str) -> None:
    if name not in (MODEL, served):
        raise Problem(
            "model_not_found",
            f"there is no model {name[:80]!r}; {MODEL!r} is served, model id {served!r}",
        )


def _entry(model: str) -> dict[str, object]:
    return {"id": model, "object": "model", "created": 0, "owned_by": "invprop"}
