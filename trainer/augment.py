"""The training view of each image: batched, on the device of the images, one draw per image.

In: pixels of B images of any sizes. Out: (B, 3, S, S) floats in 0..1. What happens to an image is
drawn first, on the CPU from a generator (`draw_views`), then applied (`apply_views`): the same draw
gives the same view on every device and in a resumed run.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import AugmentConfig

# Attempts at a crop inside the image before the largest central one is taken; torchvision's number.
CROP_ATTEMPTS = 10
# Taps on each side of a Gaussian, in sigmas: beyond, 0.3 % of the weight is left.
BLUR_REACH_SIGMAS = 3.0
# ITU-R 601 luma, the weights of Pillow's and torchvision's grey.
LUMA = (0.299, 0.587, 0.114)


class Collated(NamedTuple):
    """B images of any sizes in one block."""

    pixels: Tensor  # (B, H, W, 3) uint8, each image in the upper left corner, the rest zeros
    sizes: Tensor  # (B, 2) int64, height and width of each


class Views(NamedTuple):
    """What happens to each of B images; the colour changes of an image left alone are neutral."""

    boxes: Tensor  # (B, 4) float64: left, top, width, height of the crop in pixels
    flipped: Tensor  # (B,) bool, left and right
    upended: Tensor  # (B,) bool, mirrored top and bottom
    transposed: Tensor  # (B,) bool, rows and columns exchanged after that: makes quarter turns
    order: tuple[int, ...]  # order of brightness, contrast, saturation, hue in this batch
    jittered: Tensor  # (B,) bool
    factors: Tensor  # (B, 4): brightness, contrast, saturation factors and turn of the hue
    grayed: Tensor  # (B,) bool
    blurred: Tensor  # (B,) bool
    sigmas_px: Tensor  # (B,)


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
        boxes=boxes,
        flipped=chance(config.flip),
        upended=torch.zeros(count, dtype=torch.bool),
        transposed=torch.zeros(count, dtype=torch.bool),
        order=tuple(torch.randperm(4, generator=generator).tolist()),
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


def apply_views(images: Collated, views: Views, *, size_px: int) -> Tensor:
    """Make the views: (B, 3, S, S) float32 in 0..1, on the device of the pixels."""
    device = images.pixels.device
    pixels = images.pixels.permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
    crops = crop_and_resize(
        pixels,
        images.sizes.to(device),
        views.boxes.to(device),
        views.flipped.to(device),
        views.upended.to(device),
        size_px,
    )
    # The draws lie on the CPU, so choosing images by them does not wait for the device.
    rows = views.transposed.nonzero()[:, 0].to(device)
    if len(rows):
        crops[rows] = crops[rows].transpose(2, 3)
    rows = views.jittered.nonzero()[:, 0].to(device)
    if len(rows):
        crops[rows] = jitter(crops[rows], views.factors[views.jittered].to(device), views.order)
    rows = views.grayed.nonzero()[:, 0].to(device)
    if len(rows):
        crops[rows] = luma(crops[rows]).expand(-1, 3, -1, -1)
    rows = views.blurred.nonzero()[:, 0].to(device)
    if len(rows):
        crops[rows] = blur(crops[rows], views.sigmas_px[views.blurred])
    return crops


def crop_and_resize(
    pixels: Tensor, sizes: Tensor, boxes: Tensor, flipped: Tensor, upended: Tensor, size_px: int
) -> Tensor:
    """Cut a box from each image and resize it, bilinear, area-averaging when shrinking.

    As Pillow's `resize(box=...)`, which also makes the evaluation image, but in floats.

    Args:
        pixels: (B, C, H, W); sizes: (B, 2) how much of it is image; boxes: (B, 4).
        flipped, upended: (B,) bool, mirror left and right, top and bottom.

    Returns:
        (B, C, S, S).
    """
    left, top, width, height = boxes.unbind(1)
    rows = resize_weights(top, height, sizes[:, 0], pixels.shape[2], size_px)  # (B, S, H)
    columns = resize_weights(left, width, sizes[:, 1], pixels.shape[3], size_px)  # (B, S, W)
    rows = torch.where(upended[:, None, None], rows.flip(1), rows)
    columns = torch.where(flipped[:, None, None], columns.flip(1), columns)
    return torch.einsum("bsh,bchw,btw->bcst", rows, pixels, columns)


def resize_weights(
    start: Tensor, extent: Tensor, size: Tensor, padded: int, size_px: int
) -> Tensor:
    """How much each of `padded` pixels in a line adds to each of S: (B, S, padded) float32.

    Args:
        start, extent: (B,) the box along this line; size: (B,) how many of the pixels are image.
    """
    device = start.device
    scale = extent / size_px  # (B,) source pixels for each target pixel
    reach = scale.clamp(min=1)[:, None, None]  # of the triangle, to each side
    targets = torch.arange(size_px, device=device, dtype=torch.float64) + 0.5
    centres = start[:, None] + targets * scale[:, None]  # (B, S)
    places = torch.arange(padded, device=device, dtype=torch.float64) + 0.5
    weights = (1 - (places - centres[:, :, None]).abs() / reach).clamp(min=0)
    weights = weights * (places < size[:, None])[:, None, :]
    return (weights / weights.sum(dim=2, keepdim=True)).float()


def jitter(pixels: Tensor, factors: Tensor, order: Sequence[int]) -> Tensor:
    """Change brightness, contrast, saturation and hue of (B, 3, S, S) as torchvision defines them.

    Args:
        factors: (B, 4), the fourth is the turn of the hue as a share of the circle.
        order: in which the four happen.
    """
    for step in order:
        factor = factors[:, step].view(-1, 1, 1, 1)
        if step == 0:
            pixels = (pixels * factor).clamp(0, 1)
        elif step == 1:
            mean = luma(pixels).mean(dim=(1, 2, 3), keepdim=True)
            pixels = torch.lerp(mean, pixels, factor).clamp(0, 1)
        elif step == 2:
            pixels = torch.lerp(luma(pixels).expand_as(pixels), pixels, factor).clamp(0, 1)
        else:
            pixels = turn_hue(pixels, factor[:, :, :, 0])
    return pixels


def luma(pixels: Tensor) -> Tensor:
    """The grey of (B, 3, S, S): (B, 1, S, S)."""
    weights = torch.tensor(LUMA, device=pixels.device, dtype=pixels.dtype).view(1, 3, 1, 1)
    return (pixels * weights).sum(dim=1, keepdim=True)


def turn_hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of (B, 3, S, S) by (B, 1, 1) of the colour circle, keeping chroma and value."""
    red, green, blue = pixels.unbind(1)  # (B, S, S) each
    value, strongest = pixels.max(dim=1)
    chroma = value - pixels.min(dim=1).values
    safe = torch.where(chroma > 0, chroma, 1)
    sector = torch.where(
        strongest == 0,
        (green - blue) / safe,
        torch.where(strongest == 1, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )  # the hue in sixths of the circle
    sector = sector + 6 * turn
    # Each channel is the value, less chroma where the hue is far from it (Smith, 1978).
    channels = []
    for offset in (5, 3, 1):
        away = (offset + sector).remainder(6)
        channels.append(value - chroma * torch.minimum(away, 4 - away).clamp(0, 1))
    return torch.stack(channels, dim=1)


def blur(pixels: Tensor, sigmas_px: Tensor) -> Tensor:
    """Blur each of (B, C, S, S) with its own Gaussian of (B,) sigmas, edges reflected.

    The sigmas stay on the CPU, where the widest of them is known without waiting for the device.
    """
    side = pixels.shape[-1]
    reach = min(side - 1, math.ceil(BLUR_REACH_SIGMAS * float(sigmas_px.max())))
    offsets = torch.arange(-reach, reach + 1)
    taps = torch.exp(-0.5 * (offsets / sigmas_px[:, None]) ** 2)  # (B, 2 reach + 1)
    # Each to its own reach: a view must not depend on which images share a process with it.
    taps = taps * (offsets.abs() <= (BLUR_REACH_SIGMAS * sigmas_px[:, None]).ceil())
    taps = (taps / taps.sum(dim=1, keepdim=True)).to(pixels.device)
    offsets = offsets.to(pixels.device)
    # The line as a matrix: row i holds the taps at the pixels around i, folded back at the edges.
    places = (torch.arange(side, device=pixels.device)[:, None] + offsets).abs()
    places = (side - 1) - ((side - 1) - places).abs()  # (S, 2 reach + 1)
    line = pixels.new_zeros(len(pixels), side, side).scatter_add_(
        2, places.expand(len(pixels), -1, -1), taps[:, None, :].expand(-1, side, -1)
    )
    return torch.einsum("bsh,bchw,btw->bcst", line, pixels, line)
