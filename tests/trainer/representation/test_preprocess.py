import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image, ImageFile

from trainer.representation import preprocess
from trainer.representation.preprocess import (
    MAX_PIXELS,
    ImageRejected,
    InputContract,
    decode,
    fit,
    fit_array,
    prepare,
)

# A real photo of 640 x 427 px that scikit-learn carries.
PHOTO = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"
PLAIN = InputContract(size_px=8, resample="nearest")

# What decoding a JPEG at a fraction of its size may change on PHOTO, in grey levels of 255. It is
# largest where the fraction leaves just the side that is needed (54 px for 48): the decoder's box
# filter is sharper than the resize it stands in for. Measured: mean 2.2, 5.4, 2.7; most 15, 55, 35.
MEAN_GREY_LEVELS = 6
MAX_GREY_LEVELS = 60


def picture(width: int = 24, height: int = 24) -> Image.Image:
    """Every pixel of another colour, so that no turn or shift goes unseen."""
    row, column = np.mgrid[:height, :width]
    pixels = np.stack([row * 255 // height, column * 255 // width, (row + column) % 256], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(decode(content))


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


# -- how an upright picture is fitted ------------------------------------------------------------


def test_fit__keeps_the_largest_central_square() -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, :8], wide[:, 8:16], wide[:, 16:] = 10, np.asarray(picture(8, 8)), 200
    for pixels in (wide, wide.swapaxes(0, 1)):
        middle = pixels[:, 8:16] if pixels is wide else pixels[8:16]
        np.testing.assert_array_equal(fit(Image.fromarray(pixels), PLAIN), middle)


def test_fit__crop_fraction_keeps_the_middle() -> None:
    contract = InputContract(size_px=8, crop_fraction=0.5, resample="bilinear")
    pixels = np.asarray(picture(16, 16))
    np.testing.assert_array_equal(fit(Image.fromarray(pixels), contract), pixels[4:12, 4:12])


def test_fit__shrinking_averages_the_area() -> None:
    # Columns 0 and 255 in turn: a resize that only looks at points would keep one of them.
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    small = fit(Image.fromarray(stripes).convert("RGB"), InputContract(size_px=8))
    assert np.abs(small.astype(int) - 127).max() <= 6


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (5000, 3), (3, 5000), (65_500, 1)])
@pytest.mark.parametrize("crop_fraction", [1.0, 0.875])
def test_prepare__odd_shapes(size: tuple[int, int], crop_fraction: float) -> None:
    contract = InputContract(size_px=16, crop_fraction=crop_fraction)
    for kind in ("PNG", "JPEG"):
        square = prepare(encoded(Image.new("RGB", size, (60, 120, 180)), kind), contract)
        assert square.shape == (16, 16, 3)
        assert square.dtype == np.uint8
        assert np.abs(square.astype(int) - (60, 120, 180)).max() <= 3


def test_fit_array__grey_and_colour_agree() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    expected = np.repeat(grey[..., None], 3, axis=2)
    for pixels in (grey, grey[..., None], expected):
        np.testing.assert_array_equal(fit_array(pixels, PLAIN), expected)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8), np.float32),
        np.zeros((0, 8), np.uint8),
        np.zeros(8, np.uint8),
        np.zeros((1, 8, 8, 3), np.uint8),
    ],
)
def test_fit_array__other_arrays(pixels: np.ndarray) -> None:
    with pytest.raises(ImageRejected, match="wanted"):
        fit_array(pixels, PLAIN)


def test_prepare__same_for_bytes_path_and_file(tmp_path: Path) -> None:
    content = PHOTO.read_bytes()
    path = tmp_path / "photo.of.anything"
    path.write_bytes(content)
    contract = InputContract(size_px=32)
    expected = prepare(content, contract)
    np.testing.assert_array_equal(prepare(path, contract), expected)
    np.testing.assert_array_equal(prepare(str(path), contract), expected)
    with path.open("rb") as file:
        np.testing.assert_array_equal(prepare(file, contract), expected)
    np.testing.assert_array_equal(prepare(io.BytesIO(content), contract), expected)


@pytest.mark.parametrize("size_px", [16, 48, 96])
def test_jpeg_draft__stays_near_the_full_decode(size_px: int) -> None:
    content = PHOTO.read_bytes()
    draft = prepare(content, InputContract(size_px=size_px)).astype(int)
    full = prepare(content, InputContract(size_px=size_px, jpeg_draft=False)).astype(int)
    difference = np.abs(draft - full)
    assert difference.max() > 0  # the draft was taken
    assert difference.mean() < MEAN_GREY_LEVELS
    assert difference.max() < MAX_GREY_LEVELS


def test_jpeg_draft__never_below_the_side_that_is_needed() -> None:
    content = PHOTO.read_bytes()  # short side 427: half is 214
    assert min(decode(content, least_side_px=213).size) == 214
    assert min(decode(content, least_side_px=54).size) == 107
    assert min(decode(content, least_side_px=215).size) == 427
    assert min(decode(content).size) == 427
    whole = InputContract(size_px=200, crop_fraction=0.875)  # 200 / 0.875 = 229 > 214
    without = InputContract(size_px=200, crop_fraction=0.875, jpeg_draft=False)
    np.testing.assert_array_equal(prepare(content, whole), prepare(content, without))


