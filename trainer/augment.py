"""The training view of each image: batched, on the device of the images, one draw per image.

In: pixels of B images of any sizes. Out: (B, 3, S, S) floats in 0..1. What happens to an image is
drawn first, on the CPU from a generator (`draw_views`), then applied (`apply_views`): the same draw
gives the same view on every device and in a resumed run.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import AugmentConfig
from trainer.pixels import (
    NO_BLUR_SIGMA_PX,
    Taps,
    blur,
    crop_and_resize,
    find_taps,
    jitter,
    luma,
)

# Attempts at a crop inside the image before the largest central one is taken; torchvision's number.
CROP_ATTEMPTS = 10
# Images are changed in groups of so many bytes as floats: on a CPU a group stays in its cache, on
# an accelerator the group bounds memory (some 5 times this) and hardly any batch needs two.
CPU_GROUP_BYTES = 1 << 20
DEVICE_GROUP_BYTES = 1 << 28


class Collated(NamedTuple):
    """B images of any sizes in one block."""

    pixels: Tensor  # (B, H, W, 3) uint8, each image in the upper left corner, the rest zeros
    sizes: Tensor  # (B, 2) int64, height and width of each


class Plan(NamedTuple):
    """What may happen to images of a batch; the same operations run for all batches of one plan."""

    order: tuple[int, ...]  # of brightness, contrast, saturation, hue; drawn for the batch
    turns: bool
    grays: bool
    blurs: bool


class Views(NamedTuple):
    """What happens to each of B images; the colour changes of an image left alone are neutral."""

    sizes: Tensor  # (B, 2) int64: height and width of the image
    boxes: Tensor  # (B, 4) float64: left, top, width, height of the crop in pixels
    flipped: Tensor  # (B,) bool, left and right
    upended: Tensor  # (B,) bool, mirrored top and bottom
    transposed: Tensor  # (B,) bool, rows and columns exchanged after that: makes quarter turns
    jittered: Tensor  # (B,) bool
    factors: Tensor  # (B, 4): brightness, contrast, saturation factors and turn of the hue
    grayed: Tensor  # (B,) bool
    blurred: Tensor  # (B,) bool
    sigmas_px: Tensor  # (B,)
    plan: Plan

    def share(self, rows: slice) -> Self:
        """The views of some of the images."""
        drawn = {name: each[rows] for name, each in self._tensors().items()}
        return type(self)(**drawn, plan=self.plan)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """The views on `device`, by one copy; themselves where they are there."""
        if self.boxes.device == device:
            return self
        return self.unpack(self.pack().to(device, non_blocking=non_blocking))

    def pack(self) -> Tensor:
        """(B, 17) float64 that holds everything but the plan."""
        columns = [drawn.double().view(len(drawn), -1) for drawn in self._tensors().values()]
        return torch.cat(columns, dim=1)

    def unpack(self, packed: Tensor) -> Self:
        """The views that `packed`, (B, 17) on any device, holds, of this one's plan.

        Of this one's shapes, kinds and plan only, so that it may run inside a captured graph.
        """
        drawn, first = {}, 0
        for name, like in self._tensors().items():
            width = like[0].numel()
            part = packed[:, first : first + width]
            drawn[name] = part.reshape(len(packed), *like.shape[1:]).to(like.dtype)
            first += width
        return type(self)(**drawn, plan=self.plan)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: drawn for name, drawn in self._asdict().items() if name != "plan"}


def collate(images: Sequence[NDArray[np.uint8]]) -> Collated:
    """Put images (h, w, 3) into one block."""
    sizes = np.array([image.shape[:2] for image in images], np.int64)  # (B, 2)
    height, width = sizes.max(axis=0)
    if (sizes == (height, width)).all():
        return Collated(torch.from_numpy(np.stack(images)), torch.from_numpy(sizes))
    block = np.zeros((len(images), height, width, 3), np.uint8)
    for row, image in enumerate(images):
        block[row, : image.shape[0], : image.shape[1]] = image
    return Collated(torch.from_numpy(block), torch.from_numpy(sizes))


def draw_views(config: AugmentConfig, sizes: Tensor, generator: torch.Generator) -> Views:
    """Draw what happens to each image.

    The order of the four colour changes is drawn once for the batch, everything else for each
    image. The number of draws never depends on earlier ones.

    Args:
        sizes: (B, 2) heights and widths.
        generator: on the CPU.
    """
    count = len(sizes)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    def chance(probability: float) -> Tensor:
        return torch.rand(count, generator=generator) < probability

    limit = math.log(config.crop_ratio_max)
    boxes = place_crops(
        sizes,
        areas=uniform(config.crop_scale_min, config.crop_scale_max, count, CROP_ATTEMPTS),
        ratios=uniform(-limit, limit, count, CROP_ATTEMPTS).exp(),
        places=uniform(0, 1, count, 2),
        ratio_max=config.crop_ratio_max,
    )
    spread = torch.tensor([config.brightness, config.contrast, config.saturation, config.hue])
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
    views = Views(
        sizes=sizes,
        boxes=boxes,
        flipped=chance(config.flip),
        upended=torch.zeros(count, dtype=torch.bool),
        transposed=torch.zeros(count, dtype=torch.bool),
        plan=_plan(config, torch.randperm(4, generator=generator).tolist()),
        jittered=chance(config.jitter),
        factors=neutral + spread * uniform(-1, 1, count, 4).float(),
        grayed=chance(config.gray),
        blurred=chance(config.blur),
        sigmas_px=uniform(config.blur_sigma_min_px, config.blur_sigma_max_px, count).float(),
    )
    # Drawn last: what was drawn before these came to be is drawn as ever.
    upended = chance(config.vertical_flip)
    turned = chance(config.quarter_turns)
    quarters = torch.randint(4, (count,), generator=generator) * turned
    # A turn to the left by one quarter mirrors left and right, then exchanges rows and columns.
    return views._replace(
        flipped=views.flipped ^ (quarters == 1) ^ (quarters == 2),
        upended=upended ^ (quarters >= 2),
        transposed=quarters % 2 == 1,
        factors=torch.where(views.jittered[:, None], views.factors, neutral),
    )


def _plan(config: AugmentConfig, order: Sequence[int]) -> Plan:
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    return Plan(
        order=tuple(step for step in order if config.jitter and strengths[step]),
        turns=config.quarter_turns > 0,
        grays=config.gray > 0,
        blurs=config.blur > 0,
    )


def place_crops(
    sizes: Tensor, *, areas: Tensor, ratios: Tensor, places: Tensor, ratio_max: float
) -> Tensor:
    """Choose a crop for each image: the first attempt that fits, else the largest central one.

    Boxes are not rounded to whole pixels: on an image of 8 x 8 that would leave few of them.

    Args:
        sizes: (B, 2) heights and widths.
        areas, ratios: (B, attempts): share of the image's area, width / height.
        places: (B, 2) in 0..1: where in the free space to the right and below the crop begins.

    Returns:
        (B, 4) float64: left, top, width, height.
    """
    height, width = sizes.double().unbind(1)  # (B,) each
    area = areas * (height * width)[:, None]
    widths, heights = (area * ratios).sqrt(), (area / ratios).sqrt()  # (B, attempts)
    fits = (widths <= width[:, None]) & (heights <= height[:, None])
    first = fits.int().argmax(dim=1, keepdim=True)
    some = fits.any(dim=1)
    crop_width = torch.where(some, widths.gather(1, first)[:, 0], width.minimum(height * ratio_max))
    crop_height = torch.where(
        some, heights.gather(1, first)[:, 0], height.minimum(width * ratio_max)
    )
    places = torch.where(some[:, None], places, 0.5)
    left, top = places[:, 0] * (width - crop_width), places[:, 1] * (height - crop_height)
    return torch.stack([left, top, crop_width, crop_height], dim=1)


def apply_views(
    pixels: Tensor, views: Views, *, size_px: int, fixed_shapes: bool | None = None
) -> Tensor:
    """Make the views: (B, 3, S, S) float32 in 0..1, channels last, on the device of the pixels.

    Args:
        pixels: (B, H, W, 3) uint8, each image in the upper left corner.
        views: on any device; where they already lie on that of the pixels, nothing is copied.
        fixed_shapes: compute every change for every image and keep it where it was drawn, so that
            no shape and no branch depends on a draw but for the plan: needed for a CUDA graph and
            to never wait for a device. False: compute changes for the images that get them, which
            is cheaper on a CPU. None: True on an accelerator. The results agree to rounding.
    """
    device = pixels.device
    views = views.to(device)
    fixed = device.type != "cpu" if fixed_shapes is None else fixed_shapes
    change = _change_all if fixed else _change_drawn
    count, height, width, _ = pixels.shape
    rows, columns = find_taps(
        views.boxes,
        views.sizes,
        torch.stack([views.upended, views.flipped], dim=1),
        block=(height, width),
        size_px=size_px,
    )
    made = torch.empty(
        (count, 3, size_px, size_px), device=device, memory_format=torch.channels_last
    )
    limit = CPU_GROUP_BYTES if device.type == "cpu" else DEVICE_GROUP_BYTES
    together = max(1, limit // (4 * 3 * max(height * width, size_px * size_px)))
    together = math.ceil(count / math.ceil(count / together))  # groups of like size
    for first in range(0, count, together):
        group = slice(first, first + together)
        own = [Taps(*(each[group] for each in taps)) for taps in (rows, columns)]
        made[group] = change(crop_and_resize(pixels[group], *own), views.share(group))
    return made


def _change_all(crops: Tensor, views: Views) -> Tensor:
    """Every change of the plan for all of (B, 3, S, S), neutral where it was not drawn."""
    if views.plan.turns:
        turned = views.transposed[:, None, None, None]
        crops = torch.where(turned, crops.transpose(2, 3), crops)
    crops = jitter(crops, views.factors, views.plan.order)
    if views.plan.grays:
        crops = _grayed(crops, views.grayed)
    if views.plan.blurs:
        crops = blur(crops, torch.where(views.blurred, views.sigmas_px, NO_BLUR_SIGMA_PX))
    return crops


def _change_drawn(crops: Tensor, views: Views) -> Tensor:
    """The changes, each of the images for which it was drawn; of all, where that is cheaper."""
    rows = views.transposed.nonzero()[:, 0]
    if len(rows):
        crops = crops.index_copy(0, rows, crops.index_select(0, rows).transpose(2, 3))
    rows = views.jittered.nonzero()[:, 0]
    if 2 * len(rows) > len(crops):
        crops = jitter(crops, views.factors, views.plan.order)
    elif len(rows):
        chosen = crops.index_select(0, rows)
        crops = crops.index_copy(0, rows, jitter(chosen, views.factors[rows], views.plan.order))
    if views.grayed.any():
        crops = _grayed(crops, views.grayed)
    rows = views.blurred.nonzero()[:, 0]
    if len(rows):
        chosen = crops.index_select(0, rows)
        crops = crops.index_copy(0, rows, blur(chosen, views.sigmas_px[rows]))
    return crops


def _grayed(crops: Tensor, drawn: Tensor) -> Tensor:
    # Products with 0 and 1 are exact, and on a CPU many times faster than a choice.
    gray = drawn[:, None, None, None].to(crops.dtype)
    return (crops * (1 - gray)).add_(luma(crops) * gray)
