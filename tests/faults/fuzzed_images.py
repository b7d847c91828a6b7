"""Pictures made to do harm: bombs, lies, loops, what is no picture, and good ones that are cut or
mutated. All are made here, from a seed; none is kept."""

import random
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.faults.image_files import (
    chunk,
    flat_png,
    png_of_size,
    save,
    smooth,
    with_scans,
    with_true_checksums,
)


class Picture(NamedTuple):
    """One file, and how it is sent."""

    name: str
    content: bytes
    media_type: str = "image/png"


def hostile_pictures(seed: int = 0) -> Iterator[Picture]:
    """An endless mixture; the costly ones are about one in twenty."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    fixed = [*_fixed(rng), *_foreign()]
    costly = list(_costly())
    seeds = _seeds(rng)
    yield from fixed
    yield from costly
    while True:
        what = draw.random()
        if what < 0.05:
            yield draw.choice(costly)
        elif what < 0.2:
            yield draw.choice(fixed)
        elif what < 0.4:
            source = draw.choice(seeds)
            twentieth = draw.randrange(20)
            cut = source.content[: len(source.content) * twentieth // 20]
            yield Picture(f"cut {source.name}", cut, source.media_type)
        else:
            source = draw.choice(seeds)
            changed = bytearray(source.content)
            for _ in range(draw.randint(1, 8)):
                changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
            if source.media_type == "image/png" and draw.random() < 0.5:
                changed = bytearray(with_true_checksums(bytes(changed)))
            yield Picture(f"mutated {source.name}", bytes(changed), source.media_type)


def _seeds(rng: np.random.Generator) -> list[Picture]:
    photo = Image.fromarray(smooth(rng, 160, 120))
    clear = photo.convert("RGBA")
    clear.putalpha(Image.fromarray(smooth(rng, 160, 120)[..., 0]))
    return [
        Picture("jpeg", save(photo, "JPEG"), "image/jpeg"),
        Picture("progressive jpeg", save(photo, "JPEG", progressive=True), "image/jpeg"),
        Picture("cmyk jpeg", save(photo.convert("CMYK"), "JPEG"), "image/jpeg"),
        Picture("png", save(photo, "PNG")),
        Picture("rgba png", save(clear, "PNG")),
        Picture("palette png", save(photo.quantize(32), "PNG")),
        Picture("webp", save(photo, "WEBP"), "image/webp"),
        Picture("lossless webp", save(clear, "WEBP", lossless=True), "image/webp"),
        Picture(
            "animated webp", save(photo, "WEBP", save_all=True, append_images=[clear]), "image/webp"
        ),
    ]


def _fixed(rng: np.random.Generator) -> Iterator[Picture]:
    good = save(Image.fromarray(smooth(rng, 64, 48)), "PNG")
    yield Picture("0 bytes", b"")
    yield Picture("header only", good[:8])
    for width, height in ((0, 9), (9, 0), (2**31 - 1, 2**31 - 1), (2**31, 1), (1, 2**32 - 1)):
        yield Picture(f"{width} x {height}", png_of_size(width, height))
    for side in (13_000, 30_000):
        yield Picture(f"{side} px square of one bit", png_of_size(side, side, rows=side))
    broken = bytearray(good)
    broken[good.index(b"IDAT") + 12] ^= 4
    yield Picture("wrong checksum", bytes(broken))
    bomb = zlib.compress(bytes(50_000_000), 9)
    head, rest = good[:33], good[33:]
    yield Picture("zTXt bomb", head + chunk(b"zTXt", b"k\0\0" + bomb) + rest)
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000), 9))
    yield Picture("100 zTXt of 1 MB", head + text * 100 + rest)
    yield Picture("iCCP bomb", head + chunk(b"iCCP", b"p\0\0" + bomb) + rest)
    nested = zlib.compress(zlib.compress(bomb, 9), 9)
    yield Picture("iTXt in itself", head + chunk(b"iTXt", b"k\0\1\0\0\0" + nested) + rest)
    yield Picture("chunk past the end", head + struct.pack(">I", 2**31 - 1) + b"tEXt" + rest)
    yield Picture("70,000 chunks", head + chunk(b"tIME", bytes(7)) * 70_000 + rest)
    yield Picture("5,000 frames, APNG", head + chunk(b"fcTL", bytes(26)) * 5000 + rest)
    frames = [Image.new("RGB", (8, 8), (n % 256, n // 256, 7)) for n in range(5000)]
    animation = save(frames[0], "WEBP", save_all=True, append_images=frames[1:], method=0)
    yield Picture("5,000 frames, WebP", animation, "image/webp")
    jpeg = save(Image.fromarray(smooth(rng, 64, 48)), "JPEG")
    yield Picture("JPEG of 2^16 sizes", _resized(jpeg, 65_535, 65_535), "image/jpeg")
    yield Picture("JPEG without height", _resized(jpeg, 64, 0), "image/jpeg")
    loop = b"\xff\xe1\x00\x20Exif\0\0II*\0\x08\0\0\0" + b"\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    yield Picture("EXIF that points to itself", jpeg[:2] + loop + jpeg[2:], "image/jpeg")
    yield Picture("fill bytes", jpeg[:2] + b"\xff" * 3_000_000 + jpeg[2:], "image/jpeg")
    yield Picture("PDF in a JPEG", jpeg[:2] + b"%PDF-1.7\n" + jpeg[2:], "image/jpeg")


def _foreign() -> Iterator[Picture]:
    small = Image.new("RGB", (9, 9))
    for kind in ("GIF", "TIFF", "BMP", "PPM", "ICO", "TGA", "JPEG2000", "AVIF"):
        yield Picture(kind, save(small, kind))
    frames = [Image.new("P", (9, 9), n) for n in range(200)]
    yield Picture("GIF and JS", save(frames[0], "GIF", save_all=True) + b"/*alert(1)*/")
    entity = '<!DOCTYPE s [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><svg>&b;</svg>'
    yield Picture("SVG with entities", entity.encode())
    yield Picture("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n")
    yield Picture("WMF", b"\xd7\xcd\xc6\x9a" + bytes(60))
    yield Picture("PDF", b"%PDF-1.7\n1 0 obj<<>>endobj")
    yield Picture("TIFF of huge tags", b"II*\0\x08\0\0\0\x01\0\0\1\4\0\xff\xff\xff\x7f\0\0\0\0")
    yield Picture("ZIP", b"PK\x03\x04" + bytes(100))
    yield Picture("address", b"http://127.0.0.1:1/picture.png")


def _costly() -> Iterator[Picture]:
    """As large as is allowed, or just too large, in a few bytes."""
    for name, bits, colour, bytes_a_row in (
        ("1", 1, 0, 875),
        ("L", 8, 0, 7000),
        ("I;16", 16, 0, 14_000),
        ("RGB", 8, 2, 21_000),
        ("P", 8, 3, 7000),
        ("LA", 8, 4, 14_000),
        ("RGBA", 8, 6, 28_000),
        ("RGB of 16 bits", 16, 2, 42_000),
    ):
        yield Picture(f"49 Mpx {name}", flat_png(7000, bits, colour, bytes_a_row))
    whole_webp = save(Image.new("RGB", (7000, 7000)), "WEBP", method=0, lossless=True)
    yield Picture("49 Mpx WebP", whole_webp, "image/webp")
    lossless = save(Image.new("RGB", (5000, 5000)), "WEBP", method=0, lossless=True)
    yield Picture("25 Mpx WebP", lossless, "image/webp")
    plain = Image.new("RGB", (7000, 7000), (90, 30, 200))
    whole = save(plain, "JPEG", progressive=True, subsampling=0)
    yield Picture("49 Mpx progressive", whole, "image/jpeg")
    for scans in (12, 64, 1000):
        yield Picture(f"49 Mpx, {scans} scans", with_scans(whole, scans), "image/jpeg")
    four = save(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True)
    for scans in (30, 64, 1000):
        yield Picture(f"16 Mpx, {scans} scans", with_scans(four, scans), "image/jpeg")


def _resized(jpeg: bytes, width: int, height: int) -> bytes:
    place = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4 :]
