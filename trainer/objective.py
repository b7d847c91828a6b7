"""One batch of Invariance Propagation: discover positives, choose hard ones, join the losses.

In: the memory bank, the batch's indices and fresh embeddings. Out: the two losses and what was
discovered. Nothing is changed here and nothing is drawn. Wang et al., NeurIPS 2020, section 3.

The bank has no gradient, so the gradient of any loss of similarities is a weighted sum of the bank
rows that the loss looked at: at most 1 + M + P of the N. The scan that finds them runs without
autograd, which therefore never makes a (B, N) gradient.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trainer import losses
from trainer.memory_bank import MemoryBank
from trainer.representation.neighbours import KnnGraph
from trainer.representation.propagation import (
    all_walks,
    pick_positives,
    propagate,
)
from trainer.search import nearest, places, top_m


@dataclass(frozen=True)
class LossConfig:
    """What of the method can be chosen; paper values in brackets (ImageNet / CIFAR code)."""

    temperature: float  # tau > 0 [0.07 linear head, 0.2 MLP head]
    num_background: int  # M, counting the anchor [4096]
    steps: int  # l, hops of propagation [3]
    num_positives: int  # P [50 / 20]
    mode: Literal["paper", "official"] = "paper"  # official: the released code, quirks included
    positives: Literal["hard", "easy"] = "hard"  # easy is the paper's ablation
    exclusive: bool = True  # official mode only: subtract the anchor from the denominator

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        for name in ("num_background", "steps", "num_positives"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mode not in ("paper", "official"):
            raise ValueError(f"mode must be 'paper' or 'official', got {self.mode!r}")
        if self.positives not in ("hard", "easy"):
            raise ValueError(f"positives must be 'hard' or 'easy', got {self.positives!r}")


class Objective(NamedTuple):
    """The losses of a batch and what they were made of; ids are -1 where there is nothing."""

    instance: Tensor  # (), batch mean
    invariance: Tensor  # (), batch mean
    reached: Tensor  # (B, W) ids of the positives; official mode: every walk's end, with repeats
    hard_positives: Tensor  # (B, P) ids of the chosen ones (the easy ones when so configured)
    nearest: Tensor  # (B, K+1) bank ids best first, for MemoryBank.refresh_neighbours


def objective(
    bank: MemoryBank, indices: Tensor, embeddings: Tensor, config: LossConfig
) -> Objective:
    """Compute both losses of a batch against the bank as it is before this step's update.

    Args:
        bank: N rows; not changed.
        indices: (B,) int64, the seat of each image in the bank.
        embeddings: (B, D) of unit length, with gradient; reduced precision is computed in float32.
        config: see `LossConfig`. M and P larger than what there is are lowered.

    Returns:
        losses whose gradient reaches `embeddings` only.
    """
    # Under autocast the similarities would be rounded to three digits before the exponential.
    with torch.autocast(embeddings.device.type, enabled=False):
        return _objective(bank, indices, embeddings.to(bank.embeddings.dtype), config)


def _objective(
    bank: MemoryBank, indices: Tensor, embeddings: Tensor, config: LossConfig
) -> Objective:
    rows = bank.embeddings
    with torch.no_grad():
        fresh = embeddings.detach()
        found = top_m(fresh, rows, config.num_background)
        reached = reach(bank.graph(), indices, config)  # (B, W)
        chosen, chosen_similarities = pick_positives(
            reached,
            similarities_to(fresh, rows, reached),
            config.num_positives,
            hardest=config.positives == "hard",
        )
        own_similarity = (fresh * rows[indices]).sum(dim=1, keepdim=True)
        # The last column is in no set: what is to be taken out and is not there writes to it.
        outside = torch.full_like(own_similarity, -torch.inf)
        seen = [own_similarity, chosen_similarities, found.similarities, outside]
        columns = [indices[:, None], chosen.clamp(min=0), found.ids, indices[:, None]]
    own, positives, top = _SimilarityToRows.apply(
        embeddings, rows, torch.cat(columns, dim=1), torch.cat(seen, dim=1)
    ).split([1, chosen.shape[1], found.ids.shape[1] + 1], dim=1)
    own, present = own[:, 0], chosen >= 0
    if config.mode == "paper":
        # N_M counts the anchor; it competes in L_ins once, as `own`, in N_M or not.
        place = places(found, torch.cat([indices[:, None], reached], dim=1))  # (B, 1 + W)
        backgrounds = (
            top.scatter(1, place[:, :1], -torch.inf),  # N_M - {i}
            top.scatter(1, place, -torch.inf),  # N_neg = N_M - {i} - N(i)
        )
    else:
        backgrounds = (top, top)
    instance, invariance = both_losses(own, positives, present, backgrounds, config)
    return Objective(instance, invariance, reached, chosen, nearest(found, bank.num_neighbours + 1))


def reach(graph: KnnGraph, indices: Tensor, config: LossConfig) -> Tensor:
    """(B,) -> (B, W) ids of what the mode counts as positives, -1 where there is nothing.

    Official mode: every walk's end, repeats and the anchor kept, see `all_walks`.
    """
    if config.mode == "paper":
        reached: Tensor = propagate(graph, indices, config.steps)
    else:
        reached = all_walks(graph, indices, config.steps).ids
    return reached


def both_losses(
    own: Tensor,
    positives: Tensor,
    present: Tensor,
    backgrounds: tuple[Tensor, Tensor],
    config: LossConfig,
) -> tuple[Tensor, Tensor]:
    """The instance and the invariance loss of the mode, each a batch mean.

    Args:
        own: (B,) similarities to the anchors' own rows.
        positives, present: (B, P) similarities to the chosen ones, and whether there is one.
        backgrounds: (B, M') similarities that each of the two losses compares with, -inf where
            there is none. In official mode the released code's top M, whatever they belong to.
    """
    instance, invariance = backgrounds
    temperature = config.temperature
    if config.mode == "paper":
        return (
            losses.instance_loss(own, instance, temperature),
            losses.invariance_loss(positives, present, invariance, temperature),
        )
    return (
        losses.official_instance_loss(own, instance, temperature),
        losses.official_invariance_loss(
            own, positives, present, invariance, temperature, exclusive=config.exclusive
        ),
    )


def similarities_to(queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """(B, D), (N, D), (B, W) -> (B, W) inner products; -1 reads row 0 and is masked later."""
    gathered = rows.index_select(0, ids.clamp(min=0).flatten()).view(*ids.shape, -1)  # (B, W, D)
    return torch.bmm(gathered, queries[:, :, None])[:, :, 0]


class _SimilarityToRows(torch.autograd.Function):
    """Similarities, known already, as a function of the queries: the gradient is a sum of rows."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, rows: Tensor, columns: Tensor, known: Tensor) -> Tensor:
        """(B, D), (N, D), (B, C) ids of rows, (B, C) similarities to them -> the same (B, C)."""
        ctx.save_for_backward(rows, columns)
        return known

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """(B, C) -> (B, D)."""
        rows, columns = ctx.saved_tensors
        weights = gradients[0].to(rows.dtype)
        total = nn.functional.embedding_bag(columns, rows, per_sample_weights=weights, mode="sum")
        return total, None, None, None
