"""Each batched change against Pillow or torchvision on single images.

Run: pytest tests/trainer/test_augment.py
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from trainer.augment import (
    CROP_ATTEMPTS,
    Collated,
    apply_views,
    blur,
    collate,
    crop_and_resize,
    draw_views,
    jitter,
    luma,
    place_crops,
    turn_hue,
)
from trainer.config import AugmentConfig, load_recipe

ROUNDING = 2e-5  # float32 against Pillow's own sums
# torchvision's grey weights are rounded to 0.9999 in all.
GREY_ROUNDING = 1.5e-4


NOTHING = dict.fromkeys(("flip", "vertical_flip", "quarter_turns", "jitter", "gray", "blur"), 0.0)


def _images(count: int = 4) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (20 + i, 30 - 3 * i, 3), dtype=np.uint8) for i in range(count)]


def _square(count: int = 4, side: int = 16) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def _config(**changes: float) -> AugmentConfig:
    return load_recipe("folder").augment.model_copy(update=changes)


def test_collate__puts_images_of_any_size_in_the_upper_left_corner() -> None:
    images = _images()
    block = collate(images)
    assert block.pixels.shape == (4, 23, 30, 3)
    assert block.sizes.tolist() == [[20, 30], [21, 27], [22, 24], [23, 21]]
    for image, row in zip(images, block.pixels, strict=True):
        height, width = image.shape[:2]
        assert (row[:height, :width].numpy() == image).all()
        assert row[height:].sum() == row[:, width:].sum() == 0


@pytest.mark.parametrize("size_px", [8, 13, 40])  # shrinking, between, enlarging
def test_crop__is_pillows_resize_of_a_box(size_px: int) -> None:
    images = _images()
    block = collate(images)
    boxes = torch.tensor(
        [[0, 0, 30, 20], [3.3, 2.7, 10.5, 14.1], [0, 5.25, 24, 9.5], [1, 1, 4, 4]],
        dtype=torch.float64,
    )
    flipped = torch.tensor([False, True, False, True])
    pixels = block.pixels.permute(0, 3, 1, 2).float()
    upended = torch.tensor([False, False, True, True])
    made = crop_and_resize(pixels, block.sizes, boxes, flipped, upended, size_px).numpy()
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


def test_crops__lie_inside_and_have_the_area_and_shape_asked_for() -> None:
    sizes = torch.tensor([[20, 30], [100, 10], [8, 8]]).repeat(200, 1)
    boxes = draw_views(_config(), sizes, torch.Generator().manual_seed(0)).boxes
    left, top, width, height = boxes.unbind(1)
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= sizes[:, 1] + 1e-9).all()
    assert (top + height <= sizes[:, 0] + 1e-9).all()
    share = width * height / (sizes[:, 0] * sizes[:, 1])
    ordinary = sizes[:, 0] != 100  # on a 10:1 image the central crop of the last resort is smaller
    assert share[ordinary].min() >= 0.2
    assert share[ordinary].min() < 0.25
    assert share[ordinary].max() > 0.9
    ratio = width / height
    assert ratio.min() >= 3 / 4 - 1e-9
    assert ratio.max() <= 4 / 3 + 1e-9


def test_crop__that_never_fits_becomes_the_largest_central_one() -> None:
    boxes = place_crops(
        torch.tensor([[100, 12]]),
        areas=torch.ones(1, CROP_ATTEMPTS, dtype=torch.float64),
        ratios=torch.ones(1, CROP_ATTEMPTS, dtype=torch.float64),
        places=torch.zeros(1, 2, dtype=torch.float64),
        ratio_max=4 / 3,
    )
    assert boxes[0].tolist() == pytest.approx([0, 42, 12, 16])


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


def test_blur__wider_than_the_image() -> None:
    made = blur(_square(1, 4), torch.tensor([9.0]))
    assert made.isfinite().all()
    assert made.std() < 0.3 * _square(1, 4).std()


def test_views__leave_alone_what_has_probability_zero() -> None:
    config = _config(**NOTHING, crop_scale_min=1.0, crop_ratio_max=1.0)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    block = collate([image, image])
    views = draw_views(config, block.sizes, torch.Generator().manual_seed(0))
    made = apply_views(block, views, size_px=8)
    wanted = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    assert (made - wanted).abs().max() < 1e-6


def test_views__do_everything_that_is_drawn() -> None:
    block = collate(_images())
    for name in NOTHING:
        kept = _views(block, _config(**NOTHING))
        done = _views(block, _config(**(NOTHING | {name: 1.0})))
        changed = (kept - done).abs().amax(dim=(1, 2, 3)) > 0.01
        # One turn in four is by no quarter.
        assert changed.any() if name == "quarter_turns" else changed.all(), name
    grey = _views(block, _config(**(NOTHING | {"gray": 1.0})))
    assert (grey[:, 0] == grey[:, 1]).all()


def test_views__happen_to_their_share_of_images() -> None:
    sizes = torch.full((4000, 2), 20)
    views = draw_views(_config(), sizes, torch.Generator().manual_seed(0))
    shares = [views.flipped, views.jittered, views.grayed, views.blurred]
    assert [float(each.float().mean()) for each in shares] == pytest.approx(
        [0.5, 0.8, 0.2, 0.5], abs=0.03
    )
    assert views.sigmas_px.min() >= 0.1
    assert views.sigmas_px.max() <= 2
    lows, highs = views.factors.amin(dim=0), views.factors.amax(dim=0)
    assert lows.tolist() == pytest.approx([0.6, 0.6, 0.6, -0.1], abs=0.01)
    assert highs.tolist() == pytest.approx([1.4, 1.4, 1.4, 0.1], abs=0.01)


def test_views__same_generator_same_views_and_independent_images() -> None:
    image = _images(1)[0]
    block = collate([image] * 8)
    first, again = (_views(block, _config()) for _ in range(2))
    assert (first == again).all()
    assert (first - _views(block, _config(), seed=1)).abs().max() > 0.1
    distances = (first[:, None] - first[None]).abs().amax(dim=(2, 3, 4))
    assert (distances + torch.eye(8) > 0.01).all()


def test_views__turn_and_mirror_a_square_in_all_eight_ways_alike_often() -> None:
    config = _config(**(NOTHING | {"flip": 0.5, "quarter_turns": 1.0}), crop_scale_min=1.0)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    block = collate([image] * 800)
    views = draw_views(config, block.sizes, torch.Generator().manual_seed(0))
    whole = torch.tensor([[0.0, 0.0, 8.0, 8.0]]).double().repeat(800, 1)
    made = apply_views(views=views._replace(boxes=whole), images=block, size_px=8)
    upright = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    turned = [torch.rot90(upright, k, (1, 2)) for k in range(4)]
    eight = torch.stack([*turned, *(each.transpose(1, 2) for each in turned)])
    found = ((made[:, None] - eight).abs().amax(dim=(2, 3, 4)) < 1e-6).long()  # (800, 8)
    assert (found.sum(dim=1) == 1).all()
    assert found.sum(dim=0).tolist() == pytest.approx([100] * 8, abs=30)


@pytest.mark.parametrize(("quarters", "flags"), [(1, "yny"), (2, "yyn"), (3, "nyy")])
def test_views__of_a_quarter_turn_are_a_mirror_and_a_transposition(
    quarters: int, flags: str
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    block = collate([image])
    views = draw_views(_config(**NOTHING), block.sizes, torch.Generator().manual_seed(0))
    flipped, upended, transposed = (torch.tensor([flag == "y"]) for flag in flags)
    views = views._replace(flipped=flipped, upended=upended, transposed=transposed)
    views = views._replace(boxes=torch.tensor([[0.0, 0.0, 8.0, 8.0]]).double())
    made = apply_views(block, views, size_px=8)[0].permute(1, 2, 0).numpy()
    assert np.abs(made - np.rot90(image, quarters) / 255).max() < 1e-6


def test_views__of_a_seed_are_those_of_earlier_versions() -> None:
    views = draw_views(_config(), torch.full((2, 2), 20), torch.Generator().manual_seed(0))
    assert views.order == (3, 2, 1, 0)
    assert views.boxes[0].tolist() == pytest.approx([0.4299, 0.1393, 18.4204, 16.6393], abs=1e-4)
    assert views.factors[1].tolist() == pytest.approx([1.3946, 1.3425, 1.3317, 0.0201], abs=1e-4)
    assert views.sigmas_px.tolist() == pytest.approx([1.2911, 0.4429], abs=1e-4)
    assert views.flipped.tolist() == views.grayed.tolist() == [False, True]


def _views(block: Collated, config: AugmentConfig, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return apply_views(block, draw_views(config, block.sizes, generator), size_px=16)


def test_blur__does_not_depend_on_the_others_in_the_batch() -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    alone = blur(pixels[:1], torch.tensor([0.5]))
    beside = blur(pixels, torch.tensor([0.5, 2.0]))[:1]
    assert torch.equal(beside, alone)
