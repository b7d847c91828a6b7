"""Pictures that are odd but valid, pictures made to do harm, and a service that is sent them.

    python tests/faults/hostile_images.py --images 10000 --seed 0

starts the service in a process of its own, sends the hostile ones over several connections with an
honest client beside them, and prints what came back. Fails (exit 1) unless there was no 5xx, no
honest failure, no answer after more than 3 s and no more than 512 MiB above the idle service and
its children. All files are made here, from a seed; none is kept.
"""

import argparse
import http.client
import io
import itertools
import random
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.faults.started import Started
from tests.service.conftest import build_bundle, encoded

CONNECTIONS = 4
SLOWEST_S = 3.0
MOST_BYTES = 512 * 2**20
Pixels = NDArray[np.uint8]


class Picture(NamedTuple):
    """One file, and how it is sent."""

    name: str
    content: bytes
    media_type: str = "image/png"


class Odd(NamedTuple):
    """A valid file and the upright RGB pixels that it stands for; `tolerance` in grey levels."""

    name: str
    content: bytes
    pixels: Pixels
    tolerance: int = 0


# -- odd but valid -------------------------------------------------------------------------------

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


# -- made to do harm -----------------------------------------------------------------------------


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


# -- pieces --------------------------------------------------------------------------------------


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


def _resized(jpeg: bytes, width: int, height: int) -> bytes:
    place = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4 :]


# -- the attack ----------------------------------------------------------------------------------


@dataclass
class Figures:
    """What came back."""

    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)  # what must never happen, in words
    slowest_s: float = 0.0
    slowest: str = ""
    honest: int = 0
    honest_s: list[float] = field(default_factory=list)
    grown_bytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        honest = sorted(self.honest_s)
        return (
            f"{sum(self.statuses.values())} hostile pictures in {self.seconds:.0f} s: "
            f"{dict(sorted(self.statuses.items()))}; slowest {self.slowest_s:.2f} s "
            f"({self.slowest}); {self.honest} honest, "
            f"p50 {1000 * honest[len(honest) // 2]:.1f} ms, "
            f"p99 {1000 * honest[len(honest) * 99 // 100]:.0f} ms, slowest {honest[-1]:.2f} s; "
            f"memory + {self.grown_bytes / 2**20:.0f} MiB; {len(self.failures)} failures"
        )


def attack(
    folder: Path, *, images: int, seed: int, connections: int = CONNECTIONS, **settings: object
) -> Figures:
    """Send so many hostile pictures to a service; an honest client asks all the while."""
    bundle = build_bundle(folder / "bundle")
    figures, lock = Figures(), threading.Lock()
    source = itertools.islice(hostile_pictures(seed), images)
    done = threading.Event()
    with Started(bundle, folder / "state", log=folder / "log", **settings) as service:

        def fail(text: str) -> None:
            with lock:
                figures.failures.append(text)

        def be_hostile() -> None:
            while True:
                with lock:
                    picture = next(source, None)
                if picture is None:
                    return
                begun = time.monotonic()
                try:
                    status, answer = post(service.port, picture.content, picture.media_type)
                except (OSError, http.client.HTTPException) as error:
                    fail(f"{picture.name}: no answer ({error!r})")
                    continue
                took = time.monotonic() - begun
                with lock:
                    figures.statuses[status] += 1
                    if took > figures.slowest_s:
                        figures.slowest_s, figures.slowest = took, picture.name
                if status >= 500:
                    fail(f"{picture.name}: {status} {answer[:200]!r}")

        honest_image = encoded(77, size=(400, 300), format="JPEG")

        def be_honest(expected: bytes) -> None:
            while not done.is_set():
                begun = time.monotonic()
                try:
                    status, answer = post(service.port, honest_image, "image/jpeg")
                except (OSError, http.client.HTTPException) as error:
                    fail(f"honest: no answer ({error!r})")
                    continue
                figures.honest += 1
                figures.honest_s.append(time.monotonic() - begun)
                if status != 200 or answer != expected:
                    fail(f"honest: {status} {answer[:200]!r}")
                done.wait(0.02)

        expected = post(service.port, honest_image, "image/jpeg")[1]
        idle_bytes = service.resident_bytes()
        service.watch_memory()
        begun = time.monotonic()
        honest = threading.Thread(target=be_honest, args=(expected,))
        honest.start()
        senders = [threading.Thread(target=be_hostile) for _ in range(connections)]
        for thread in senders:
            thread.start()
        for thread in senders:
            thread.join()
        figures.seconds = time.monotonic() - begun
        done.set()
        honest.join()
        figures.grown_bytes = service.peak_bytes - idle_bytes
        if service.ended:
            fail("the service has ended")
        if (code := service.stop()) != 0:
            fail(f"the service ended with {code}")
    return figures


def post(port: int, body: bytes, media_type: str, path: str = "/embed") -> tuple[int, bytes]:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", path, body, {"Content-Type": media_type})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def embedding(answer: bytes) -> NDArray[np.float32]:
    """The first embedding of an answer."""
    return np.asarray(orjson.loads(answer)["embeddings"][0], np.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = attack(
            Path(folder),
            images=options.images,
            seed=options.seed,
            connections=options.connections,
        )
    say = sys.stdout.write
    say(f"seed {options.seed}: {figures}\n")
    for failure in figures.failures[:20]:
        say(f"{failure}\n")
    kept = figures.slowest_s <= SLOWEST_S and figures.grown_bytes <= MOST_BYTES
    return 0 if kept and not figures.failures else 1


if __name__ == "__main__":
    sys.exit(main())
