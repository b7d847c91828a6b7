"""Pictures that are odd but valid, each with the pixels that it stands for, made from a seed."""

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.faults.image_files import Pixels, png, save, smooth


class Odd(NamedTuple):
    """A valid file and the upright RGB pixels that it stands for; `tolerance` in grey levels."""

    name: str
    content: bytes
    pixels: Pixels
    tolerance: int = 0


_TURNED: dict[int, Callable[[Pixels], Pixels]] = {  # upright -> as stored under that orientation
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: np.rot90(p, 2).swapaxes(0, 1),
    8: lambda p: np.rot90(p, 3),
}


def odd_pictures(seed: int = 0) -> Iterator[Odd]:
    """Valid pictures that decoders stumble over; all must be embedded as their pixels."""
    rng = np.random.default_rng(seed)
    pixels = smooth(rng, 45, 33)
    grey = pixels[..., 0]
    as_grey = np.repeat(grey[..., None], 3, axis=2)
    image = Image.fromarray(pixels)
    for orientation, turned in _TURNED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = Image.fromarray(np.ascontiguousarray(turned(pixels)))
        yield Odd(f"exif {orientation}, PNG", save(stored, "PNG", exif=exif), pixels)
        lossless = save(stored, "WEBP", exif=exif, lossless=True, exact=True)
        yield Odd(f"exif {orientation}, WebP", lossless, pixels)
        jpeg = save(stored, "JPEG", exif=exif, quality=100, subsampling=0)
        yield Odd(f"exif {orientation}, JPEG", jpeg, pixels, 6)
    yield Odd("grey", save(Image.fromarray(grey), "PNG"), as_grey)
    with_alpha = np.stack([grey, np.full_like(grey, 255)], axis=2)
    yield Odd("grey and alpha", save(Image.fromarray(with_alpha), "PNG"), as_grey)
    clear = np.dstack([pixels, np.zeros_like(grey)])
    yield Odd("wholly clear", save(Image.fromarray(clear), "PNG"), np.full_like(pixels, 255))
    palette = image.quantize(64)
    yield Odd("palette", save(palette, "PNG"), np.asarray(palette.convert("RGB")))
    keyed = save(palette, "PNG", transparency=bytes([255] * 64))
    yield Odd("palette with opaque tRNS", keyed, np.asarray(palette.convert("RGB")))
    deep = Image.fromarray((grey.astype(np.uint16) * 257).astype(np.uint16))
    yield Odd("16-bit grey", save(deep, "PNG"), as_grey)
    yield Odd("16-bit colour", png(pixels.astype(">u2") * 257, bits=16), pixels)
    bits = grey > 128
    black_white = np.repeat(np.where(bits, 255, 0).astype(np.uint8)[..., None], 3, axis=2)
    yield Odd("one bit", save(Image.fromarray(bits), "PNG"), black_white)
    flat = np.full((40, 30, 3), (200, 40, 90), np.uint8)
    cmyk = Image.fromarray(flat).convert("CMYK")
    yield Odd("CMYK JPEG", save(cmyk, "JPEG", quality=95), flat, 6)
    for name, profile in (("ICC nonsense", b"no profile" * 99), ("ICC 300 kB", bytes(300_000))):
        yield Odd(name, save(image, "PNG", icc_profile=profile), pixels)
    yield Odd("progressive", save(image, "JPEG", progressive=True, quality=100), pixels, 40)
    frames = [Image.fromarray(np.roll(pixels, n, axis=0)) for n in (5, 9)]
    animated = save(image, "WEBP", save_all=True, append_images=frames, lossless=True)
    yield Odd("animated WebP", animated, pixels)
    moving = save(image, "PNG", save_all=True, append_images=frames, default_image=True)
    yield Odd("APNG", moving, pixels)
    whole_jpeg = save(image, "JPEG", quality=100, subsampling=0)
    yield Odd("JPEG and a ZIP", whole_jpeg + b"PK\x03\x04" + bytes(500), pixels, 6)
    comment = b"\xff\xfe" + struct.pack(">H", 65_535) + bytes(65_533)
    yield Odd("JPEG, 20 comments", whole_jpeg[:2] + comment * 20 + whole_jpeg[2:], pixels, 6)
    yield Odd("PNG and HTML", save(image, "PNG") + b"<script>alert(1)</script>", pixels)
    yield Odd(
        "MPO", save(image, "MPO", save_all=True, append_images=frames, quality=100), pixels, 40
    )
    for shape in ((1, 1), (1, 300), (300, 1), (3, 5000), (5000, 3), (1, 65_500)):
        strip = np.full((*shape, 3), (10, 120, 230), np.uint8)
        yield Odd(f"{shape[1]} x {shape[0]}, PNG", save(Image.fromarray(strip), "PNG"), strip)
        jpeg = save(Image.fromarray(strip), "JPEG", quality=95)
        yield Odd(f"{shape[1]} x {shape[0]}, JPEG", jpeg, strip, 3)
