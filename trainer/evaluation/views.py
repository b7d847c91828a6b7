"""Augmented training images of a split, batch after batch, for what learns on a data set.

In: a split, how its views are drawn. Out: batches of pixels on the device with their labels' rows,
in an order and with draws that the seed alone decides.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.augment import Views, apply_views, draw_views
from trainer.config import AugmentConfig, DataConfig
from trainer.datasets.source import STORED_PER_CROP
from trainer.decoding import Survey, survey
from trainer.evaluation.context import Evaluation
from trainer.stock import CropStock

RESIDENT_LIMIT_BYTES = 4 << 30  # reduced images held in memory; past it they are decoded anew

# The authors' views for linear classification and fine-tuning: RandomResizedCrop(0.08, 1), flip.
CROP_AND_FLIP = AugmentConfig(
    crop_scale_min=0.08,
    crop_scale_max=1.0,
    crop_ratio_max=4 / 3,
    flip=0.5,
    vertical_flip=0.0,
    quarter_turns=0.0,
    jitter=0.0,
    gray=0.0,
    blur=0.0,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    blur_sigma_min_px=0.1,
    blur_sigma_max_px=0.1,
)


# How views are drawn: from (B, 2) heights and widths, and a generator on the CPU.
DrawViews = Callable[[Tensor, torch.Generator], Views]


def resized_crops(scale_min: float, flip: float) -> DrawViews:
    """RandomResizedCrop(scale_min, 1), then a flip with that probability."""
    config = CROP_AND_FLIP.model_copy(update={"crop_scale_min": scale_min, "flip": flip})
    return lambda sizes, generator: draw_views(config, sizes, generator)


def random_crops(flip: float) -> DrawViews:
    """The short side at 256/224 of a crop, a square crop anywhere, then a flip.

    That is Resize(256), RandomCrop(224), scaled to the encoder's input. Both are one resampling
    here, so that small images are not enlarged twice.
    """
    config = CROP_AND_FLIP.model_copy(update={"flip": flip})

    def draw(sizes: Tensor, generator: torch.Generator) -> Views:
        views = draw_views(config, sizes, generator)
        places = torch.rand(len(sizes), 2, generator=generator, dtype=torch.float64)
        height, width = sizes.double().unbind(1)
        side = height.minimum(width) / STORED_PER_CROP
        left, top = places[:, 0] * (width - side), places[:, 1] * (height - side)
        return views._replace(boxes=torch.stack([left, top, side, side], dim=1))

    return draw


class ViewBatch(NamedTuple):
    """B augmented images."""

    pixels: Tensor  # (B, 3, S, S) float32 in 0..1 on the device
    places: NDArray[np.int64]  # (B,) among the usable images of the split


class TrainingViews:
    """The usable images of a split; broken ones were counted and left out.

    Attributes:
        rows: (M,) ascending places of the usable images in the split.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        split: str,
        rows: NDArray[np.int64] | None = None,
        *,
        draw: DrawViews | None = None,
    ) -> None:
        """Decode each image once.

        Args:
            rows: of the split; None: all.
            draw: None: RandomResizedCrop(0.08, 1) and flips.

        Raises:
            DataError: more images are broken than the data set allows; names some.
        """
        dataset, side = evaluation.dataset, evaluation.bundle.contract.size_px
        source = dataset.splits[split].source
        asked = np.arange(len(source)) if rows is None else rows
        config = DataConfig(
            holdout=0,
            crop_fraction=1,
            max_skipped=dataset.max_skipped,
            resident_limit_bytes=RESIDENT_LIMIT_BYTES,
            device_limit_bytes=0,
            workers=evaluation.pool.workers,
            decoder="pillow",
        )
        stage, done = f"decoding {split}", 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            evaluation.progress(stage, done, len(asked))

        evaluation.progress(stage, 0, len(asked))
        found: Survey = survey(
            source.subset(asked), evaluation.pool, config, size_px=side, advance=advance
        )
        evaluation.skip(split, found.skipped)
        seats = {name: row for row, name in enumerate(source.ids)}
        self.rows = np.array([seats[name] for name in found.source.ids], np.int64)
        self._evaluation, self._side = evaluation, side
        self._draw = draw or resized_crops(CROP_AND_FLIP.crop_scale_min, CROP_AND_FLIP.flip)
        self._stock = CropStock(
            found.source, found.stored, evaluation.pool, size_px=side, sizes=found.sizes
        )

    def epoch(self, batch_size: int, *, seed: int, epoch: int) -> Iterator[ViewBatch]:
        """All usable images once, shuffled; a last batch that is not full is left out.

        Fewer images than `batch_size` are one batch.
        """
        order = np.random.default_rng([seed, epoch]).permutation(len(self.rows))
        generator = torch.Generator().manual_seed(int(order[0]) + (seed << 20) + epoch)
        count = max(1, len(order) // batch_size)
        batches = [order[i * batch_size : (i + 1) * batch_size] for i in range(count)]
        device = self._evaluation.device
        for places, block in zip(batches, self._stock.batches(batches, device), strict=True):
            views = self._draw(block.sizes, generator)
            pixels = apply_views(block.pixels, views, size_px=self._side)
            yield ViewBatch(pixels.contiguous(), places)
