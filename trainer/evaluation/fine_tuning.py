"""A backbone with a new linear layer, trained together by SGD: what both kinds of fine-tuning do.

In: a copy of an encoder, augmented training images, perhaps validation images. Out: the network as
it is after the last epoch and as it was at its best on validation, and the course of its training.
Test images never come here.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.encoder import Encoder
from trainer.evaluation.context import Evaluation
from trainer.evaluation.dataset_specs import TEST
from trainer.evaluation.features import embed_all, usable_images
from trainer.evaluation.outcome import Curve, EvaluationError
from trainer.evaluation.sgd_heads import INITIAL_DEVIATION
from trainer.evaluation.views import RESIDENT_LIMIT_BYTES, TrainingViews

# Of the head's rate in all epochs but the first, by the authors' mistake in fine_tune.py: it is
# meant to be 50 times the backbone's and is 5 times.
QUIRK_HEAD_FALL = 0.1
Key = TypeVar("Key")
Quirk = Literal["semi_supervised", "fine_tune"]  # the released file whose mistakes are repeated


class Settings(Protocol):
    """What is asked of the settings of either protocol."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def head_lr(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def gamma(self) -> float: ...


class Rates(NamedTuple):
    """Learning rates of an epoch."""

    backbone: float
    head: float


class Classifier(nn.Module):
    """The backbone of an encoder and a linear layer; the projection head has no part in it."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, encoder: Encoder, num_classes: int, *, seed: int, frozen: bool) -> None:
        """`encoder` is taken, not copied. `frozen`: the backbone never changes, nor its statistics.

        The linear layer is drawn from the seed, with small weights and biases of zero.
        """
        super().__init__()
        self.frozen = frozen
        self.backbone = encoder.backbone
        self.register_buffer("pixel_mean", encoder.pixel_mean)
        self.register_buffer("pixel_std", encoder.pixel_std)
        self.head = nn.Linear(encoder.feature_dim, num_classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.normal_(0, INITIAL_DEVIATION, generator=generator)
            self.head.bias.zero_()
        self.to(encoder.pixel_mean.device)
        self.backbone.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "Classifier":
        """A frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) floats in 0..1 -> (B, C) logits."""
        features = self.backbone((pixels - self.pixel_mean) / self.pixel_std)
        logits: Tensor = self.head(features)
        return logits


class HeldImages:
    """Validation images, prepared as at the test: kept in memory, or prepared anew each time.

    Attributes:
        labels: (M,) of those that could be decoded.
    """

    def __init__(
        self, evaluation: Evaluation, split: str, asked: NDArray[np.int64] | None = None
    ) -> None:
        """Prepare each once; `asked`: ascending places in the split, None: all."""
        self._evaluation, self._split, self._asked = evaluation, split, asked
        side = evaluation.bundle.contract.size_px
        count = len(evaluation.dataset.splits[split]) if asked is None else len(asked)
        rows: list[int] = []
        self._kept: list[NDArray[np.uint8]] | None = None
        images = usable_images(evaluation, split, rows, asked=asked)
        if count * side * side * 3 <= RESIDENT_LIMIT_BYTES:
            self._kept = list(images)
        else:
            for _ in images:
                pass
        self.labels = evaluation.dataset.splits[split].labels[rows]

    @torch.inference_mode()
    def accuracy(self, network: Classifier) -> float:
        """Top-1, 0..1."""
        network.eval()
        images = self._kept
        again = usable_images(self._evaluation, self._split, [], asked=self._asked)
        scores = embed_all(
            again if images is None else images,
            lambda pixels: {"": network(pixels)},
            device=self._evaluation.device,
        )[""]
        return float((scores.argmax(axis=1) == self.labels).mean())


@dataclass
class Course:
    """What happened epoch by epoch; points are (epoch, value).

    Attributes:
        best: a copy of the network after `best_epoch`, the first of the highest validation
            accuracy; None without validation images.
    """

    best: Classifier | None = None
    best_epoch: int = 0
    losses: list[tuple[float, float]] = field(default_factory=list)
    accuracies: list[tuple[float, float]] = field(default_factory=list)
    validation: list[tuple[float, float]] = field(default_factory=list)


def fine_tune(
    evaluation: Evaluation,
    network: Classifier,
    views: TrainingViews,
    labels: NDArray[np.int64],
    settings: Settings,
    rates: Callable[[int], Rates],
    *,
    held: HeldImages | None,
    said: str,
) -> Course:
    """Train the network in place.

    Args:
        labels: (M,) of the usable images of `views`.
        rates: of epoch 0, 1, ...
        held: scored after each epoch.
        said: what the progress calls it.

    Raises:
        EvaluationError: the loss is not finite.
    """
    groups = [{"params": list(network.head.parameters())}]
    if not network.frozen:
        groups.append({"params": list(network.backbone.parameters())})
    optimiser = torch.optim.SGD(
        groups,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    wanted = torch.from_numpy(labels).to(evaluation.device)
    course = Course()
    steps = max(1, len(labels) // settings.batch_size)  # of an epoch
    for number in range(settings.epochs):
        now = rates(number)
        for group, rate in zip(optimiser.param_groups, (now.head, now.backbone), strict=False):
            group["lr"] = rate
        network.train()
        total = right = torch.zeros((), device=evaluation.device)
        images = 0
        batches = views.epoch(settings.batch_size, seed=evaluation.seed, epoch=number)
        for step, batch in enumerate(batches):
            evaluation.progress(said, number * steps + step, settings.epochs * steps)
            own = wanted[torch.from_numpy(batch.places).to(wanted.device)]
            logits = network(batch.pixels)
            loss = nn.functional.cross_entropy(logits, own)
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimiser.step()
            total = total + loss.detach() * len(own)
            right = right + (logits.detach().argmax(dim=1) == own).sum()
            images += len(own)
        mean = float(total) / images
        if not np.isfinite(mean):
            raise EvaluationError(
                f"{said} went to a loss of {mean} in epoch {number + 1}: give lower settings.lr "
                f"and settings.head_lr than {settings.lr:g} and {settings.head_lr:g}"
            )
        course.losses.append((number + 1, mean))
        course.accuracies.append((number + 1, float(right) / images))
        if held is not None:
            reached = held.accuracy(network)
            if course.best is None or reached > max(value for _, value in course.validation):
                course.best, course.best_epoch = copy.deepcopy(network), number + 1
            course.validation.append((number + 1, reached))
    evaluation.progress(said, settings.epochs * steps, settings.epochs * steps)
    return course


def rates_of(
    settings: Settings, falls: Sequence[int], quirk: Quirk | None
) -> Callable[[int], Rates]:
    """The rates of epoch 0, 1, ...: both fall by gamma from each of `falls` on.

    Args:
        quirk: as the released code has them. `semi_supervised`: the backbone's falls an epoch late,
            the head's never. `fine_tune`: the head's is a tenth of what it should be from the
            second epoch on.
    """

    def rates(number: int) -> Rates:
        fall = settings.gamma ** sum(number >= at for at in falls)
        if quirk == "semi_supervised":
            late = settings.gamma ** sum(number - 1 >= at for at in falls)
            return Rates(settings.lr * late, settings.head_lr)
        head = settings.head_lr * fall
        if quirk == "fine_tune" and number > 0:
            head *= QUIRK_HEAD_FALL
        return Rates(settings.lr * fall, head)

    return rates


def score_test(
    evaluation: Evaluation, networks: Mapping[Key, Classifier]
) -> tuple[NDArray[np.int64], dict[Key, NDArray[np.float32]]]:
    """Places of the usable test images, and (N, C) logits of each network.

    The images are read once for all of them.
    """
    rows: list[int] = []
    keys = {str(seat): key for seat, key in enumerate(networks)}
    total, done, stage = len(evaluation.dataset.test), 0, "scoring test"

    def advance(count: int) -> None:
        nonlocal done
        done += count
        evaluation.progress(stage, done, total)

    @torch.inference_mode()
    def encode(pixels: Tensor) -> dict[str, Tensor]:
        return {seat: networks[key].eval()(pixels) for seat, key in keys.items()}

    evaluation.progress(stage, 0, total)
    scores = embed_all(
        usable_images(evaluation, TEST, rows), encode, device=evaluation.device, advance=advance
    )
    evaluation.progress(stage, total, total)
    return np.array(rows, np.int64), {key: scores[seat] for seat, key in keys.items()}


def curves_of(courses: Mapping[str, Course]) -> list[Curve]:
    """The courses of some trainings, by name, as figures."""
    figures = [
        Curve("Training loss", "nats", {name: each.losses for name, each in courses.items()}),
        Curve(
            "Training accuracy",
            "share of images",
            {name: each.accuracies for name, each in courses.items()},
        ),
    ]
    held = {name: each.validation for name, each in courses.items() if each.validation}
    if held:
        figures.append(Curve("Validation accuracy", "share of images", held))
    return figures
