"""preprocess: how an upright picture is fitted, what a JPEG draft may change, the contract."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.trainer.representation.preprocess_inputs import PHOTO, PLAIN, encoded, picture
from trainer.representation.preprocess import (
    ImageRejected,
    InputContract,
    decode,
    fit,
    fit_array,
    prepare,
)

# What decoding a JPEG at a fraction of its size may change on PHOTO, in grey levels of 255. It is
# largest where the fraction leaves just the side that is needed (54 px for 48): the decoder's box
# filter is sharper than the resize it stands in for. Measured: mean 2.2, 5.4, 2.7; most 15, 55, 35.
MEAN_GREY_LEVELS = 6
MAX_GREY_LEVELS = 60


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
