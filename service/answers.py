"""How answers are written: JSON by orjson, or numpy's formats for whoever asks for them.

In: plain values and arrays. Out: responses. Float32 values are written with the fewest digits that
read back as the same float32.
"""

import io
import struct
import zlib
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
    return Response(npz_bytes(arrays), media_type=NPZ, headers=dict(headers))


def npz_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """What numpy.savez writes: a zip archive of .npy members, stored as they are.

    Put together by hand: zipfile takes longer than the search of a small request.
    """
    if sum(array.nbytes for array in arrays.values()) >= 2**31:  # beyond the plain form of a zip
        buffer = io.BytesIO()
        np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
        return buffer.getvalue()
    members, directory = [], []
    offset = 0
    for name, array in arrays.items():
        content = npy_bytes(array)
        path = f"{name}.npy".encode()
        # Version needed, flags, method (stored), time and date (1980-01-01), CRC, sizes, lengths.
        shared = _ZIP_SHARED.pack(
            20, 0, 0, 0, 33, zlib.crc32(content), len(content), len(content), len(path), 0
        )
        members += [b"PK\x03\x04", shared, path, content]
        # Comment length, disk, attributes, where the member begins.
        directory += [b"PK\x01\x02\x14\x00", shared, _ZIP_PLACE.pack(0, 0, 0, 0, offset), path]
        offset += 4 + len(shared) + len(path) + len(content)
    size = sum(map(len, directory))
    end = _ZIP_END.pack(b"PK\x05\x06", 0, 0, len(arrays), len(arrays), size, offset, 0)
    return b"".join([*members, *directory, end])


_ZIP_SHARED = struct.Struct("<HHHHHIIIHH")
_ZIP_PLACE = struct.Struct("<HHHII")
_ZIP_END = struct.Struct("<4sHHHHIIH")
