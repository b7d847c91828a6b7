"""The wire format of the Open Inference Protocol: JSON, or JSON followed by raw tensors.

In: a body and the length of its JSON part. Out: images or prepared pixels, and which outputs are
wanted in which form; and the other way round the answer. Shared memory is not served.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from service.answers import json_bytes
from service.bodies import EncodedImages, decode_image_text, parse_json, validate
from service.errors import Problem, over_limit
from trainer.representation.preprocess import ImageRejected

PIXELS, ENCODED = "images", "encoded_images"  # names of the inputs
OUTPUTS = ("embedding", "features")
MAX_JSON_PART = 65_536  # of a body that carries raw tensors, which are not counted as JSON
_MAX_DIM = 2**31


class Tensor(BaseModel):
    """One input."""

    model_config = ConfigDict(strict=True)

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0, le=_MAX_DIM)]], Field(max_length=8)]
    datatype: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: Any = Field(default=None, description="Values, flat or nested; for BYTES base64 texts.")


class WantedOutput(BaseModel):
    """One output that is asked for."""

    model_config = ConfigDict(strict=True)

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class InferRequest(BaseModel):
    """A request of the Open Inference Protocol; parameters that are not known mean nothing."""

    model_config = ConfigDict(strict=True)

    id: str | None = Field(default=None, max_length=512)
    inputs: Annotated[list[Tensor], Field(min_length=1, max_length=8)]
    outputs: Annotated[list[WantedOutput], Field(max_length=8)] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Inference:
    """What is to be computed: pixels or encoded images, never both."""

    request: InferRequest
    pixels: NDArray[np.uint8] | None  # (n, S, S, 3)
    encoded: EncodedImages | None
    outputs: Mapping[str, bool]  # name -> as raw bytes


def parse(body: bytes, json_size: int | None, side: int, max_images: int) -> Inference:
    """Read a request.

    Args:
        json_size: bytes of the JSON part; None: all of it.
        side: S of the input contract.

    Raises:
        Problem: bad_request, invalid_request, too_many.
    """
    text, raw = body, b""
    if json_size is not None:
        if json_size > len(body):
            raise Problem(
                "invalid_request",
                f"Inference-Header-Content-Length is {json_size:,}, the body has {len(body):,} "
                "bytes",
            )
        text, raw = body[:json_size], body[json_size:]
    request = validate(InferRequest, parse_json(text))
    named = [tensor.name for tensor in request.inputs]
    if len(named) != 1 or named[0] not in (PIXELS, ENCODED):
        raise Problem(
            "invalid_request",
            f"inputs: wanted exactly one of {PIXELS!r} (UINT8, prepared) and {ENCODED!r} (BYTES); "
            f"got {', '.join(repr(name[:64]) for name in named)}",
        )
    outputs = _wanted(request)
    tensor = request.inputs[0]
    buffer = _buffer_of(tensor, raw)
    if len(raw) != (0 if buffer is None else len(buffer)):
        raise Problem(
            "invalid_request",
            f"{len(raw):,} bytes follow the JSON part, the inputs' binary_data_size adds up to "
            f"{0 if buffer is None else len(buffer):,}",
        )
    count = tensor.shape[0] if tensor.shape else 0
    if count > max_images:
        raise over_limit("too_many", "images", count, "max_images", max_images)
    if tensor.name == PIXELS:
        return Inference(request, _pixels(tensor, buffer, side), None, outputs)
    return Inference(request, None, _encoded(tensor, buffer), outputs)


def answer(
    inference: Inference, model: str, name: str, tables: Mapping[str, NDArray[np.float32]]
) -> tuple[bytes, int | None]:
    """Encode an answer; gives its body and, when raw tensors follow it, the size of the JSON.

    Args:
        tables: output -> (n, dim) float32.
    """
    outputs: list[dict[str, Any]] = []
    buffers: list[bytes] = []
    for output, as_bytes in inference.outputs.items():
        table = np.ascontiguousarray(tables[output], "<f4")
        entry: dict[str, Any] = {
            "name": output,
            "datatype": "FP32",
            "shape": list(table.shape),
        }
        if as_bytes:
            buffers.append(table.tobytes())
            entry["parameters"] = {"binary_data_size": len(buffers[-1])}
        else:
            entry["data"] = table.reshape(-1)
        outputs.append(entry)
    document: dict[str, Any] = {"model_name": name, "model_version": model, "outputs": outputs}
    if inference.request.id is not None:
        document["id"] = inference.request.id
    head = json_bytes(document)
    return b"".join([head, *buffers]), len(head) if buffers else None


def _wanted(request: InferRequest) -> dict[str, bool]:
    default = request.parameters.get("binary_data_output") is True
    if not request.outputs:
        return dict.fromkeys(OUTPUTS, default)
    wanted: dict[str, bool] = {}
    for output in request.outputs:
        if output.name not in OUTPUTS or output.name in wanted:
            raise Problem(
                "invalid_request",
                f"outputs: wanted each of {', '.join(OUTPUTS)} at most once, got "
                f"{output.name[:64]!r}",
            )
        wanted[output.name] = output.parameters.get("binary_data", default) is True
    return wanted


def _buffer_of(tensor: Tensor, raw: bytes) -> bytes | None:
    if "shared_memory_region" in tensor.parameters:
        raise Problem("invalid_request", f"{tensor.name}: shared memory is not served; send data")
    size = tensor.parameters.get("binary_data_size")
    if size is None:
        return None
    if type(size) is not int or not 0 <= size <= len(raw):
        raise Problem(
            "invalid_request",
            f"{tensor.name}: binary_data_size is {str(size)[:32]}, {len(raw):,} bytes follow the "
            "JSON part",
        )
    if tensor.data is not None:
        raise Problem("invalid_request", f"{tensor.name}: both data and binary_data_size")
    return raw[:size]


def _pixels(tensor: Tensor, buffer: bytes | None, side: int) -> NDArray[np.uint8]:
    wanted = f"UINT8 of shape [n, {side}, {side}, 3], n at least 1"
    shape = tuple(tensor.shape)
    if tensor.datatype != "UINT8" or shape[1:] != (side, side, 3) or shape[0] < 1:
        raise Problem(
            "invalid_request",
            f"{PIXELS}: wanted {wanted}; got {tensor.datatype[:16]} {tensor.shape}",
        )
    values = _numbers(tensor.data) if buffer is None else np.frombuffer(buffer, np.uint8)
    if values.size != math.prod(shape):
        raise Problem(
            "invalid_request",
            f"{PIXELS}: shape {tensor.shape} wants {math.prod(shape):,} values, got "
            f"{values.size:,}",
        )
    return values.reshape(shape)


def _numbers(data: Any) -> NDArray[np.uint8]:
    try:
        values = np.asarray(data)
    except (ValueError, OverflowError):
        values = np.empty(0, object)
    whole = values.dtype.kind in "iu"
    if not whole or (values.size and not 0 <= values.min() <= values.max() < 256):
        raise Problem("invalid_request", f"{PIXELS}: data: wanted integers 0..255")
    return values.astype(np.uint8).reshape(-1)


def _encoded(tensor: Tensor, buffer: bytes | None) -> EncodedImages:
    shape = tensor.shape
    if tensor.datatype != "BYTES" or shape[1:] not in ([], [1]) or not shape or shape[0] < 1:
        raise Problem(
            "invalid_request",
            f"{ENCODED}: wanted BYTES of shape [n] or [n, 1], n at least 1; got "
            f"{tensor.datatype[:16]} {shape}",
        )
    if buffer is not None:
        return _split(buffer, shape[0])
    data = tensor.data
    if isinstance(data, list) and all(isinstance(row, list) and len(row) == 1 for row in data):
        data = [row[0] for row in data]
    if not (isinstance(data, list) and all(isinstance(text, str) for text in data)):
        raise Problem("invalid_request", f"{ENCODED}: data: wanted base64 texts or data URIs")
    _check_count(len(data), shape[0])
    return [decode_image_text(text) for text in data]


def _split(buffer: bytes, count: int) -> EncodedImages:
    """Elements of four bytes little-endian length and as many bytes each."""
    images: list[bytes | ImageRejected] = []
    at = 0
    while at < len(buffer) and len(images) <= count:
        size = int.from_bytes(buffer[at : at + 4], "little")
        at += 4 + size
        if at > len(buffer):
            raise Problem("invalid_request", f"{ENCODED}: element {len(images)} is cut short")
        image = buffer[at - size : at]
        images.append(image or ImageRejected("the image is empty (0 bytes)"))
    _check_count(len(images), count)
    return images


def _check_count(got: int, wanted: int) -> None:
    if got != wanted:
        raise Problem(
            "invalid_request", f"{ENCODED}: the shape says {wanted:,} images, data holds {got:,}"
        )
