import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.images import each, encode, file_name

PIXELS = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_encode__a_path_as_str_and_as_path_is_the_files_content(tmp_path: Path) -> None:
    path = tmp_path / "a b.png"
    path.write_bytes(b"content")
    assert encode(str(path)) == encode(path) == b"content"


@pytest.mark.parametrize("content", [b"abc", bytearray(b"abc"), memoryview(b"abc")])
def test_encode__bytes_are_kept(content: bytes) -> None:
    assert encode(content) == b"abc"


def test_encode__an_open_file_is_read_from_where_it_stands() -> None:
    file = io.BytesIO(b"0123456")
    file.seek(3)
    assert encode(file) == b"3456"


def test_encode__a_file_open_as_text_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("x")
    with (tmp_path / "a.png").open() as file, pytest.raises(TypeError, match="mode 'rb'"):
        encode(file)


@pytest.mark.parametrize("pixels", [PIXELS, PIXELS[:, :, 0], PIXELS[::2, ::-1]])
def test_encode__an_array_becomes_a_png_without_loss(pixels: np.ndarray) -> None:
    content = encode(pixels)
    assert content.startswith(b"\x89PNG")
    np.testing.assert_array_equal(decoded(content), pixels)


@pytest.mark.parametrize(
    "array",
    [
        PIXELS.astype(np.float32),
        PIXELS[:, :, :2],
        np.zeros((0, 4), np.uint8),
        np.zeros(3, np.uint8),
    ],
    ids=["floats", "two channels", "empty", "flat"],
)
def test_encode__an_array_of_another_kind_says_what_is_wanted(array: np.ndarray) -> None:
    with pytest.raises(TypeError, match=r"wanted uint8 \(H, W\) or \(H, W, 3\)"):
        encode(array)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_encode__a_pil_image_keeps_its_pixels(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    back = Image.open(io.BytesIO(encode(image)))
    assert back.mode == mode
    np.testing.assert_array_equal(np.asarray(back), np.asarray(image))


def test_encode__a_pil_image_that_png_cannot_hold_becomes_rgb() -> None:
    image = Image.fromarray(PIXELS).convert("CMYK")
    np.testing.assert_array_equal(decoded(encode(image)), np.asarray(image.convert("RGB")))


def test_encode__a_pil_image_of_floats_is_refused() -> None:
    with pytest.raises(TypeError, match="no fixed range"):
        encode(Image.new("F", (2, 2)))


def test_encode__a_pil_image_from_a_rotated_photo_stays_rotated() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be turned by 90 degrees
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "JPEG", exif=exif)
    content = encode(Image.open(file))
    assert Image.open(io.BytesIO(content)).getexif()[0x0112] == 6


def test_encode__something_else_names_the_known_kinds() -> None:
    with pytest.raises(TypeError, match="got a int as image; wanted a path, bytes"):
        encode(3)  # type: ignore[arg-type]


def test_each__one_of_every_kind_is_one() -> None:
    for image in ["a.png", Path("a.png"), b"x", io.BytesIO(b"x"), PIXELS, Image.fromarray(PIXELS)]:
        assert len(list(each(image))) == 1


def test_each__an_iterable_is_taken_one_by_one_as_it_is_needed() -> None:
    def endless():  # type: ignore[no-untyped-def]
        while True:
            yield b"x"

    images = each(endless())
    assert [next(images), next(images)] == [b"x", b"x"]


def test_each__a_prepared_batch_is_only_for_embed() -> None:
    with pytest.raises(TypeError, match=r"list\(array\)"):
        next(each(PIXELS[None]))


def test_file_name__without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"x")
    with (tmp_path / "a b.png").open("rb") as file:
        assert file_name(file) == "a b.png"
    assert file_name("x/y/z.jpg") == file_name(Path("x/y/z.jpg")) == "z.jpg"
    assert file_name(b"x") is file_name(io.BytesIO(b"x")) is None
