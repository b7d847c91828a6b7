"""What the tests give to preprocess: a photo, pictures as files, a plain contract."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import sklearn.datasets
from PIL import Image

from trainer.representation.preprocess import InputContract

# A real photo of 640 x 427 px that scikit-learn carries.
PHOTO = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"
PLAIN = InputContract(size_px=8, resample="nearest")


def picture(width: int = 24, height: int = 24) -> Image.Image:
    """Every pixel of another colour, so that no turn or shift goes unseen."""
    row, column = np.mgrid[:height, :width]
    pixels = np.stack([row * 255 // height, column * 255 // width, (row + column) % 256], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, *, bits: int, colour: int, data: bytes, interlaced: bool) -> bytes:
    """A PNG written by hand, for what Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checked = kind + body
        return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )
