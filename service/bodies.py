"""How request bodies are read: limits first, then one parser for each content type.

In: a request. Out: encoded images, vectors, options; or a Problem that says what was got. Nothing
here decodes an image or searches.
"""

import base64
import binascii
import contextlib
import json
import math
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import orjson
from fastapi import Request
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from service.errors import Problem, over_limit, validation_problem
from service.settings import Settings
from trainer.representation.preprocess import ImageRejected

JSON, NPY, NDJSON = "application/json", "application/x-npy", "application/x-ndjson"
MULTIPART = "multipart/form-data"
IMAGES = ("image/jpeg", "image/png", "image/webp")

EncodedImages = list[bytes | ImageRejected]  # what could not even be unwrapped keeps its place
Options = TypeVar("Options", bound=BaseModel)

_NPY_MAGIC = b"\x93NUMPY"
_NPY_HEADER = re.compile(
    rb"\s*\{\s*'descr':\s*'([<>|=][a-z]\d{1,2})',\s*'fortran_order':\s*(True|False),"
    rb"\s*'shape':\s*(\((?:\d{1,12},?\s*){0,8}\)),?\s*\}\s*"
)
_DATA_URI = re.compile(r"data:(image/[a-z0-9.+-]+)?;base64,", re.IGNORECASE)


def content_type(request: Request) -> str:
    """The content type without parameters, lower case; empty when there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def unsupported(request: Request, wanted: Sequence[str]) -> Problem:
    """The problem of a content type that a route does not take."""
    got = content_type(request) or "none"
    return Problem(
        "unsupported_media_type",
        f"Content-Type is {got}; this route takes {', '.join(wanted)}.",
        supported=list(wanted),
    )


def check_count(what: str, count: int, settings: Settings, setting: str) -> None:
    """Refuse more than the setting allows of something."""
    limit = getattr(settings, setting)
    if count > limit:
        raise over_limit("too_many", what, count, setting, limit)


def parse_json(text: bytes, what: str = "the body") -> Any:
    """Parse JSON; `what` names it in the problem."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Problem("bad_request", f"{what} is no JSON: {error}") from None