# -- odd but valid files -------------------------------------------------------------------------

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


# -- refused files -------------------------------------------------------------------------------


def test_refused__empty_file() -> None:
    with pytest.raises(ImageRejected, match="0 bytes"):
        prepare(b"", PLAIN)
    with pytest.raises(ImageRejected):
        prepare(io.BytesIO(b""), PLAIN)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "progressive"])
def test_refused__truncated_anywhere(kind: str) -> None:
    photo = Image.open(PHOTO).crop((0, 0, 96, 96))
    content = (
        encoded(photo, "JPEG", progressive=True) if kind == "progressive" else encoded(photo, kind)
    )
    prepare(content, PLAIN)
    for twentieth in range(1, 20):
        for least in (True, False):
            with pytest.raises(ImageRejected):
                prepare(
                    content[: len(content) * twentieth // 20],
                    InputContract(size_px=8, jpeg_draft=least),
                )


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes of the images that Pillow was asked to decode."""
    seen: list[tuple[int, int]] = []
    load = ImageFile.ImageFile.load

    def recorded(image: ImageFile.ImageFile) -> object:
        seen.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", recorded)
    return seen


@pytest.mark.parametrize("side", [7_072, 12_000, 20_000, 2**31 - 1])
def test_refused__too_many_pixels_before_decoding(side: int, loads: list[object]) -> None:
    content = png(side, side, bits=1, colour=0, data=b"\0" * 10_000, interlaced=False)
    with pytest.raises(ImageRejected, match=r"pixels.*scale it down"):
        prepare(content, PLAIN)
    assert loads == []


def test_refused__one_pixel_past_the_limit() -> None:
    content = encoded(Image.new("1", (10, 11)))
    with pytest.raises(ImageRejected, match=r"10 x 11 = 110 pixels; at most 109"):
        decode(content, max_pixels=109)
    assert decode(content, max_pixels=110).size == (10, 11)
    assert MAX_PIXELS == 50_000_000


def test_loads__sees_a_decode(loads: list[object]) -> None:
    prepare(encoded(picture()), PLAIN)
    assert loads[0] == (24, 24)  # so that an empty list above means what it says


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (0, 0)])
def test_refused__no_width_or_height(width: int, height: int) -> None:
    content = png(width, height, bits=8, colour=2, data=b"", interlaced=False)
    with pytest.raises(ImageRejected):
        prepare(content, PLAIN)


@pytest.mark.parametrize(
    "content",
    [
        b"I am a text file.",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        bytes(1000),
    ],
)
def test_refused__no_image(content: bytes) -> None:
    with pytest.raises(ImageRejected, match=r"JPEG, PNG, WEBP image|damaged"):
        prepare(content, PLAIN)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP"])
def test_refused__format_that_is_not_served(kind: str) -> None:
    content = encoded(picture(), kind)
    with pytest.raises(ImageRejected, match="no readable JPEG, PNG, WEBP image"):
        prepare(content, PLAIN)
    assert prepare(content, PLAIN, formats=(kind,)).shape == (8, 8, 3)


def test_refused__floating_point_pixels() -> None:
    content = encoded(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF")
    with pytest.raises(ImageRejected, match="floating-point"):
        prepare(content, PLAIN, formats=("TIFF",))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_prepare__damaged_bytes_are_decoded_or_refused(kind: str) -> None:
    content = encoded(Image.open(PHOTO).crop((0, 0, 48, 48)), kind)
    rng = np.random.default_rng(11)
    refused = 0
    for _ in range(150):
        mutated = np.frombuffer(content, np.uint8).copy()
        places = rng.integers(0, len(mutated), rng.integers(1, 9))
        mutated[places] = rng.integers(0, 256, len(places))
        try:
            assert prepare(mutated.tobytes(), PLAIN).shape == (8, 8, 3)
        except ImageRejected:  # and nothing else
            refused += 1
    assert refused > 0


def test_prepare__missing_path_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        prepare(tmp_path / "gone.png", PLAIN)


# -- the contract --------------------------------------------------------------------------------


def test_contract__survives_its_dictionary() -> None:
    contract = InputContract(size_px=96, crop_fraction=0.875, resample="bicubic", jpeg_draft=False)
    assert InputContract.from_dict(contract.as_dict()) == contract


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size_px": 7}, r"8\.\.1024, got 7"),
        ({"size_px": 1025}, r"8\.\.1024, got 1025"),
        ({"crop_fraction": 0.0}, r"\(0, 1\], got 0\.0"),
        ({"crop_fraction": 1.01}, r"\(0, 1\], got 1\.01"),
        ({"crop_fraction": float("nan")}, r"\(0, 1\], got nan"),
        ({"resample": "lanczos"}, "got 'lanczos'"),
        ({"mean": 0.5}, "has the fields"),
    ],
)
def test_contract__values_out_of_range(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        InputContract.from_dict({**InputContract(size_px=32).as_dict(), **changes})


def test_contract__missing_field() -> None:
    with pytest.raises(ValueError, match="has the fields"):
        InputContract.from_dict({"size_px": 32})
