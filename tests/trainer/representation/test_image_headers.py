"""trainer.representation.image_headers: files that are small and take long, damage unseen."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from trainer.representation.image_headers import (
    MAX_FRAMES,
    MAX_FULL_SCANS,
    MAX_PARTS,
    MAX_SCANS,
    _looks_like_scans,
    refusal,
)
from trainer.representation.preprocess import (
    ImageRejected,
    InputContract,
    LargeImage,
    decode,
    prepare,
)

CONTRACT = InputContract(size_px=8)


def noise(width: int = 40, height: int = 30) -> Image.Image:
    generator = np.random.default_rng(5)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def ask(content: bytes, kind: str, *, pixels: int = 1200, max_pixels: int = 10**6) -> str | None:
    return refusal(content, kind, pixels=pixels, max_pixels=max_pixels)


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    checked = kind + body
    return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))


def with_scans(scans: int, *, inside: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan is repeated until it has so many."""
    content = encoded(noise(), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    have = content.count(b"\xff\xda")
    return content[:2] + inside + content[2:-2] + content[last:-2] * (scans - have) + b"\xff\xd9"


# -- JPEG ----------------------------------------------------------------------------------------


def test_jpeg__as_many_scans_as_allowed_and_one_more() -> None:
    assert prepare(with_scans(MAX_SCANS), CONTRACT).shape == (8, 8, 3)
    with pytest.raises(ImageRejected, match=f"more than {MAX_SCANS} scans, too many for its 1,200"):
        prepare(with_scans(MAX_SCANS + 1), CONTRACT)


def test_jpeg__fewer_scans_the_larger_it_is() -> None:
    content = with_scans(MAX_FULL_SCANS + 1)
    assert ask(content, "JPEG", pixels=10**6) is not None
    assert ask(content, "JPEG", pixels=10**6 * MAX_FULL_SCANS // (MAX_FULL_SCANS + 1)) is None
    assert ask(with_scans(MAX_FULL_SCANS), "JPEG", pixels=10**6) is None


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 501, 502])
def test_jpeg__markers_are_counted_at_every_place(length: int) -> None:
    rng = np.random.default_rng(length)
    content = rng.choice(np.array([0xFF, 0xDA, 0]), length).astype(np.uint8).tobytes()
    assert _looks_like_scans(content) == content.count(b"\xff\xda")


def test_jpeg__what_only_looks_like_scans_does_not_count() -> None:
    preview = b"\xff\xda\x00\x01" * 200
    comment = b"\xff\xfe" + struct.pack(">H", 2 + len(preview)) + preview
    content = encoded(noise(), "JPEG")
    inside = content[:2] + comment + content[2:]
    assert prepare(inside, CONTRACT).tolist() == prepare(content, CONTRACT).tolist()
    behind = content + preview  # after the end of the image
    assert prepare(behind, CONTRACT).tolist() == prepare(content, CONTRACT).tolist()
    # The comment hides nothing: its own scans are counted all the same.
    assert "scans" in (ask(with_scans(MAX_SCANS + 1, inside=comment), "JPEG") or "")


def test_jpeg__too_many_segments() -> None:
    flood = b"\xff\xfe\x00\x02" * (MAX_PARTS + 1) + b"\xff\xda\x00\x02" * (MAX_SCANS + 1)
    assert "segments" in (ask(b"\xff\xd8" + flood, "JPEG") or "")


def test_jpeg__a_flood_of_fill_bytes_is_walked_once() -> None:
    flood = b"\xff\xd8" + b"\xff" * 4_000_000 + b"\x00" + b"\xff\xda\x00\x02" * 70
    # 40 ms; a walk that began anew at every byte would not end within an hour.
    assert "scans" in (ask(flood, "JPEG", pixels=1) or "")


# -- PNG -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT", b"IEND", b"tEXt"])
def test_png__every_checksum_is_compared(kind: bytes) -> None:
    good = encoded(noise(), "PNG")
    good = good[:33] + chunk(b"tEXt", b"a\0b") + good[33:]
    assert ask(good, "PNG") is None
    place = good.index(kind)
    length = int.from_bytes(good[place - 4 : place], "big")
    checksum = place + 4 + length
    bad = good[:checksum] + bytes([good[checksum] ^ 1]) + good[checksum + 1 :]
    assert "checksum" in (ask(bad, "PNG") or "")
    assert kind.decode() in (ask(bad, "PNG") or "")
    with pytest.raises(ImageRejected):
        prepare(bad, CONTRACT)


