"""What the training loop drives: the feed, the step in one way of launching it, the readings.

In: the recipe, the live objects and the device. Out: an `Engine`, and a line in the log that says
where the images are and how steps are launched.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from trainer.capture import CapturedStep, CudaGraphs
from trainer.checkpoint import TrainingState
from trainer.config import Recipe
from trainer.distributed import Ranks
from trainer.feed import Batch, Feed
from trainer.progress import say
from trainer.readings import Readings
from trainer.step import TrainingStep
from trainer.stock import CropStock


class Step(Protocol):
    """A training step, launched in one way or another."""

    def set_rate(self, rate: float) -> None:
        """Learn at this rate from now on."""

    def __call__(self, batch: Batch, *, weight: float) -> Tensor:
        """Do one step; see `TrainingStep`."""


class Engine(NamedTuple):
    """What the loop works with while it runs."""

    step: Step
    feed: Feed
    readings: Readings
    asked: Callable[[], int]  # what this rank wishes of all, 0 to go on


def build_engine(
    recipe: Recipe,
    stock: CropStock,
    state: TrainingState,
    network: nn.Module,
    ranks: Ranks,
    device: torch.device,
    asked: Callable[[], int],
) -> Engine:
    """Take the images to the device, choose how steps are launched, and say both.

    Args:
        network: what to call in training, see `Ranks.network`.
    """
    captures = device.type == "cuda" and recipe.speed.graph == "auto" and ranks.size == 1
    feed = Feed(recipe, stock, ranks, device, one_shape=captures)
    plain = TrainingStep(recipe, state, network, ranks, asked, feed.resident)
    step: Step = plain
    how = "compiled" if recipe.speed.compile else "not compiled"
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes are the same in every step
        if captures:
            step = CapturedStep(plain, CudaGraphs(device))
            how += ", captured as CUDA graphs"
        else:
            why = "several processes" if ranks.size > 1 else "speed.graph=off"
            how += f", not captured as CUDA graphs ({why})"
    say(f"{feed.describe()}; steps {how}")
    return Engine(step, feed, Readings(device, ranks), asked)
