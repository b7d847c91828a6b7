"""trainer.representation.preprocess: what is damaged, too large or no picture is refused with the
reason, and what is too large before it is decoded."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.trainer.representation.preprocess_inputs import PHOTO, PLAIN, encoded, picture, png
from trainer.representation.preprocess import (
    MAX_PIXELS,
    ImageRejected,
    InputContract,
    decode,
    prepare,
)


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
