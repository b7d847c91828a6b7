"""The training of a detector and what it finds: the schedule, the batches, the images.

In: a detector, places of images, settings. Out: the detector trained in place with its losses, and
detections on test images. Order, flips and sampled proposals are the seed's.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import FasterRCNN

from trainer.datasets import DataError
from trainer.evaluation.box_precision import Detections
from trainer.evaluation.context import Evaluation
from trainer.evaluation.dataset_specs import TEST, TRAIN
from trainer.evaluation.detector import sized
from trainer.evaluation.labelled import Boxes
from trainer.evaluation.outcome import EvaluationError
from trainer.evaluation.protocol_settings import DetectionSettings
from trainer.evaluation.sgd_heads import falls_after
from trainer.evaluation.whole_pictures import decode_whole

# The authors' for 4 images an iteration; MoCo's 24,000, 0.02 and 100 for 16.
AUTHORS_BATCH, AUTHORS_ITERATIONS, AUTHORS_LR, AUTHORS_WARMUP = 4, 96_000, 0.005, 400
AUTHORS_MILESTONES = (72 / 96, 88 / 96)
WARMUP_BEGINS_AT = 0.001  # share of the rate; detectron2's
CURVE_POINTS = 200

Losses = dict[str, list[tuple[float, float]]]


class Schedule(NamedTuple):
    """The settings with what was left open filled in."""

    iterations: int
    lr: float
    warmup: int
    milestones: tuple[int, ...]

    def rate(self, iteration: int, gamma: float) -> float:
        """Of iteration 0, 1, ...: up along a line, then down by gamma at each milestone."""
        fall = gamma ** sum(iteration >= at for at in self.milestones)
        if iteration >= self.warmup:
            return self.lr * fall
        share = iteration / self.warmup
        return self.lr * fall * (WARMUP_BEGINS_AT * (1 - share) + share)


def schedule_of(settings: DetectionSettings) -> Schedule:
    """The authors' schedule for this batch: the rate grows with it, the length falls."""
    scale = settings.batch_size / AUTHORS_BATCH
    iterations = settings.iterations or max(1, round(AUTHORS_ITERATIONS / scale))
    warmup = round(AUTHORS_WARMUP / scale) if settings.warmup is None else settings.warmup
    return Schedule(
        iterations,
        settings.lr or AUTHORS_LR * scale,
        warmup,
        falls_after(settings.milestones, AUTHORS_MILESTONES, iterations),
    )


