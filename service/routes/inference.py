"""/v2: the Open Inference Protocol, so that its clients (tritonclient[http], KServe) work here.

The model is called `encoder`, its version is the model id. Errors carry the member `error` that
those clients read, beside the problem's own.
"""

import importlib.metadata
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from service import tensors
from service.answers import json_response
from service.errors import Problem
from service.openapi import body_of, problems
from service.queries import rejected_images, rejections
from service.routes.access import runtime_of
from service.runtime import Runtime
from service.schemas.inference import (
    InferAnswer,
    Liveness,
    ModelMetadata,
    ModelReady,
    ServerMetadata,
)
from trainer.representation.preprocess import ImageRejected

router = APIRouter(tags=["open inference protocol"], prefix="/v2")
MODEL = "encoder"
OCTETS = "application/octet-stream"
JSON_SIZE = "Inference-Header-Content-Length"
_ERRORS = (400, 404, 413, 415, 422, 429, 503, 504)


@router.get("", response_model=ServerMetadata, summary="Server metadata")
async def server() -> Response:
    """Name, version and extensions."""
    version = importlib.metadata.version("invprop")
    return json_response(
        {"name": "invprop", "version": version, "extensions": ["binary_tensor_data"]}
    )


@router.get("/health/live", response_model=Liveness, summary="As /livez")
async def live() -> Response:
    """Answers as long as the event loop turns."""
    return json_response({"live": True})


@router.get(
    "/health/ready", response_model=ModelReady, responses=problems(503), summary="As /readyz"
)
async def ready(request: Request) -> Response:
    """503 until everything is loaded, and while stopping."""
    return _ready(runtime_of(request))


@router.get(
    "/models/{name}",
    response_model=ModelMetadata,
    responses=problems(404, 422, 503),
    summary="Model metadata",
)
async def metadata(request: Request, name: str) -> Response:
    """Inputs (give one of them) and outputs."""
    return _metadata(runtime_of(request), name, None)


@router.get(
    "/models/{name}/versions/{version}",
    response_model=ModelMetadata,
    responses=problems(404, 422, 503),
    summary="Model metadata of a version",
)
async def version_metadata(request: Request, name: str, version: str) -> Response:
    """As without the version, which must be ours."""
    return _metadata(runtime_of(request), name, version)


@router.get(
    "/models/{name}/ready",
    response_model=ModelReady,
    responses=problems(404, 422, 503),
    summary="Is the model ready?",
)
async def model_ready(request: Request, name: str) -> Response:
    """As /readyz."""
    runtime = runtime_of(request)
    _check_model(runtime, name, None)
    return _ready(runtime)


@router.get(
    "/models/{name}/versions/{version}/ready",
    response_model=ModelReady,
    responses=problems(404, 422, 503),
    summary="Is this version ready?",
)
async def version_ready(request: Request, name: str, version: str) -> Response:
    """As without the version, which must be ours."""
    runtime = runtime_of(request)
    _check_model(runtime, name, version)
    return _ready(runtime)


@router.post(
    "/models/{name}/infer",
    response_model=InferAnswer,
    responses=problems(*_ERRORS, alternatives={200: [OCTETS]}),
    openapi_extra=body_of(tensors.InferRequest, ("application/json", OCTETS)),
    summary="Embed images",
)
async def infer(
    request: Request,
    name: str,
    inference_header_content_length: Annotated[
        str | None, Header(description="Bytes of the JSON part, where raw tensors follow it.")
    ] = None,
) -> Response:
    """JSON, or JSON and raw tensors behind it. The input is `images`, UINT8 (n, S, S, 3) prepared,
    or `encoded_images`, BYTES (n). A bad image fails the request.
    """
    return await _infer(request, name, None, inference_header_content_length)


@router.post(
    "/models/{name}/versions/{version}/infer",
    response_model=InferAnswer,
    responses=problems(*_ERRORS, alternatives={200: [OCTETS]}),
    openapi_extra=body_of(tensors.InferRequest, ("application/json", OCTETS)),
    summary="Embed images by a version",
)
async def version_infer(
    request: Request,
    name: str,
    version: str,
    inference_header_content_length: Annotated[
        str | None, Header(description="Bytes of the JSON part, where raw tensors follow it.")
    ] = None,
) -> Response:
    """As without the version, which must be ours."""
    return await _infer(request, name, version, inference_header_content_length)


async def _infer(request: Request, name: str, version: str | None, size: str | None) -> Response:
    runtime = runtime_of(request)
    _check_model(runtime, name, version)
    json_size = _json_size(size)
    async with runtime.deadline() as deadline:
        body = await request.body()
        inference = await runtime.compute(
            tensors.parse,
            body,
            json_size,
            runtime.embedder.contract.size_px,
            runtime.settings.max_images,
        )
        if inference.pixels is not None:
            rows: list[Any] = list(await runtime.images.embed_pixels(inference.pixels, deadline))
        else:
            rows = await runtime.images.embed(inference.encoded or [], deadline)
        if rejections(rows):
            raise rejected_images(rows)
        return await runtime.compute(_answer, runtime.embedder.model_id, inference, rows)


def _answer(model: str, inference: tensors.Inference, rows: list[Any]) -> Response:
    assert not any(isinstance(row, ImageRejected) for row in rows)
    tables = {
        name: np.stack([row[place] for row in rows]) for place, name in enumerate(tensors.OUTPUTS)
    }
    body, json_size = tensors.answer(inference, model, MODEL, tables)
    if json_size is None:
        return json_response(body)
    return Response(body, media_type=OCTETS, headers={JSON_SIZE: str(json_size)})


def _json_size(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise Problem("invalid_request", f"{JSON_SIZE}: wanted a number of bytes")
    if int(text) > tensors.MAX_JSON_PART:
        raise Problem(
            "limit_exceeded",
            f"{JSON_SIZE} is {int(text):,}, at most {tensors.MAX_JSON_PART:,} bytes of JSON may "
            "stand before raw tensors; send the values as raw tensors",
            limit=tensors.MAX_JSON_PART,
        )
    return int(text)


def _check_model(runtime: Runtime, name: str, version: str | None) -> None:
    model = runtime.embedder.model_id
    if name != MODEL or version not in (None, model):
        wanted = f"{name[:64]!r}" + ("" if version is None else f" version {version[:64]!r}")
        raise Problem(
            "model_not_found", f"there is no model {wanted}; {MODEL!r} is served, version {model!r}"
        )


def _ready(runtime: Runtime) -> Response:
    failing = [name for name, state in runtime.checks().items() if state != "ok"]
    if failing:
        raise Problem("not_ready", f"not ready: {', '.join(failing)}", retry_after_s=1)
    return json_response({"ready": True})


def _metadata(runtime: Runtime, name: str, version: str | None) -> Response:
    _check_model(runtime, name, version)
    embedder = runtime.embedder
    side = embedder.contract.size_px
    widths = {"embedding": embedder.embedding_dim, "features": embedder.feature_dim}
    return json_response(
        {
            "name": MODEL,
            "versions": [embedder.model_id],
            "platform": "onnxruntime_onnx",
            "inputs": [
                {"name": tensors.PIXELS, "datatype": "UINT8", "shape": [-1, side, side, 3]},
                {"name": tensors.ENCODED, "datatype": "BYTES", "shape": [-1]},
            ],
            "outputs": [
                {"name": output, "datatype": "FP32", "shape": [-1, widths[output]]}
                for output in tensors.OUTPUTS
            ],
        }
    )
