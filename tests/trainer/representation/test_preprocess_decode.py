"""trainer.representation.preprocess: files that are odd but valid are decoded to what they show."""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.trainer.representation.preprocess_inputs import PHOTO, encoded, picture, png
from trainer.representation import preprocess
from trainer.representation.preprocess import decode


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(decode(content))


TURNS: dict[int, Callable[[Image.Image], Image.Image]] = {
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_decode__exif_orientation(orientation: int, kind: str) -> None:
    upright = picture(30, 20)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    content = encoded(TURNS[orientation](upright), kind, exif=exif, **options)
    np.testing.assert_array_equal(decoded(content), np.asarray(upright))


def test_decode__grey() -> None:
    grey = picture().convert("L")
    np.testing.assert_array_equal(decoded(encoded(grey)), np.asarray(grey.convert("RGB")))


def test_decode__grey_with_alpha_is_laid_on_white() -> None:
    pixels = np.zeros((2, 2, 2), np.uint8)
    pixels[..., 0] = [[100, 100], [0, 0]]
    pixels[..., 1] = [[255, 0], [255, 0]]  # opaque left, clear right
    content = encoded(Image.fromarray(pixels))
    assert decoded(content)[..., 0].tolist() == [[100, 255], [0, 255]]


def test_decode__half_clear_colour_is_mixed_with_white() -> None:
    content = encoded(Image.new("RGBA", (2, 2), (200, 100, 0, 51)))  # a fifth of it
    np.testing.assert_allclose(decoded(content)[0, 0], [244, 224, 204], atol=1)


def test_decode__palette_with_a_clear_entry() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert decoded(encoded(image)).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    clear = encoded(image, transparency=bytes([255, 0]))
    assert decoded(clear).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("mode", "colours", "clear"),
    [
        ("L", [100, 7], 7),
        ("RGB", [(100, 100, 100), (7, 7, 7)], (7, 7, 7)),
        ("1", [255, 0], 0),
    ],
)
def test_decode__one_clear_colour(mode: str, colours: list[object], clear: object) -> None:
    image = Image.new(mode, (2, 1))
    for x, colour in enumerate(colours):
        image.putpixel((x, 0), colour)
    first = 255 if mode == "1" else 100
    assert decoded(encoded(image, transparency=clear))[0, :, 0].tolist() == [first, 255]


def test_decode__sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.array([[0, 128, 129, 25_700, 65_535]], np.uint16)
    # 65535 / 257 = 255; 128 / 257 rounds down and 129 / 257 up.
    assert decoded(encoded(Image.fromarray(grey)))[..., 0].tolist() == [[0, 0, 1, 100, 255]]


def test_decode__sixteen_bit_colour() -> None:
    row = struct.pack(">B6H", 0, 65_535, 25_700, 0, 0, 65_535, 12_850)
    content = png(2, 1, bits=16, colour=2, data=row, interlaced=False)
    assert decoded(content).tolist() == [[[255, 100, 0], [0, 255, 50]]]


def test_decode__one_bit() -> None:
    image = Image.fromarray(np.array([[True, False], [False, True]]))
    assert decoded(encoded(image))[..., 2].tolist() == [[255, 0], [0, 255]]


def test_decode__interlaced_png() -> None:
    pixels = np.asarray(picture(13, 11))
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)]  # Adam7: x, y, dx, dy
    passes += [(0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    data = b"".join(
        b"\0" + row.tobytes() for x, y, dx, dy in passes for row in pixels[y::dy, x::dx] if row.size
    )
    content = png(13, 11, bits=8, colour=2, data=data, interlaced=True)
    np.testing.assert_array_equal(decoded(content), pixels)


def test_decode__progressive_jpeg_equals_the_baseline() -> None:
    photo = Image.open(PHOTO).crop((0, 0, 64, 64))
    baseline, progressive = (encoded(photo, "JPEG", progressive=p) for p in (False, True))
    assert baseline != progressive
    np.testing.assert_array_equal(decoded(baseline), decoded(progressive))


@pytest.mark.parametrize("colour", [(255, 0, 0), (20, 200, 90), (255, 255, 255), (0, 0, 0)])
def test_decode__cmyk_jpeg_is_not_inverted(colour: tuple[int, int, int]) -> None:
    content = encoded(Image.new("RGB", (16, 16), colour).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(content)).mode == "CMYK"
    assert np.abs(decoded(content)[8, 8].astype(int) - colour).max() <= 4


def test_decode__animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    content = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert (decoded(content) == (255, 0, 0)).all()


def test_decode__colour_profile_is_ignored() -> None:
    plain = encoded(picture())
    with_profile = encoded(picture(), icc_profile=b"no profile at all" * 50)
    assert with_profile != plain
    np.testing.assert_array_equal(decoded(with_profile), decoded(plain))


def test_decode__content_counts_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encoded(picture()))
    np.testing.assert_array_equal(np.asarray(decode(path)), np.asarray(picture()))


def test_decode__trailing_bytes_do_not_matter() -> None:
    content = encoded(picture(), "JPEG")
    np.testing.assert_array_equal(decoded(content + b"PK\x03\x04" * 99), decoded(content))


def test_decode__png_without_its_end_chunk_is_accepted() -> None:
    # All pixels are there and verified; Pillow does not ask for the last 12 bytes, nor do we.
    content = encoded(picture())
    np.testing.assert_array_equal(decoded(content[:-12]), np.asarray(picture()))


@pytest.mark.parametrize("mode", ["RGB+key", "RGBA", "LA", "P+key", "L+key", "I;16"])
def test_decode__in_bands_equals_at_once(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    options: dict[str, object] = {}
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (31, 17), dtype=np.uint16))
    else:
        name, _, key = mode.partition("+")
        image = Image.fromarray(rng.integers(0, 256, (31, 17, 4), dtype=np.uint8)).convert(name)
        if key:
            clear = {"RGB": image.getpixel((3, 3)), "L": 9, "P": bytes(range(256))}
            options["transparency"] = clear[name]
    content = encoded(image, "PNG", **options)
    at_once = decoded(content)
    monkeypatch.setattr(preprocess, "_BAND_PIXELS", 17 * 4)  # bands of 4 rows and one of 3
    np.testing.assert_array_equal(decoded(content), at_once)
    assert len(np.unique(at_once)) > 50
