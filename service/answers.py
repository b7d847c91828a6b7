"""How answers are written: JSON by orjson, or numpy's formats for whoever asks for them.

In: plain values and arrays. Out: responses. Float32 values are written with the fewest digits that
read back as the same float32.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
from fastapi import Request
from numpy.typing import NDArray
from starlette.responses import Response

NPY, NPZ = "application/x-npy", "application/x-npz"


def wants(request: Request, media_type: str) -> bool:
    """Whether the Accept header names this type."""
    accepted = request.headers.get("accept", "")
    return any(part.partition(";")[0].strip().lower() == media_type for part in accepted.split(","))


def json_bytes(value: Any) -> bytes:
    """Encode; numpy arrays and scalars may stand anywhere inside."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def json_response(body: bytes | Any, status: int = 200) -> Response:
    """An application/json response of encoded bytes or of a small value."""
    content = body if isinstance(body, bytes) else json_bytes(body)
    return Response(content, status_code=status, media_type="application/json")


def npy_response(array: NDArray[Any], headers: Mapping[str, str]) -> Response:
    """An array as a .npy file."""
    return Response(npy_bytes(array), media_type=NPY, headers=dict(headers))


def npy_bytes(array: NDArray[Any]) -> bytes:
    """The bytes that numpy.save writes (format 1.0), for plain numbers in C order: a third of the
    time, which is what counts for an answer of one row."""
    shape = f"({array.shape[0]},)" if array.ndim == 1 else str(tuple(array.shape))
    header = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
    # numpy pads so that the values begin at a multiple of 64 bytes: 6 magic, 2 version, 2 length.
    padded = header.ljust(-(-(len(header) + 11) // 64) * 64 - 11) + "\n"
    length = len(padded).to_bytes(2, "little")
    return b"\x93NUMPY\x01\x00" + length + padded.encode() + array.tobytes()


def npz_response(arrays: Mapping[str, NDArray[Any]], headers: Mapping[str, str]) -> Response:
    """Named arrays as one .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
    return Response(buffer.getvalue(), media_type=NPZ, headers=dict(headers))
