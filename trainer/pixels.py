"""Batched changes of pixels: crop and resize, turn, colours, blur. Pure functions.

In: images on any device and, for each, numbers on the same device. Out: new pixels there. Nothing
here waits for a device or has a shape that depends on numbers, so that all of it can be captured
in a CUDA graph or compiled in one piece. All sums are float32: only `blur` multiplies matrices, and
it refuses to do so in TF32 or under autocast's bf16, which would cost the grey levels of 8 bits.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Taps on each side of a Gaussian, in sigmas: beyond, 0.3 % of the weight is left.
BLUR_REACH_SIGMAS = 3.0
# ITU-R 601 luma, the weights of Pillow's and torchvision's grey.
LUMA = (0.299, 0.587, 0.114)
# So narrow a Gaussian leaves an image as it is, to the last bit.
NO_BLUR_SIGMA_PX = 1e-3


class Taps(NamedTuple):
    """From which T source lines each of S target lines is summed, and with what weights."""

    lines: Tensor  # (B, S, T) int64
    weights: Tensor  # (B, S, T) float32, they add up to 1


def find_taps(
    boxes: Tensor, sizes: Tensor, mirrored: Tensor, *, block: tuple[int, int], size_px: int
) -> tuple[Taps, Taps]:
    """The rows and the columns that a crop is made of: bilinear, area-averaging when shrinking.

    As Pillow's `resize(box=...)`, which also makes the evaluation image, but in floats. T depends
    on the shapes alone: 2 where no crop can shrink, else twice the largest factor, rounded up.

    Args:
        boxes: (B, 4) float64 left, top, width, height; sizes: (B, 2) height, width of the images.
        mirrored: (B, 2) bool: top and bottom, left and right.
        block: height and width of the block in which the images lie.
    """
    device = boxes.device
    start, extent = boxes[:, :2].flip(1), boxes[:, 2:].flip(1)  # (B, 2) each, vertical first
    scale = extent / size_px  # source lines for each target line
    reach = scale.clamp(min=1)  # of the triangle, to each side
    places = torch.arange(size_px, device=device, dtype=torch.float64) + 0.5
    places = torch.where(mirrored[:, :, None], size_px - places, places)  # (B, 2, S)
    centres = start[:, :, None] + places * scale[:, :, None]
    first = (centres - reach[:, :, None] + 0.5).floor()
    # Float64 up to here, so that places deep in an image are as exact as at its edge.
    offset = (first + 0.5 - centres).float()
    counts = [math.ceil(2 * max(1.0, side / size_px)) for side in block]
    tap = torch.arange(max(counts), device=device)
    distance = (offset[:, :, :, None] + tap).abs() / reach.float()[:, :, None, None]
    lines = first.long()[:, :, :, None] + tap  # (B, 2, S, T)
    inside = (lines >= 0) & (lines < sizes[:, :, None, None])
    weights = (1 - distance).clamp(min=0) * inside
    weights = weights / weights.sum(dim=3, keepdim=True)
    lines = torch.minimum(lines.clamp(min=0), sizes[:, :, None, None] - 1)
    rows, columns = (
        Taps(lines[:, axis, :, :count], weights[:, axis, :, :count])
        for axis, count in enumerate(counts)
    )
    return rows, columns


def crop_and_resize(pixels: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """(B, 3, S, S) float32 in 0..1 from (B, H, W, 3) uint8, any strides."""
    count, height, width, channels = pixels.shape
    source = pixels.float().view(count * height, width * channels)
    lines = _weighted(source, height, Taps(rows.lines, rows.weights / 255))
    lines = lines.view(count, -1, width, channels).permute(0, 2, 3, 1)  # (B, W, 3, S)
    source = lines.reshape(count * width, -1)
    made = _weighted(source, width, columns)
    return made.view(count, -1, channels, rows.lines.shape[1]).permute(0, 2, 3, 1)


def _weighted(source: Tensor, length: int, taps: Taps) -> Tensor:
    """(B, S, K) sums of the lines (B x length, K) of B images."""
    count = len(taps.lines)
    first = torch.arange(count, device=source.device)[:, None] * length
    total: Tensor | None = None
    for tap in range(taps.lines.shape[2]):
        chosen = source.index_select(0, (first + taps.lines[:, :, tap]).view(-1))
        chosen, weight = chosen.view(count, -1, source.shape[1]), taps.weights[:, :, tap, None]
        total = chosen.mul_(weight) if total is None else total.addcmul_(chosen, weight)
    assert total is not None  # there are two taps and more
    return total


def jitter(pixels: Tensor, factors: Tensor, order: Sequence[int]) -> Tensor:
    """Change brightness, contrast, saturation and hue of (B, 3, S, S) as torchvision defines them.

    Args:
        factors: (B, 4), the fourth is the turn of the hue as a share of the circle.
        order: in which the four happen, some of 0..3.
    """
    for step in order:
        factor = factors[:, step].view(-1, 1, 1, 1)
        if step == 0:
            pixels = (pixels * factor).clamp_(0, 1)
        elif step == 1:
            mean = luma(pixels.mean(dim=(2, 3), keepdim=True))
            pixels = (pixels * factor).add_(mean * (1 - factor)).clamp_(0, 1)
        elif step == 2:
            pixels = (pixels * factor).add_(luma(pixels) * (1 - factor)).clamp_(0, 1)
        else:
            pixels = turn_hue(pixels, factor[:, :, :, 0])
    return pixels


def luma(pixels: Tensor) -> Tensor:
    """The grey of (B, 3, S, S): (B, 1, S, S)."""
    red, green, blue = pixels.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])[:, None]


def turn_hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of (B, 3, S, S) by (B, 1, 1) of the colour circle, keeping chroma and value."""
    red, green, blue = pixels.unbind(1)  # (B, S, S) each
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    # How far from red, 0..3 sixths of the circle, without asking which channel is the strongest:
    # each step of the way a channel rises or falls by the chroma. Grey has no hue, and needs none.
    away = (green + blue).sub_(red).sub_(least).div_(chroma.clamp(min=1e-20)).add_(1)
    hue = torch.copysign(away, green - blue).mul_(1 / 6).add_(turn)  # in circles
    # Each channel is the value, less chroma where the hue is far from it (Smith, 1978).
    places = torch.arange(3, device=pixels.device)[:, None, None] / 3
    away = hue[:, None] - places  # (B, 3, S, S)
    away.sub_(away.round()).abs_().mul_(6).sub_(1).clamp_(0, 1)
    return torch.addcmul(value[:, None], chroma[:, None], away, value=-1)


