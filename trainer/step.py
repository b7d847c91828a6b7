"""One step of training: embeddings -> losses -> gradients -> weights, then bank and graph.

In: the batch's indices and this rank's views, on the device. Out: changed state, and the figures of
the joined batch as one tensor on the device. Nothing here waits for the device: what a step found
is looked at by whoever reads that tensor. Letters as in trainer/objective.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.checkpoint import TrainingState
from trainer.config import Recipe
from trainer.distributed import Ranks
from trainer.monitor import spread
from trainer.objective import LossConfig, Objective, objective
from trainer.sharded_bank import BankShard
from trainer.sharded_objective import sharded_objective

# Means over the batch; what is summed over an epoch.
FIGURES = ("loss", "instance", "invariance", "reached", "hard_share", "spread")


class StepFigures(NamedTuple):
    """What one step says once it is read from the device; equal on all ranks."""

    means: dict[str, float]  # by FIGURES
    signum: int  # the signal that any rank got, 0 for none


class TrainingStep:
    """One step as a function of a batch; it changes encoder, optimiser, bank and graph."""

    def __init__(
        self,
        recipe: Recipe,
        state: TrainingState,
        network: nn.Module,
        ranks: Ranks,
        asked: Callable[[], int],
    ) -> None:
        """Keep what every step needs.

        Args:
            network: what to call in training, see `Ranks.network`.
            asked: what this rank wishes of all, 0 for none; the others are told in each step.
        """
        self._state, self._network, self._ranks, self._asked = state, network, ranks, asked
        self._bf16 = recipe.precision == "bf16"
        self._share = ranks.share(recipe.batch_size)
        self._losses = loss_config(recipe)

    def set_rate(self, rate: float) -> None:
        """Learn at this rate from now on."""
        for group in self._state.optimiser.param_groups:
            group["lr"] = rate

    def __call__(self, indices: Tensor, pixels: Tensor, *, weight: float) -> Tensor:
        """Do one step.

        Args:
            indices: (B,) int64 of the joined batch, on the device.
            pixels: (b, 3, S, S) float32, this rank's views, on the device.
            weight: of the invariance loss; 0 leaves it out.

        Returns:
            (len(FIGURES) + 1,) float32 on the device, for `read_figures`. A loss in it that is not
            finite has spoilt the weights already: nothing may be saved before it was read.
        """
        embeddings = self._embed(pixels)
        found, shared = self._find(indices, embeddings)
        # Left out, not multiplied by 0: 0 times an infinite loss is no number.
        loss = found.instance + weight * found.invariance if weight else found.instance
        # One exchange carries all that the ranks need of each other, also whether one is to stop.
        asked = torch.full((1,), self._asked(), device=pixels.device)
        if shared is None:
            joined, nearest, means, signals = self._ranks.joined(
                embeddings, found.nearest, _means(found, loss)[None], asked
            )
        else:
            joined, nearest = shared, found.nearest
            means, signals = self._ranks.joined(_means(found, loss)[None], asked)
        figures = [*means.mean(dim=0), spread(joined).float(), signals.amax().float()]
        optimiser = self._state.optimiser
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        # After the step, with what was computed before it: the authors' order.
        self._write(indices, joined, nearest)
        return torch.stack(figures)

    def _embed(self, pixels: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self._bf16):
            embeddings: Tensor = self._network(
                pixels.to(memory_format=torch.channels_last)
            ).embedding
        return embeddings

    def _find(self, indices: Tensor, embeddings: Tensor) -> tuple[Objective, Tensor | None]:
        """The one place where bank and graph are read: (B,) of the joined batch, (b, D) own ones.

        Returns:
            what was found for this rank's share. Of a divided bank: for the joined batch, with its
            (B, D) embeddings.
        """
        bank = self._state.bank
        if isinstance(bank, BankShard):
            return sharded_objective(bank, indices, embeddings, self._losses, self._ranks)
        return objective(bank, indices[self._share], embeddings, self._losses), None

    def _write(self, indices: Tensor, embeddings: Tensor, nearest: Tensor) -> None:
        """The one place where they are written: (B,), (B, D), (B, K+1) of the joined batch."""
        self._state.bank.update(indices, embeddings)
        self._state.bank.refresh_neighbours(indices, nearest)


def read_figures(figures: Tensor) -> StepFigures:
    """Fetch what a step returned; waits until the device has done it."""
    *means, signum = figures.tolist()
    return StepFigures(dict(zip(FIGURES, means, strict=True)), int(signum))


def loss_config(recipe: Recipe) -> LossConfig:
    """The recipe's part of the objective that one batch needs."""
    chosen = recipe.loss.model_dump(exclude={"invariance_weight", "warmup_epochs"})
    return LossConfig(**chosen)


def _means(found: Objective, loss: Tensor) -> Tensor:
    """(F,) float32: the step's figures but for the last, each a mean over the images."""
    reached = (found.reached >= 0).sum(dim=1)  # (b,), or (B,) where the bank is divided
    hard = (found.hard_positives >= 0).sum(dim=1)  # the same
    values = (
        loss.detach(),
        found.instance.detach(),
        found.invariance.detach(),
        reached.float().mean(),
        (hard / reached.clamp(min=1)).mean(),
    )
    return torch.stack([value.float() for value in values])
