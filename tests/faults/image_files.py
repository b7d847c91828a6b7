"""Image files and pieces of them, also such as no library writes: any size, depth, scans, text."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def smooth(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """Coarse noise, enlarged: it compresses as photographs do. (H, W, 3) uint8."""
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    """One chunk of a PNG with its checksum."""
    checked = kind + body
    return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))


def png(values: NDArray[Any], *, bits: int) -> bytes:
    """(H, W, 3) of big-endian values as an RGB PNG of so many bits."""
    height, width, _ = values.shape
    data = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + _data(data) + chunk(b"IEND")


def flat_png(side: int, bits: int, colour: int, bytes_a_row: int) -> bytes:
    """A black square; the file is a thousandth of its pixels."""
    header = struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(3)) if colour == 3 else b""
    data = zlib.compress(bytes((bytes_a_row + 1) * side), 1)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette
    return start + chunk(b"IDAT", data) + chunk(b"IEND")


def png_of_size(width: int, height: int, *, rows: int = 1) -> bytes:
    """A PNG of one bit whose header says any size, with so many black rows in it."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = bytes(min(width, 30_000) // 8 + 1) * rows
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + _data(data) + chunk(b"IEND")


def _data(data: bytes) -> bytes:
    return chunk(b"IDAT", zlib.compress(data, 6))


def with_true_checksums(content: bytes) -> bytes:
    """A mutated PNG whose checksums are made right again, as far as its chunks can be read."""
    parts, place = [content[:8]], 8
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        if place + 12 + length > len(content):
            break
        parts.append(chunk(content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    return b"".join(parts) + content[place:]


def with_scans(jpeg: bytes, scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated until it has so many."""
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[last:-2] * (scans - jpeg.count(b"\xff\xda")) + jpeg[-2:]
