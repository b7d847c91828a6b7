"""JPEGs decoded on a device; torchvision's decoding on the CPU stands in for nvJPEG.

Run: pytest tests/trainer/test_nvjpeg.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from trainer import nvjpeg as module
from trainer.config import load_recipe
from trainer.datasets import DataError, open_source
from trainer.decode_pool import DecodePool
from trainer.decoding import Survey, survey
from trainer.representation.quiet import without_warnings
from trainer.request import UnavailableError, resolve_decoder
from trainer.stock import CropStock

# Pillow decodes at half the size and resizes in whole levels; another image is 100 levels apart.
GREY_LEVELS = 10


def _decode(encoded: list[Tensor]) -> list[Tensor]:
    with without_warnings():
        return [decode_jpeg(each, mode=ImageReadMode.RGB) for each in encoded]


def _smooth(height: int, width: int, channels: int = 3) -> np.ndarray:
    draw = np.random.default_rng(height + width)
    coarse = draw.integers(0, 256, (3, 3, channels), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def found(tmp_path: Path) -> Survey:
    """JPEGs of all orientations, long, small, grey, CMYK, and a PNG."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        Image.fromarray(_smooth(30, 40)).save(
            tmp_path / f"{orientation}.jpg", exif=exif, quality=95, subsampling=0
        )
    options = {"quality": 95, "subsampling": 0}
    Image.fromarray(_smooth(14, 60)).save(tmp_path / "long.jpg", **options)
    Image.fromarray(_smooth(7, 8)).save(tmp_path / "small.jpg", **options)
    Image.fromarray(_smooth(20, 20)[:, :, 0]).save(tmp_path / "grey.jpg", **options)
    Image.fromarray(_smooth(20, 20, 4), "CMYK").save(tmp_path / "cmyk.jpg", **options)
    Image.fromarray(_smooth(20, 25)).save(tmp_path / "other.png")
    config = load_recipe("folder").data.model_copy(update={"decoder": "nvjpeg"})
    with DecodePool(0) as pool:
        return survey(open_source(str(tmp_path)), pool, config, size_px=8)


def _stock(found: Survey, pool: DecodePool, *, device: bool = True) -> CropStock:
    on_device = _decode if device else None
    return CropStock(found.source, None, pool, size_px=8, sizes=found.sizes, on_device=on_device)


def test_nvjpeg__gives_pillows_pixels_in_order_and_counts(
    found: Survey, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIXELS_AT_ONCE", 3000)  # two JPEGs at once
    assert found.stored is None  # every batch is decoded by nvJPEG
    batches = [np.array([7, 12, 0, 3]), np.array([8, 9, 10, 11]), np.array([1, 2, 4, 5, 6])]
    with DecodePool(0) as pool:
        wanted = [
            block.pixels.clone() for block in _stock(found, pool, device=False).batches(batches)
        ]
        made = list(_stock(found, pool).batches(batches))
    for indices, block, pixels in zip(batches, made, wanted, strict=True):
        for row, index in enumerate(indices):
            height, width = found.sizes[index]
            assert block.sizes[row].tolist() == [height, width]
            ours = block.pixels[row, :height, :width].int()
            apart = (ours - pixels[row, :height, :width].int()).abs()
            assert apart.max() <= GREY_LEVELS, found.source.ids[index]
    told = capsys.readouterr()
    assert "Pillow (of another kind) 2, nvJPEG 11" in told.out + told.err


def test_nvjpeg__that_refuses_a_picture_leaves_it_to_pillow_and_says_so(
    found: Survey, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def refuses(encoded: list[Tensor]) -> list[Tensor]:
        asked.append(len(encoded))
        if any(len(each) == len(second) for each in encoded):
            raise RuntimeError("nvjpegDecode failed: 3")
        return _decode(encoded)

    names = list(found.source.ids)
    picture = found.source.pictures[names.index("long.jpg")]
    assert isinstance(picture, Path)
    second = picture.read_bytes()
    rows = np.array([names.index(name) for name in ("1.jpg", "long.jpg", "3.jpg")])
    with DecodePool(0) as pool:
        stock = CropStock(found.source, None, pool, size_px=8, sizes=found.sizes, on_device=refuses)
        (block,) = stock.batches([rows])
        (wanted,) = _stock(found, pool, device=False).batches([rows])
        height, width = found.sizes[rows[1]]
        assert torch.equal(block.pixels[1, :height, :width], wanted.pixels[1, :height, :width])
    assert asked == [3, 1, 1, 1]
    told = capsys.readouterr()
    assert "Pillow (refused by nvJPEG) 1, nvJPEG 2" in told.out + told.err


def test_nvjpeg__of_a_file_that_is_damaged_since(found: Survey) -> None:
    picture = found.source.pictures[0]
    assert isinstance(picture, Path)
    content = picture.read_bytes()
    picture.write_bytes(content[:200])
    with DecodePool(0) as pool, pytest.raises(DataError, match=r"1\.jpg could be read when"):
        list(_stock(found, pool).batches([np.array([0])]))
    picture.unlink()
    with DecodePool(0) as pool, pytest.raises(DataError, match=r"1\.jpg could be read when"):
        list(_stock(found, pool).batches([np.array([0])]))


def test_nvjpeg__without_a_gpu_is_refused() -> None:
    cpu = torch.device("cpu")
    assert resolve_decoder("pillow", cpu) is None
    with pytest.raises(UnavailableError, match=r"nvjpeg decodes on a GPU, .* is on cpu"):
        resolve_decoder("nvjpeg", cpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nvjpeg__that_torchvision_cannot_use_is_refused() -> None:
    with pytest.raises(UnavailableError, match=r"cannot decode on cuda.*give data.decoder=pillow"):
        resolve_decoder("nvjpeg", torch.device("cuda"))