def train_detector(
    evaluation: Evaluation,
    detector: FasterRCNN,
    rows: NDArray[np.int64],
    settings: DetectionSettings,
    schedule: Schedule,
    said: str,
) -> Losses:
    """Train the detector in place on the rows of `train` that show an object.

    Returns:
        the means of torchvision's four losses over a few iterations each.

    Raises:
        DataError: no row shows one. EvaluationError: a loss is not finite.
    """
    boxes = evaluation.dataset.train.boxes
    assert boxes is not None  # asked at the beginning
    shown = np.array([row for row in rows if len(boxes[row].labels)], np.int64)
    if not len(shown):
        raise DataError(
            f"data set {evaluation.dataset.name}: no training image that can be used shows an "
            "object: repair the images, or list others"
        )
    optimiser = torch.optim.SGD(
        decay_groups(detector, settings.weight_decay), lr=schedule.lr, momentum=settings.momentum
    )
    device, total = evaluation.device, schedule.iterations
    together = max(1, total // CURVE_POINTS)  # iterations of a point
    sums: dict[str, Tensor] = {}
    losses: Losses = {}
    sized(detector, settings.short_sides_px).train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(evaluation.seed)  # torchvision samples anchors and proposals by it
        batches = training_batches(evaluation, shown, settings, total + settings.precise_batches)
        for iteration, (images, targets) in zip(range(total), batches, strict=False):
            evaluation.progress(said, iteration, total)
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate(iteration, settings.gamma)
            parts: dict[str, Tensor] = detector(images, targets)
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(torch.stack(list(parts.values())).sum())
            optimiser.step()
            sums = {name: sums.get(name, 0) + part.detach() for name, part in parts.items()}
            if (iteration + 1) % together == 0 or iteration + 1 == total:
                count = iteration % together + 1
                for name, value in sums.items():
                    mean = float(value) / count
                    if not np.isfinite(mean):
                        raise EvaluationError(
                            f"{name} went to {mean} by iteration {iteration + 1}: give a lower "
                            f"settings.lr than {schedule.lr:g}, or a longer settings.warmup"
                        )
                    losses.setdefault(name.removeprefix("loss_"), []).append((iteration + 1, mean))
                sums = {}
        evaluation.progress(said, total, total)
        settle_statistics(detector, batches)
    return losses


@torch.inference_mode()
def detect(
    evaluation: Evaluation,
    detector: FasterRCNN,
    rows: NDArray[np.int64],
    settings: DetectionSettings,
    said: str,
) -> list[Detections]:
    """What the detector finds on the test images at `rows`."""
    sized(detector, (settings.test_short_side_px,)).eval()
    found: list[Detections] = []
    evaluation.progress(said, 0, len(rows))
    size = settings.batch_size
    parts = (rows[first : first + size] for first in range(0, len(rows), size))
    for pictures in _decoded(evaluation, TEST, parts):
        images = [_pixels(picture, evaluation.device) for picture in pictures]
        for each in detector(images):
            found.append(
                Detections(
                    each["boxes"].cpu().numpy(),
                    each["labels"].cpu().numpy() - 1,  # torchvision's 0 is the background
                    each["scores"].cpu().numpy(),
                )
            )
        evaluation.progress(said, len(found), len(rows))
    return found


def boxes_of(evaluation: Evaluation, split: str, rows: NDArray[np.int64]) -> list[Boxes]:
    """The objects of the images at `rows`."""
    boxes = evaluation.dataset.splits[split].boxes
    assert boxes is not None  # asked at the beginning
    return [boxes[row] for row in rows]


def decay_groups(detector: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights that decay, and those of normalisations, which do not: detectron2's rule."""
    norms = {
        id(parameter)
        for module in detector.modules()
        if isinstance(module, _BatchNorm)
        for parameter in module.parameters(recurse=False)
    }
    plain = [each for each in detector.parameters() if id(each) not in norms]
    kept = [each for each in detector.parameters() if id(each) in norms]
    return [
        {"params": plain, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]


def training_batches(
    evaluation: Evaluation, rows: NDArray[np.int64], settings: DetectionSettings, count: int
) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """`count` batches of images, some of them mirrored, with torchvision's targets."""
    draw = np.random.default_rng([evaluation.seed, len(rows)])
    size = min(settings.batch_size, len(rows))

    def chosen() -> Iterator[NDArray[np.int64]]:
        order = np.empty(0, np.int64)
        for _ in range(count):
            if len(order) < size:
                order = np.concatenate([order, draw.permutation(rows)])
            batch, order = order[:size], order[size:]
            asked.append(batch)
            yield batch

    asked: list[NDArray[np.int64]] = []
    flips = np.random.default_rng([evaluation.seed, len(rows), 1])
    for pictures in _decoded(evaluation, TRAIN, chosen()):
        images, targets = [], []
        for picture, boxes in zip(pictures, boxes_of(evaluation, TRAIN, asked.pop(0)), strict=True):
            corners = boxes.corners
            if flips.random() < settings.flip:
                picture = np.ascontiguousarray(picture[:, ::-1])
                corners = corners.copy()
                corners[:, [0, 2]] = picture.shape[1] - corners[:, [2, 0]]
            images.append(_pixels(picture, evaluation.device))
            targets.append(
                {
                    "boxes": torch.from_numpy(corners).to(evaluation.device),
                    "labels": torch.from_numpy(boxes.labels + 1).to(evaluation.device),
                }
            )
        yield images, targets


@torch.no_grad()
def settle_statistics(
    detector: FasterRCNN, batches: Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]
) -> None:
    """Give normalisations the mean of their statistics over the batches left (PRECISE_BN)."""
    norms = [module for module in detector.modules() if isinstance(module, _BatchNorm)]
    first = next(batches, None)
    if first is None:
        return
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a plain mean
    detector(*first)
    for batch in batches:
        detector(*batch)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


def _decoded(
    evaluation: Evaluation, split: str, batches: Iterator[NDArray[np.int64]]
) -> Iterator[list[NDArray[np.uint8]]]:
    """The images (h, w, 3) of batches of places, whole, as their boxes count pixels."""
    source = evaluation.dataset.splits[split].source
    asked = (tuple((source.ids[row], source.pictures[row]) for row in batch) for batch in batches)
    return evaluation.pool.stream(decode_whole, asked)


def _pixels(picture: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(3, h, w) float32 in 0..1."""
    return torch.tensor(picture, device=device).permute(2, 0, 1).float() / 255
