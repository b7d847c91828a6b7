"""POST /embed: images in, embeddings or features out, in the order of the images."""

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from service import bodies
from service.answers import NPY, json_bytes, json_response, npy_response, wants
from service.images import Row
from service.openapi import body_of, problems
from service.queries import rejected_images, rejections
from service.routes.access import runtime_of
from service.runtime import Runtime
from service.schemas.embed import EmbedAnswer, EmbedRequest
from trainer.representation.preprocess import ImageRejected

router = APIRouter(tags=["embed"])
Output = Literal["embedding", "features"]
_FEW_IMAGES = 4  # 2,048 numbers each are written as JSON in 0.3 ms
ACCEPTED = (bodies.JSON, bodies.MULTIPART, bodies.NPY, *bodies.IMAGES)


@router.post(
    "/embed",
    response_model=EmbedAnswer,
    responses=problems(400, 413, 415, 422, 429, 503, 504, alternatives={200: [NPY]}),
    openapi_extra=body_of(EmbedRequest, ACCEPTED),
    summary="Embed images",
)
async def embed(
    request: Request,
    output: Annotated[Output, Query(description="Which output of the encoder.")] = "embedding",
    on_error: Annotated[
        Literal["reject", "skip"],
        Query(description="`skip`: answer the good images, null for the bad ones."),
    ] = "reject",
) -> Response:
    """Bodies: one image; multipart parts `images`; JSON; or .npy uint8 (n, S, S, 3), prepared.

    With `Accept: application/x-npy` the answer is a float32 .npy (n, dim); a skipped image is a row
    of NaN there and its index stands in the header X-Rejected.
    """
    return await _embed(request, output, on_error)


async def embed_plainly(request: Request) -> Response:
    """`embed` without options, as service.routes.direct calls it."""
    return await _embed(request, "embedding", "reject")


async def _embed(request: Request, output: Output, on_error: str) -> Response:
    runtime = runtime_of(request)
    if bodies.content_type(request) not in ACCEPTED:
        raise bodies.unsupported(request, ACCEPTED)
    runtime.images.refuse_when_full()
    async with runtime.deadline() as deadline:
        outcomes = await _embed_body(request, runtime, deadline)
        rejected = rejections(outcomes)
        if rejected and on_error == "reject":
            raise rejected_images(outcomes)
        arguments = (runtime, outcomes, rejected, output, wants(request, NPY))
        if len(outcomes) <= _FEW_IMAGES:  # the way to a thread and back would take longer
            return _answer(*arguments)
        return await runtime.compute(_answer, *arguments)


async def _embed_body(
    request: Request, runtime: Runtime, deadline: float
) -> list[Row | ImageRejected]:
    settings, side = runtime.settings, runtime.embedder.contract.size_px
    kind = bodies.content_type(request)
    if kind == bodies.NPY:
        pixels = bodies.parse_npy(await request.body(), "|u1", (None, side, side, 3))
        bodies.check_count("images", len(pixels), settings, "max_images")
        return list(await runtime.images.embed_pixels(pixels, deadline))
    if kind == bodies.JSON:
        body = await request.body()
        images = await runtime.compute(_parse_json, body, runtime)
    elif kind == bodies.MULTIPART:
        async with bodies.read_form(request, settings) as form:
            images = [image for _, image in await bodies.form_images(form, settings)]
    else:
        images = [await request.body()]
    return await runtime.images.embed(images, deadline)


def _parse_json(body: bytes, runtime: Runtime) -> bodies.EncodedImages:
    texts = bodies.validate(EmbedRequest, bodies.parse_json(body)).images
    bodies.check_count("images", len(texts), runtime.settings, "max_images")
    return [bodies.decode_image_text(text) for text in texts]


def _answer(
    runtime: Runtime,
    outcomes: list[Row | ImageRejected],
    rejected: list[dict[str, Any]],
    output: Output,
    as_npy: bool,
) -> Response:
    model = runtime.embedder.model_id
    dim = runtime.embedder.embedding_dim if output == "embedding" else runtime.embedder.feature_dim
    rows = [
        None if isinstance(outcome, ImageRejected) else outcome[0 if output == "embedding" else 1]
        for outcome in outcomes
    ]
    if as_npy:
        table = np.full((len(rows), dim), np.nan, np.float32)
        for index, row in enumerate(rows):
            if row is not None:
                table[index] = row
        headers = {"X-Model-Id": model}
        if rejected:
            headers["X-Rejected"] = ",".join(str(entry["index"]) for entry in rejected)
        return npy_response(table, headers)
    answer = {"model": model, "output": output, "dim": dim, "embeddings": rows}
    if rejected:
        answer["errors"] = rejected
    return json_response(json_bytes(answer))
