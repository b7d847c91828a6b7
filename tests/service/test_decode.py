"""service.decode: the pool gives the pixels of `prepare`, thumbnails beside them, and a reason for
what it refuses."""

import io
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from service.decode import DecoderPool
from tests.service.decoder_pools import CONTRACT, WAIT_S, make_pool
from trainer.representation.preprocess import ImageRejected, prepare


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    pool = make_pool()
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("RGB", "JPEG"),
        ("RGB", "PNG"),
        ("RGB", "WEBP"),
        ("L", "JPEG"),
        ("L", "PNG"),
        ("1", "PNG"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("CMYK", "JPEG"),
        ("I;16", "PNG"),
    ],
)
def test_pool__gives_the_pixels_of_prepare(
    pool: DecoderPool, picture: Callable[..., bytes], mode: str, format: str
) -> None:
    if mode == "I;16":
        grey = np.linspace(0, 65535, 300).astype(np.uint16).reshape(15, 20)
        buffer = io.BytesIO()
        Image.fromarray(grey).save(buffer, "PNG")
        image = buffer.getvalue()
    else:
        image = picture(3, mode=mode, size=(61, 40), format=format)
    np.testing.assert_array_equal(
        pool.submit(image).result(WAIT_S), prepare(image, CONTRACT), strict=True
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pool__turns_as_exif_says(
    pool: DecoderPool, picture: Callable[..., bytes], orientation: int
) -> None:
    source = Image.open(io.BytesIO(picture(4, size=(30, 21))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    source.save(buffer, "PNG", exif=exif)
    pixels = pool.submit(buffer.getvalue()).result(WAIT_S)
    np.testing.assert_array_equal(pixels, prepare(buffer.getvalue(), CONTRACT))
    if orientation == 3:  # half a turn, by hand
        turned = io.BytesIO()
        source.rotate(180).save(turned, "PNG")
        np.testing.assert_array_equal(pixels, prepare(turned.getvalue(), CONTRACT))


@pytest.mark.parametrize(
    ("image", "reason"),
    [(b"", "empty"), (b"GIF89a" + b"\0" * 40, "no readable"), (b"no picture", "no readable")],
)
def test_pool__refuses_what_is_no_picture(pool: DecoderPool, image: bytes, reason: str) -> None:
    with pytest.raises(ImageRejected, match=reason):
        pool.submit(image).result(WAIT_S)


def test_pool__refuses_a_truncated_picture(
    pool: DecoderPool, picture: Callable[..., bytes]
) -> None:
    with pytest.raises(ImageRejected, match="damaged or cut short"):
        pool.submit(picture(5, format="JPEG")[:-60]).result(WAIT_S)


def test_pool__believes_the_header_before_decoding(pool: DecoderPool) -> None:
    buffer = io.BytesIO()
    Image.new("1", (1001, 1000)).save(buffer, "PNG")
    with pytest.raises(ImageRejected, match=r"1001 x 1000 = 1,001,000 pixels; at most 1,000,000"):
        pool.submit(buffer.getvalue()).result(WAIT_S)


def test_pool__says_when_an_image_needs_too_much_memory() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (5000, 5000)).save(buffer, "PNG")  # 100 MB for each of its copies
    pool = make_pool(memory_bytes=2**28, max_pixels=100_000_000)
    try:
        with pytest.raises(ImageRejected, match="needs more memory"):
            pool.submit(buffer.getvalue()).result(WAIT_S)
    finally:
        pool.close()


def test_pool__drops_what_passed_its_deadline_before_a_decoder_sees_it(
    pool: DecoderPool, picture: Callable[..., bytes]
) -> None:
    late = pool.submit(picture(3), deadline=time.monotonic())
    with pytest.raises(TimeoutError, match="waited too long"):
        late.result(WAIT_S)
    assert pool.submit(picture(3), deadline=time.monotonic() + WAIT_S).result(WAIT_S) is not None


def test_pool__tells_how_long_images_waited_and_took(picture: Callable[..., bytes]) -> None:
    told: list[tuple[float, float]] = []
    pool = make_pool(on_decoded=lambda waited, took: told.append((waited, took)))
    try:
        pool.submit(picture(1)).result(WAIT_S)
        with pytest.raises(ImageRejected):
            pool.submit(b"no picture").result(WAIT_S)
    finally:
        pool.close()
    assert len(told) == 2
    assert all(waited >= 0 and took > 0 for waited, took in told)


@pytest.mark.parametrize(
    ("format", "size", "expected"),
    [
        ("PNG", (600, 300), (256, 128)),
        ("JPEG", (1200, 600), (256, 128)),
        ("WEBP", (300, 600), (128, 256)),
        ("PNG", (20, 14), (20, 14)),  # never enlarged
        ("PNG", (5000, 3), (256, 1)),
    ],
)
def test_thumbnail__shows_the_whole_picture_beside_the_same_pixels(
    format: str, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    ramp = np.linspace(0, 255, size[0], dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp, (size[1], size[0])).copy()).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format, **({"lossless": True} if format == "WEBP" else {}))
    pool = make_pool()
    plain = pool.submit(buffer.getvalue()).result(WAIT_S)
    pictured = pool.submit_pictured(buffer.getvalue()).result(WAIT_S)
    pool.close()
    np.testing.assert_array_equal(pictured.pixels, plain)
    thumbnail = Image.open(io.BytesIO(pictured.thumbnail))
    assert (thumbnail.format, thumbnail.size) == ("WEBP", expected)
    row = np.asarray(thumbnail.convert("L"), np.float64)[0]
    wanted = np.linspace(0, 255, expected[0])
    assert np.abs(row - wanted).max() < 12


def test_thumbnail__is_upright() -> None:
    image = Image.fromarray(np.zeros((40, 80, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    pool = make_pool()
    thumbnail = pool.submit_pictured(buffer.getvalue()).result(WAIT_S).thumbnail
    with pytest.raises(ImageRejected):
        pool.submit_pictured(b"no picture").result(WAIT_S)
    pool.close()
    assert Image.open(io.BytesIO(thumbnail)).size == (40, 80)
