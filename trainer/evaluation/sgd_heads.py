"""Linear layers on frozen outputs, trained together by SGD as in the authors' released code.

In: batches of outputs with labels. Out: a classifier for each layer, the course of its training.
Two points differ from linear_classification.py there, which `official_quirks` brings back: its
batch normalisation never left the first statistics (mean 0, variance 1), because the whole network
was put into evaluation mode, and its last epoch was never scored.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.evaluation.outcome import EvaluationError
from trainer.evaluation.protocol_settings import LinearProbeSettings

# The authors' epochs after which the rate falls, as shares of their 120.
AUTHORS_MILESTONES = (50 / 120, 80 / 120, 100 / 120)
INITIAL_DEVIATION = 0.01  # of the weights, usual for linear probes; biases begin at 0
SCORED_TOGETHER = 4096  # rows


def falls_after(
    given: Sequence[int] | None, shares: Sequence[float], epochs: int
) -> tuple[int, ...]:
    """Epochs after which the rate falls: as given, or at these shares of the epochs."""
    if given is not None:
        return tuple(given)
    return tuple(max(1, round(share * epochs)) for share in shares)


class HeadBatch(NamedTuple):
    """Outputs of B images, and their classes."""

    values: Mapping[str, Tensor]  # layer: (B, F)
    labels: Tensor  # (B,) int64


@dataclass
class Course:
    """What happened epoch by epoch; points are (epoch, value)."""

    losses: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    accuracies: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)


class Heads:
    """A linear layer with batch normalisation before it, or without, for each named output."""

    def __init__(
        self,
        widths: Mapping[str, int],
        num_classes: int,
        *,
        batch_norm: bool,
        seed: int,
        device: torch.device,
        affine: bool = False,
    ) -> None:
        """`affine`: the batch normalisation scales and moves, as in the released code.

        With statistics that are learned it would let the authors' rate of 1.0 diverge.
        """
        generator = torch.Generator().manual_seed(seed)
        self.device = device
        self.modules: dict[str, nn.Sequential] = {}
        for name, width in widths.items():
            linear = nn.Linear(width, num_classes)
            with torch.no_grad():
                linear.weight.normal_(0, INITIAL_DEVIATION, generator=generator)
                linear.bias.zero_()
            layers = [nn.BatchNorm1d(width, affine=affine), linear] if batch_norm else [linear]
            self.modules[name] = nn.Sequential(*layers).to(device)

    def parameters(self) -> list[nn.Parameter]:
        """Of all heads."""
        return [each for module in self.modules.values() for each in module.parameters()]

    def train(self, mode: bool) -> None:
        """Put all heads into training or evaluation mode."""
        for module in self.modules.values():
            module.train(mode)

    @torch.no_grad()
    def scores(self, name: str, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, C) logits of one head for (N, F) outputs, in evaluation mode."""
        module = self.modules[name].eval()
        parts = [
            module(torch.from_numpy(rows[first : first + SCORED_TOGETHER]).to(self.device))
            for first in range(0, len(rows), SCORED_TOGETHER)
        ]
        return torch.cat(parts).cpu().numpy()


def train_heads(
    heads: Heads,
    epoch: Callable[[int], Iterator[HeadBatch]],
    settings: LinearProbeSettings,
    progress: Callable[[int], object],
) -> Course:
    """Train all heads on the same batches; each has a loss of its own.

    Args:
        epoch: gives the batches of epoch 0, 1, ...
        progress: told how many epochs are done.

    Raises:
        EvaluationError: a loss is not finite.
    """
    milestones = falls_after(settings.milestones, AUTHORS_MILESTONES, settings.epochs)
    # The released code scores before each epoch, so that its last epoch is never scored.
    epochs = settings.epochs - 1 if settings.official_quirks else settings.epochs
    optimiser = torch.optim.SGD(
        heads.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        foreach=True,
    )
    heads.train(not settings.official_quirks)
    course = Course(facts={"milestones": list(milestones), "epochs_trained": epochs})
    progress(0)
    for number in range(epochs):
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * settings.gamma ** sum(
                number >= milestone for milestone in milestones
            )
        losses = dict.fromkeys(heads.modules, torch.zeros((), device=heads.device))
        right = dict.fromkeys(heads.modules, torch.zeros((), device=heads.device))
        images = batches = 0
        for values, labels in epoch(number):
            total = torch.zeros((), device=heads.device)
            for name, module in heads.modules.items():
                logits = module(values[name])
                loss = nn.functional.cross_entropy(logits, labels)
                total = total + loss
                losses[name] = losses[name] + loss.detach()
                right[name] = right[name] + (logits.detach().argmax(dim=1) == labels).sum()
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(total)
            optimiser.step()
            images, batches = images + len(labels), batches + 1
        for name in heads.modules:
            mean = float(losses[name]) / batches
            if not np.isfinite(mean):
                raise EvaluationError(
                    f"the linear layer on {name} went to {mean} in epoch {number + 1}: give a "
                    f"lower settings.lr than {settings.lr:g}"
                )
            course.losses.setdefault(name, []).append((number + 1, mean))
            course.accuracies.setdefault(name, []).append((number + 1, float(right[name]) / images))
        progress(settings.epochs if number + 1 == epochs else number + 1)
    return course
