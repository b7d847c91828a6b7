"""What happens when: pure functions of seed, epoch and step, so there is nothing to save.

In: a recipe's numbers and a position. Out: learning rate, weight of the invariance loss, the order
of the images, a generator for the step's views. Epochs and steps count from 1.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.config import OptimConfig

# Keeps the streams of random numbers apart that one seed feeds.
_ORDER, _VIEWS = 1, 2


class Position(NamedTuple):
    """How far training is: `step` steps of `epoch` are done."""

    epoch: int  # 1..epochs
    step: int  # 0..steps of an epoch


def learning_rate(config: OptimConfig, epoch: int, epochs: int) -> float:
    """The rate of a whole epoch, as in the paper's code.

    Cosine: lr / 2 (1 + cos(pi (epoch - 1) / epochs)), so the first epoch has the full rate.
    Official cosine: lr / 2 (1 + cos(pi epoch / (epochs + 1))), one epoch ahead: the released code
    runs the epochs 1..799 of its 800. Step: times gamma after each milestone that has passed.
    """
    if config.schedule == "official_cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * epoch / (epochs + 1)))
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
    return float(config.lr * config.gamma ** sum(epoch > passed for passed in config.milestones))


def invariance_weight(weight: float, epoch: int, warmup_epochs: int) -> float:
    """lambda w(t): nothing during the first `warmup_epochs`, then `weight` (paper, section 3.3)."""
    return 0.0 if epoch <= warmup_epochs else weight


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Whole batches only: what is left over comes in another epoch's order."""
    return num_images // batch_size


def epoch_batches(seed: int, epoch: int, num_images: int, batch_size: int) -> NDArray[np.int64]:
    """(steps, batch) int64 positions: the images in the order of this epoch, each at most once."""
    draw = np.random.default_rng([seed, _ORDER, epoch])
    steps = steps_per_epoch(num_images, batch_size)
    return draw.permutation(num_images)[: steps * batch_size].reshape(steps, batch_size)


def view_generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """The source of this step's training views, on the CPU."""
    state = np.random.SeedSequence([seed, _VIEWS, epoch, step]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