def blur(pixels: Tensor, sigmas_px: Tensor) -> Tensor:
    """Blur each of (B, C, S, S) with its own Gaussian of (B,) sigmas, edges reflected.

    Each to its own reach: a view must not depend on which images share a batch with it. Two
    products with (B, S, S) matrices, 4 B C S^3 operations.

    Raises:
        RuntimeError: CUDA is set to multiply in TF32.
    """
    if pixels.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        raise RuntimeError(
            "the blur of the views multiplies in float32, and torch is set to TF32, which keeps 11 "
            'bits: leave torch.set_float32_matmul_precision at "highest" while training'
        )
    with torch.autocast(pixels.device.type, enabled=False):
        matrix = _blur_matrix(sigmas_px.float(), pixels.shape[-1])[:, None]  # (B, 1, S, S)
        return matrix @ (pixels.float() @ matrix.mT)


def _blur_matrix(sigmas_px: Tensor, side: int) -> Tensor:
    """(B, S, S): row i holds the weights of the pixels around i, folded back at the edges."""
    place = torch.arange(side, device=sigmas_px.device)
    sigma = sigmas_px[:, None]
    weights = torch.exp(-0.5 * (place / sigma) ** 2)  # (B, S) by distance
    weights = weights * (place <= (BLUR_REACH_SIGMAS * sigma).ceil())
    weights = weights / (2 * weights.sum(dim=1, keepdim=True) - weights[:, :1])
    weights = torch.nn.functional.pad(weights, (0, 1))  # distance S and more: none
    own, other = place[:, None], place
    # The edge itself is not repeated: line 0 has no image beyond the first edge.
    before = torch.where(other > 0, own + other, side)
    after = torch.where(other < side - 1, 2 * (side - 1) - own - other, side)
    parts = [
        weights.index_select(1, distance.clamp(max=side).view(-1))
        for distance in ((own - other).abs(), before, after)
    ]
    return (parts[0] + parts[1] + parts[2]).view(-1, side, side)
