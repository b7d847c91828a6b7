"""One step of training: views -> embeddings -> losses -> gradients -> weights, then bank and graph.

In: a batch as trainer/feed.py gives it, on the device. Out: changed state, and the figures of the
joined batch as one tensor on the device. Nothing here waits for the device: what a step found is
looked at by whoever reads that tensor. Letters as in trainer/objective.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.augment import Views, apply_views
from trainer.checkpoint import TrainingState
from trainer.config import Recipe
from trainer.distributed import Ranks
from trainer.feed import Batch
from trainer.monitor import spread
from trainer.objective import LossConfig, Objective, objective
from trainer.sharded_bank import BankShard
from trainer.sharded_objective import sharded_objective

# Means over the batch; what is summed over an epoch.
FIGURES = ("loss", "instance", "invariance", "reached", "hard_share", "spread")


class StepFigures(NamedTuple):
    """What one step says once it is read from the device; equal on all ranks."""

    means: dict[str, float]  # by FIGURES
    signum: int  # the signal that any of several ranks got, 0 for none


class TrainingStep:
    """One step as a function of a batch; it changes encoder, optimiser, bank and graph."""

    def __init__(
        self,
        recipe: Recipe,
        state: TrainingState,
        network: nn.Module,
        ranks: Ranks,
        asked: Callable[[], int],
        resident: Tensor | None = None,
    ) -> None:
        """Keep what every step needs, and make the optimiser's state fit the device.

        Args:
            network: what to call in training, see `Ranks.network`.
            asked: what this rank wishes of all, 0 for none; several ranks tell each other.
            resident: (N, H, W, 3) uint8 on the device, for batches that bring no pixels.
        """
        self._state, self._ranks, self._asked = state, ranks, asked
        self._network = torch.compile(network) if recipe.speed.compile else network
        self._resident = resident
        self._size_px = recipe.encoder.image_size_px
        self._bf16 = recipe.precision == "bf16"
        self._share = ranks.share(recipe.batch_size)
        self._losses = loss_config(recipe)
        if state.bank.embeddings.is_cuda:
            fuse(state.optimiser)
        else:
            unfuse(state.optimiser)

    def set_rate(self, rate: float) -> None:
        """Learn at this rate from now on."""
        for group in self._state.optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def __call__(self, batch: Batch, *, weight: float) -> Tensor:
        """Do one step.

        Args:
            weight: of the invariance loss; 0 leaves it out.

        Returns:
            (len(FIGURES) + 1,) float32 on the device, for `read_figures`. A loss in it that is not
            finite has spoilt the weights already: nothing may be saved before it was read.
        """
        views = batch.like.unpack(batch.drawn)
        return self.learn(batch.indices, self.see(batch.indices, views, batch.pixels), weight)

    def see(self, indices: Tensor, views: Views, pixels: Tensor | None) -> Tensor:
        """The views of this rank's share of the joined batch: (b, 3, S, S) float32, channels last.

        Args:
            indices: (B,) int64 of the joined batch.
            views: of this rank's share, on the device.
            pixels: (b, H, W, 3) uint8; None takes them from what is resident.
        """
        if pixels is None:
            assert self._resident is not None  # or the feed brings pixels
            pixels = self._resident.index_select(0, indices[self._share])
        return apply_views(pixels, views, size_px=self._size_px)

    def learn(self, indices: Tensor, views: Tensor, weight: float) -> Tensor:
        """All that comes after the views; see `__call__`."""
        embeddings = self._embed(views)
        found, shared = self._find(indices, embeddings)
        # Left out, not multiplied by 0: 0 times an infinite loss is no number.
        loss = found.instance + weight * found.invariance if weight else found.instance
        # One exchange carries all that the ranks need of each other, also whether one is to stop.
        wish = self._asked() if self._ranks.size > 1 else 0
        asked = torch.full((1,), wish, device=views.device)
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

    def remember(self, indices: Tensor) -> Callable[[], None]:
        """Copy what steps on these images change; calling what is returned puts it back in place.

        Of the bank, which may fill half the device, only these images' rows are copied. A momentum
        that did not exist becomes zeros, which the next step takes as if there were none.
        """
        state = self._state
        weights = list(state.encoder.state_dict().values())
        copies = [each.clone() for each in weights]
        momenta = {key: each["momentum_buffer"].clone() for key, each in _momenta(state.optimiser)}
        bank, rows = state.bank, indices.clone()
        embeddings, neighbours = bank.embeddings[rows], bank.neighbours[rows]

        @torch.no_grad()
        def restore() -> None:
            for tensor, copy in zip(weights, copies, strict=True):
                tensor.copy_(copy)
            for key, each in _momenta(state.optimiser):
                if key in momenta:
                    each["momentum_buffer"].copy_(momenta[key])
                else:
                    each["momentum_buffer"].zero_()
            bank.embeddings[rows], bank.neighbours[rows] = embeddings, neighbours
            state.optimiser.zero_grad(set_to_none=True)

        return restore

    def _embed(self, views: Tensor) -> Tensor:
        # No weight is used twice, so a cache of rounded ones has no use, and a graph forbids it.
        kind = views.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self._bf16, cache_enabled=False):
            embeddings: Tensor = self._network(
                views.to(memory_format=torch.channels_last)
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


def read_figures(figures: Tensor) -> list[StepFigures]:
    """Fetch what steps returned, (steps, F) stacked; waits until the device has done the last."""
    return [
        StepFigures(dict(zip(FIGURES, means, strict=True)), int(signum))
        for *means, signum in figures.tolist()
    ]


def loss_config(recipe: Recipe) -> LossConfig:
    """The recipe's part of the objective that one batch needs."""
    chosen = recipe.loss.model_dump(exclude={"invariance_weight", "warmup_epochs"})
    return LossConfig(**chosen)


def fuse(optimiser: torch.optim.Optimizer) -> None:
    """Make SGD one kernel whose rate is read on the device, so that a graph does not freeze it.

    Every weight gets its momentum now, zeros (which the first step takes as if there were none),
    in the strides of the weight: a checkpoint gives it back without them, which the kernel refuses.
    """
    for group in optimiser.param_groups:
        device = group["params"][0].device
        group["fused"], group["foreach"] = True, None
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to(device, copy=True)
        for parameter in group["params"]:
            if group["momentum"] and parameter.requires_grad:
                momentum = torch.zeros_like(parameter)  # of the same strides
                saved = optimiser.state[parameter].get("momentum_buffer")
                if saved is not None:
                    momentum.copy_(saved)
                optimiser.state[parameter]["momentum_buffer"] = momentum


def unfuse(optimiser: torch.optim.Optimizer) -> None:
    """Take back what `fuse` chose and a checkpoint of a GPU brought to a CPU.

    The fused kernel of a CPU does not look at strides: with a momentum as a checkpoint gives it
    back it would move other weights than the gradient says.
    """
    for group in optimiser.param_groups:
        group["fused"], group["lr"] = None, float(group["lr"])


def _momenta(optimiser: torch.optim.Optimizer) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Each weight that has a momentum, and where that is held."""
    held = optimiser.state.items()
    return [(key, each) for key, each in held if each.get("momentum_buffer") is not None]


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