def test_png__pixels_whose_checksum_is_wrong_are_not_served() -> None:
    # Pillow decodes this one without a word: the stream is whole, only another picture.
    row = b"\0" + bytes(range(30))
    packed = zlib.compress(row * 10, 0)  # stored: a changed byte stays a changed pixel
    header = struct.pack(">IIBBBBB", 10, 10, 8, 2, 0, 0, 0)
    damaged = bytearray(packed)
    damaged[20] ^= 0x40
    stream = bytes(damaged[:-4]) + struct.pack(
        ">I", zlib.adler32(zlib.decompressobj().decompress(bytes(damaged[:-4])))
    )
    content = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + struct.pack(">I", len(stream))
        + b"IDAT"
        + stream
        + struct.pack(">I", zlib.crc32(b"IDAT" + packed))
        + chunk(b"IEND")
    )
    Image.open(io.BytesIO(content)).load()
    with pytest.raises(ImageRejected, match=r"checksum of its chunk b'IDAT' at byte 33 is wrong"):
        prepare(content, CONTRACT)


def test_png__too_many_frames_and_chunks() -> None:
    good = encoded(noise(), "PNG")
    head, rest = good[:33], good[33:]
    frames = chunk(b"fcTL", b"\0" * 26)
    assert ask(head + frames * MAX_FRAMES + rest, "PNG") is None
    assert "frames" in (ask(head + frames * (MAX_FRAMES + 1) + rest, "PNG") or "")
    assert "chunks" in (ask(head + chunk(b"IDAT") * MAX_PARTS + rest, "PNG") or "")


def test_png__what_follows_the_end_does_not_matter() -> None:
    good = encoded(noise(), "PNG")
    assert ask(good + b"<html>" * 100, "PNG") is None
    assert ask(good[:-12], "PNG") is None  # the pixels are whole and verified


def test_png__a_chunk_longer_than_the_file() -> None:
    good = encoded(noise(), "PNG")
    assert "cut short" in (ask(good[:-20], "PNG") or "")
    huge = good[:33] + struct.pack(">I", 2**31 - 1) + b"zTXt" + bytes(40)
    assert "announces 2,147,483,647 bytes, 40 follow" in (ask(huge, "PNG") or "")


# -- WebP ----------------------------------------------------------------------------------------


def webp_of(frames: int) -> bytes:
    body = b"WEBP" + b"".join(b"ANMF" + struct.pack("<I", 3) + b"abc\0" for _ in range(frames))
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_webp__frames() -> None:
    assert ask(webp_of(MAX_FRAMES), "WEBP") is None
    assert "more than 1,000 frames" in (ask(webp_of(MAX_FRAMES + 1), "WEBP") or "")
    frames = [Image.new("RGB", (4, 4), (i % 256, i // 256, 0)) for i in range(MAX_FRAMES + 1)]
    for kept, refused in ((MAX_FRAMES, False), (MAX_FRAMES + 1, True)):
        content = encoded(
            frames[0],
            "WEBP",
            save_all=True,
            append_images=frames[1:kept],
            lossless=True,
            method=0,
            quality=0,
        )
        if refused:
            with pytest.raises(ImageRejected, match="frames"):
                prepare(content, CONTRACT)
        else:
            assert prepare(content, CONTRACT).shape == (8, 8, 3)


def test_webp__too_many_chunks() -> None:
    content = b"RIFF\0\0\0\0WEBP" + (b"JUNK" + bytes(4)) * (MAX_PARTS + 1)
    assert "chunks" in (ask(content, "WEBP") or "")


def test_others__are_not_looked_at() -> None:
    assert ask(b"anything", "TIFF") is None


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "kind", "options", "bytes_a_pixel"),
    [
        ("RGB", "PNG", {}, 4),
        ("RGBA", "PNG", {}, 8),
        ("L", "PNG", {}, 8),
        ("RGB", "WEBP", {}, 18),
        ("RGB", "JPEG", {}, 4),
        ("RGB", "JPEG", {"progressive": True}, 10),
        ("CMYK", "JPEG", {}, 8),
    ],
)
def test_most_bytes__is_compared_with_what_decoding_takes(
    mode: str, kind: str, options: dict[str, object], bytes_a_pixel: int
) -> None:
    content = encoded(noise().convert(mode), kind, **options)
    takes = 40 * 30 * bytes_a_pixel
    assert decode(content, most_bytes=takes).size == (40, 30)
    with pytest.raises(LargeImage, match=f"{takes:,} bytes; {takes - 1:,} are allowed"):
        decode(content, most_bytes=takes - 1)


def test_most_bytes__a_jpeg_counts_as_small_as_it_is_decoded() -> None:
    content = encoded(noise(160, 120), "JPEG")
    assert prepare(content, CONTRACT, most_bytes=20 * 15 * 4).shape == (8, 8, 3)
    with pytest.raises(LargeImage):
        prepare(content, InputContract(size_px=8, jpeg_draft=False), most_bytes=20 * 15 * 4)