def check_keys_once(text: bytes) -> None:
    """Refuse JSON in which an object names a key twice: which of them was meant?

    Args:
        text: JSON that has been parsed; small, for it is read once more.
    """

    def once(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                detail = f"the body has the key {key[:64]!r} twice; say it once"
                raise Problem("bad_request", detail)
            seen.add(key)

    try:
        json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise Problem("bad_request", "the body is nested too deeply") from None


def validate(model: type[Options], values: Any) -> Options:
    """Validate parsed values against a schema."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise validation_problem(error.errors()) from None


def parse_npy(body: bytes, dtype: str, shape: Sequence[int | None]) -> NDArray[Any]:
    """Read a .npy body of one given kind; a view of the body, nothing is unpickled.

    Args:
        dtype: as in the header, such as "<f4".
        shape: what the array must have; None for any number.
    """

    def refused(found: str) -> Problem:  # put into words only when there is something to say
        wanted = f"a .npy of {np.dtype(dtype).name} with shape {_shape_text(shape)}"
        return Problem("invalid_request", found.format(wanted=wanted))

    try:
        (kind, fortran, got), offset = _npy_header(body)
    except ValueError as error:
        raise refused(f"{error}; wanted {{wanted}}") from None
    matches = len(got) == len(shape) and all(
        w in (None, g) for g, w in zip(got, shape, strict=True)
    )
    if kind != dtype or fortran or not matches:
        order = " in Fortran order" if fortran else ""
        raise refused(f"wanted {{wanted}}, got {kind} {_shape_text(got)}{order}")
    size = math.prod(got) * np.dtype(dtype).itemsize
    if size != len(body) - offset:
        raise Problem(
            "invalid_request",
            f"the .npy header announces {size} bytes of values, {len(body) - offset} follow it",
        )
    return np.frombuffer(body, dtype, offset=offset).reshape(got)


def _npy_header(body: bytes) -> tuple[tuple[str, bool, tuple[int, ...]], int]:
    """Kind, order and shape, and where the values begin; ValueError when it cannot be read."""
    version_sizes = {1: 2, 2: 4, 3: 4}  # bytes of the header's length
    size = version_sizes.get(body[6]) if len(body) > 10 and body.startswith(_NPY_MAGIC) else None
    if size is None:
        raise ValueError("the body is no .npy file")
    offset = 8 + size + int.from_bytes(body[8 : 8 + size], "little")
    match = _NPY_HEADER.fullmatch(body[8 + size : offset])
    if match is None:
        raise ValueError("the .npy header cannot be read (plain arrays only)")
    kind, fortran, shape = match.groups()
    numbers = tuple(int(n) for n in re.findall(rb"\d+", shape))
    return (kind.decode(), fortran == b"True", numbers), offset


def _shape_text(shape: Sequence[int | None]) -> str:
    return "(" + ", ".join("n" if s is None else str(s) for s in shape) + ")"


def decode_image_text(text: str) -> bytes | ImageRejected:
    """A data URI or bare base64 -> the encoded image."""
    match = _DATA_URI.match(text)
    if match is None and ":" in text[:32]:
        scheme = text.partition(":")[0][:16]
        return ImageRejected(
            f"{scheme}: addresses are not fetched; send the image itself as "
            "data:image/...;base64,... or bare base64"
        )
    try:
        image = base64.b64decode(text[match.end() if match else 0 :], validate=True)
    except (binascii.Error, ValueError) as error:
        return ImageRejected(f"this is no base64: {error}")
    return image if image else ImageRejected("the image is empty (0 bytes)")


@contextlib.asynccontextmanager
async def read_form(
    request: Request, settings: Settings, fields: Sequence[str] = ()
) -> AsyncIterator[FormData]:
    """Read a multipart body; only files named `images` and the text parts `fields` are known."""
    try:
        form = await request.form(
            max_files=settings.max_images + len(fields),
            max_fields=len(fields) + 1,
            max_part_size=settings.max_images * settings.max_metadata_bytes,
        )
    except HTTPException as error:
        if "Too many files" in str(error.detail):
            raise over_limit(
                "too_many", "images", settings.max_images + 1, "max_images", settings.max_images
            ) from None
        raise Problem("bad_request", f"the multipart body cannot be read: {error.detail}") from None
    try:
        _check_parts(form, fields)
        yield form
    finally:
        await form.close()  # releases what was spooled to disk


def _check_parts(form: FormData, fields: Sequence[str]) -> None:
    for name, value in form.multi_items():
        if name == "images" and isinstance(value, UploadFile):
            continue
        if name not in fields:
            what = "without a file name" if name == "images" else "is not known"
            known = ", ".join(("images (files)", *fields))
            raise Problem("invalid_request", f"the part {name!r} {what}; known parts: {known}")


async def form_images(form: FormData, settings: Settings) -> list[tuple[str, bytes]]:
    """The parts `images` of a form: (file name, content), in order; at least one."""
    uploads = [u for u in form.getlist("images") if isinstance(u, UploadFile)]
    if not uploads:
        raise Problem("invalid_request", "the form has no part `images` with a file")
    check_count("images", len(uploads), settings, "max_images")
    return [(upload.filename or "", await upload.read()) for upload in uploads]


def query_options(parameters: Mapping[str, str], wanted: Sequence[str]) -> dict[str, Any]:
    """Options from query parameters, as the JSON body would hold them: k=5&filter={"a":1}.

    Numbers, booleans and objects are written as in JSON; everything else is text. `include` is a
    list, written with commas.
    """
    unknown = set(parameters) - set(wanted)
    if unknown:
        raise Problem(
            "invalid_request",
            f"unknown query parameter {sorted(unknown)[0]!r}; known: {', '.join(wanted)}",
        )
    options: dict[str, Any] = {}
    for name, text in parameters.items():
        if name == "include":
            options[name] = [part for part in text.split(",") if part]
            continue
        try:
            options[name] = orjson.loads(text)
        except orjson.JSONDecodeError:
            options[name] = text
    return options
