"""Each batched change of pixels against Pillow or torchvision on single images.

Run: pytest tests/trainer/test_pixels.py
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from trainer.augment import collate
from trainer.pixels import (
    NO_BLUR_SIGMA_PX,
    blur,
    crop_and_resize,
    find_taps,
    jitter,
    luma,
    turn_hue,
)

ROUNDING = 2e-5  # float32 against Pillow's own sums
# torchvision's grey weights are rounded to 0.9999 in all.
GREY_ROUNDING = 1.5e-4


def _images(count: int = 4) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (20 + i, 30 - 3 * i, 3), dtype=np.uint8) for i in range(count)]


def _square(count: int = 4, side: int = 16) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size_px", [8, 13, 40])  # shrinking, between, enlarging
def test_crop__is_pillows_resize_of_a_box(size_px: int) -> None:
    images = _images()
    block = collate(images)
    boxes = torch.tensor(
        [[0, 0, 30, 20], [3.3, 2.7, 10.5, 14.1], [0, 5.25, 24, 9.5], [1, 1, 4, 4]],
        dtype=torch.float64,
    )
    flipped = torch.tensor([False, True, False, True])
    upended = torch.tensor([False, False, True, True])
    mirrored = torch.stack([upended, flipped], dim=1)
    rows, columns = find_taps(boxes, block.sizes, mirrored, block=(23, 30), size_px=size_px)
    made = 255 * crop_and_resize(block.pixels, rows, columns).numpy()
    for i, image in enumerate(images):
        left, top, width, height = boxes[i].tolist()
        for channel in range(3):
            plane = Image.fromarray(image[:, :, channel].astype(np.float32))
            box = (left, top, left + width, top + height)
            wanted = np.asarray(
                plane.resize((size_px, size_px), Image.Resampling.BILINEAR, box=box)
            )
            if flipped[i]:
                wanted = wanted[:, ::-1]
            if upended[i]:
                wanted = wanted[::-1]
            assert np.abs(made[i, channel] - wanted).max() < 255 * ROUNDING


@pytest.mark.parametrize(
    ("step", "factor", "function"),
    [
        (0, 0.6, reference.adjust_brightness),
        (0, 1.4, reference.adjust_brightness),
        (1, 0.6, reference.adjust_contrast),
        (1, 1.4, reference.adjust_contrast),
        (2, 0.6, reference.adjust_saturation),
        (2, 1.4, reference.adjust_saturation),
        (3, -0.4, reference.adjust_hue),
        (3, 0.1, reference.adjust_hue),
    ],
)
def test_jitter__is_torchvisions(step: int, factor: float, function: object) -> None:
    images = _square()
    factors = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(4, 1)
    factors[:, step] = factor
    wanted = torch.stack([function(image, factor) for image in images])  # type: ignore[operator]
    assert (jitter(images, factors, [step]) - wanted).abs().max() < GREY_ROUNDING
    assert (images - wanted).abs().max() > 0.05  # there was something to do


def test_jitter__goes_in_the_order_given_with_one_factor_for_each_image() -> None:
    images = _square(2)
    factors = torch.tensor([[1.4, 0.6, 1.0, 0.0], [0.7, 1.3, 1.0, 0.0]])
    wanted = [
        reference.adjust_brightness(reference.adjust_contrast(images[0], 0.6), 1.4),
        reference.adjust_brightness(reference.adjust_contrast(images[1], 1.3), 0.7),
    ]
    assert (jitter(images, factors, [1, 0]) - torch.stack(wanted)).abs().max() < GREY_ROUNDING


def test_hue__of_grey_stays_and_of_red_turns_to_green_and_blue() -> None:
    colours = torch.tensor([[0.4, 0.4, 0.4], [1, 0, 0], [1, 0, 0]]).view(3, 3, 1, 1)
    turns = torch.tensor([0.3, 1 / 3, -1 / 3]).view(3, 1, 1)
    wanted = torch.tensor([[0.4, 0.4, 0.4], [0, 1, 0], [0, 0, 1]]).view(3, 3, 1, 1)
    assert (turn_hue(colours, turns) - wanted).abs().max() < 1e-6


def test_luma__is_pillows_grey() -> None:
    image = _images(1)[0]
    grey = np.asarray(Image.fromarray(image).convert("L")).astype(float)
    made = luma(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float())[0, 0].numpy()
    assert np.abs(made - grey).max() <= 1  # Pillow rounds to whole levels


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur__is_torchvisions(sigma: float) -> None:
    images = _square()
    taps = 2 * math.ceil(3 * sigma) + 1
    wanted = reference.gaussian_blur(images, [taps, taps], [sigma, sigma])
    assert (blur(images, torch.full((4,), sigma)) - wanted).abs().max() < ROUNDING


def test_blur__has_one_sigma_for_each_image() -> None:
    images = _square(2)
    made = blur(images, torch.tensor([0.5, 2.0]))
    # The taps reach as far as the widest needs; what lies beyond 3 sigma of 0.5 px weighs nothing.
    assert (made[0] - blur(images[:1], torch.tensor([0.5]))[0]).abs().max() < 0.01
    assert (made[1] - blur(images[1:], torch.tensor([2.0]))[0]).abs().max() < ROUNDING


def test_blur__narrower_than_a_pixel_changes_no_bit() -> None:
    images = _square()
    assert torch.equal(blur(images, torch.full((4,), NO_BLUR_SIGMA_PX)), images)


def test_blur__under_autocast_keeps_full_precision() -> None:
    images = _square()
    with torch.autocast("cpu", torch.bfloat16):
        made = blur(images, torch.full((4,), 0.7))
    assert torch.equal(made, blur(images, torch.full((4,), 0.7)))


@pytest.mark.parametrize(("side", "size_px", "count"), [(8, 48, 2), (32, 32, 2), (256, 224, 3)])
def test_taps__are_as_many_as_shrinking_needs(side: int, size_px: int, count: int) -> None:
    boxes = torch.tensor([[0.0, 0.0, side, side], [1.3, 2.6, 4.0, 5.0]]).double()
    sizes, mirrored = torch.full((2, 2), side), torch.zeros(2, 2, dtype=torch.bool)
    taps = find_taps(boxes, sizes, mirrored, block=(side, 3 * side), size_px=size_px)
    assert taps[0].lines.shape == (2, size_px, count)
    for lines, weights in taps:
        assert lines.min() >= 0
        assert lines.max() < side  # not among the zeros beside the image
        assert (weights.sum(dim=2) - 1).abs().max() < 1e-6


def test_blur__wider_than_the_image() -> None:
    made = blur(_square(1, 4), torch.tensor([9.0]))
    assert made.isfinite().all()
    assert made.std() < 0.3 * _square(1, 4).std()


def test_blur__does_not_depend_on_the_others_in_the_batch() -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    alone = blur(pixels[:1], torch.tensor([0.5]))
    beside = blur(pixels, torch.tensor([0.5, 2.0]))[:1]
    assert torch.equal(beside, alone)
