"""What the propagation looks like at an epoch, on a sample of anchors that never changes.

In: encoder, bank and graph as they are, and the un-augmented images of the anchors, as the service
would see them. Out: whom each anchor reaches, which of these are chosen, how similar they are;
figures and histograms of that. Nothing is changed and nothing is drawn from a global generator.

Cost: one forward pass without gradient and two scans of the bank for each anchor, of at most 1 in
`IMAGES_PER_ANCHOR` of the images: 4 to 6 % of an epoch on a CPU, tests/benchmarks/inspection.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import MonitorConfig
from trainer.datasets import ImageSource
from trainer.decode_pool import DecodePool
from trainer.decoding import prepare_all
from trainer.distributed import ALONE, Ranks
from trainer.encoder import Encoder, embed_images
from trainer.memory_bank import MemoryBank
from trainer.objective import LossConfig, objective, similarities_to
from trainer.representation.preprocess import InputContract
from trainer.representation.propagation import propagate_paths
from trainer.search import places, top_m
from trainer.sharded_bank import BankShard
from trainer.sharded_objective import Exchange, among_whole_bank, sharded_objective

IMAGES_PER_ANCHOR = 8  # bounds the cost on small sets ...
FEW_ANCHORS = 64  # ... unless that leaves fewer than these, which cost next to nothing
LOOKED_AT_TOGETHER = 64  # anchors in one pass
BINS = 50  # of a histogram, from similarity -1 to 1: 0.04 each
_STREAM = 3  # of random numbers that one seed feeds; trainer.schedule has the others


@dataclass(frozen=True)
class Inspection:
    """What was seen at A anchors; W is the most that one can reach, -1 and False past the last.

    Repeats and the anchor itself, which official mode keeps, are left out here in both modes.
    """

    anchors: NDArray[np.int64]  # (A,) seats in the bank, in the order in which they were drawn
    reached: NDArray[np.int64]  # (A, W) their positives, in order of discovery
    hops: NDArray[np.int64]  # (A, W) 1..steps
    similarities: NDArray[np.float32]  # (A, W) to the anchor's embedding; 0 past the last
    chosen: NDArray[np.bool_]  # (A, W) which of them the invariance loss pulls in
    in_top: NDArray[np.bool_]  # (A, W) which of them are among the M nearest of the anchor
    background: NDArray[np.int64]  # (A, BINS) similarities of the M nearest but for these
    background_sum: NDArray[np.float64]  # (A,) of these similarities

    def figures(
        self, labels: NDArray[np.int64] | None, *, hardest_chosen: bool = True
    ) -> dict[str, float]:
        """Scalars for the journal; what there is nothing of is left out.

        Args:
            labels: (N,) classes of all training images; None where there are none.
            hardest_chosen: False where the easy positives are the chosen ones.
        """
        negatives = int(self.background.sum())
        easy, hard = self._easy_and_hard(hardest_chosen)
        values: dict[str, float | None] = {
            "inspected": len(self.anchors),
            "positives_in_top": _mean(self.in_top[self.chosen]),
            "no_background": _mean(self.background.sum(axis=1) == 0),
            "similarity_easy": _mean(self.similarities[easy]),
            "similarity_hard": _mean(self.similarities[hard]),
            "similarity_background": (
                float(self.background_sum.sum()) / negatives if negatives else None
            ),
        }
        if labels is not None:
            same = self.same_label(labels)
            classes = np.bincount(labels)[labels[self.anchors]]
            values["purity_reached"] = _mean(same[self.reached >= 0])
            values["purity_chosen"] = _mean(same[self.chosen])
            for hop in range(1, int(self.hops.max(initial=0)) + 1):
                values[f"purity_hop_{hop}"] = _mean(same[self.hops == hop])
            values["purity_chance"] = _mean((classes - 1) / (len(labels) - 1))
        return {name: value for name, value in values.items() if value is not None}

    def histograms(self, *, hardest_chosen: bool = True) -> dict[str, list[int]]:
        """Counts of similarities in `BINS` equal bins of [-1, 1]; the last one holds 1 too."""
        easy, hard = self._easy_and_hard(hardest_chosen)
        return {
            "easy": np.bincount(bins(self.similarities[easy]), minlength=BINS).tolist(),
            "hard": np.bincount(bins(self.similarities[hard]), minlength=BINS).tolist(),
            "background": self.background.sum(axis=0).tolist(),
        }

    def same_label(self, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(A, W): whether a positive is of its anchor's class; False past the last."""
        same: NDArray[np.bool_] = labels[self.reached] == labels[self.anchors][:, None]
        return same & (self.reached >= 0)  # -1 read the last label

    def _easy_and_hard(self, hardest_chosen: bool) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        rest = (self.reached >= 0) & ~self.chosen
        return (rest, self.chosen) if hardest_chosen else (self.chosen, rest)


@dataclass(frozen=True)
class Inspector:
    """Looks at the same A anchors again and again; every rank calls it, each takes a share."""

    anchors: NDArray[np.int64]  # (A,)
    images: NDArray[np.uint8]  # (a, S, S, 3) of this rank's share, see `rank_anchors`
    train: ImageSource  # all N training images
    config: LossConfig
    ranks: Ranks = ALONE

    def inspect(self, encoder: Encoder, bank: MemoryBank, device: torch.device) -> Inspection:
        """Embed the anchors in evaluation mode and propagate from them.

        Raises:
            ValueError: an embedding that is no number; on every rank.
        """
        # Running statistics of a share of each batch differ between the ranks.
        self.ranks.copy_from_first(list(encoder.buffers()))
        own = rank_anchors(self.anchors, self.ranks)
        parts = [
            range(first, min(first + LOOKED_AT_TOGETHER, len(own)))
            for first in range(0, len(own), LOOKED_AT_TOGETHER)
        ]
        embedded = embed_images(encoder, (self.images[part] for part in parts), device)[1]
        finite = bool(np.isfinite(embedded).all())
        if not all(self.ranks.gathered(finite)):
            raise ValueError("the encoder gives embeddings that are no numbers")
        seen = [
            look(
                bank,
                torch.from_numpy(own[part]).to(device),
                torch.from_numpy(embedded[part]).to(device),
                self.config,
                self.ranks,
            )
            for part in parts
        ]
        everywhere = [each for share in self.ranks.gathered(seen) for each in share]
        return _joined(everywhere, len(self.anchors))


def build_inspector(
    train: ImageSource,
    config: MonitorConfig,
    loss: LossConfig,
    contract: InputContract,
    pool: DecodePool,
    *,
    seed: int,
    ranks: Ranks = ALONE,
) -> Inspector | None:
    """Draw the anchors and prepare this rank's share of their images.

    Returns:
        None where `config.max_anchors` is 0.
    """
    count = min(config.max_anchors, max(FEW_ANCHORS, len(train) // IMAGES_PER_ANCHOR))
    if count == 0:
        return None
    anchors = np.random.default_rng([seed, _STREAM]).permutation(len(train))[:count]
    images = prepare_all(train.subset(rank_anchors(anchors, ranks)), contract, pool)
    return Inspector(anchors, images, train, loss, ranks)


def rank_anchors(anchors: NDArray[np.int64], ranks: Ranks) -> NDArray[np.int64]:
    """(A,) -> (a,): the share of this rank, as many on each; the last anchor fills up."""
    each = -(-len(anchors) // ranks.size)
    filled = np.concatenate([anchors, np.repeat(anchors[-1:], each * ranks.size - len(anchors))])
    return filled[ranks.rank * each :][:each]


@torch.no_grad()
def look(
    bank: MemoryBank,
    anchors: Tensor,
    embeddings: Tensor,
    config: LossConfig,
    ranks: Exchange = ALONE,
) -> Inspection:
    """Propagate from some anchors with the code that trains, and look around.

    Args:
        bank: not changed.
        anchors: (B,) int64 seats.
        embeddings: (B, D) float32 of unit length, their images' now.
        ranks: a divided bank is looked at together, by as many anchors on each rank.
    """
    if isinstance(bank, BankShard):
        return _look_together(bank, anchors, embeddings, config, ranks)
    paths = propagate_paths(bank.graph(), anchors, config.steps)
    chosen = objective(bank, anchors, embeddings, config).hard_positives  # (B, P)
    there = paths.ids >= 0
    picked = there & (paths.ids[:, :, None] == chosen[:, None, :]).any(dim=2)  # (B, W)
    rows = bank.embeddings[paths.ids.clamp(min=0)]  # (B, W, D)
    similarities = torch.where(there, (rows @ embeddings[:, :, None])[:, :, 0], 0.0)
    found = top_m(embeddings, bank.embeddings, config.num_background)
    width = found.ids.shape[1]
    place = places(found, torch.cat([anchors[:, None], paths.ids], dim=1))  # (B, 1 + W)
    # N_neg of the paper: the M nearest, but for the anchor and all that it reaches.
    kept = torch.ones(len(anchors), width + 1, dtype=torch.bool, device=anchors.device)
    negative = kept.scatter(1, place, False)[:, :width].cpu().numpy()
    around = found.similarities.cpu().numpy()
    return Inspection(
        anchors=anchors.cpu().numpy(),
        reached=paths.ids.cpu().numpy(),
        hops=paths.steps.cpu().numpy(),
        similarities=similarities.cpu().numpy(),
        chosen=picked.cpu().numpy(),
        in_top=(there & (place[:, 1:] < width)).cpu().numpy(),
        background=np.stack(list(_counts(around, negative))),
        background_sum=np.where(negative, around, 0).sum(axis=1, dtype=np.float64),
    )


def _look_together(
    bank: BankShard, anchors: Tensor, embeddings: Tensor, config: LossConfig, ranks: Exchange
) -> Inspection:
    """What `look` says of this rank's anchors; each rank asks its own rows, for those of all."""
    everyone, queries = ranks.joined(anchors, embeddings)
    paths = propagate_paths(bank.graph(), everyone, config.steps)
    chosen = sharded_objective(bank, everyone, embeddings, config, ranks).found.hard_positives
    there = paths.ids >= 0
    picked = there & (paths.ids[:, :, None] == chosen[:, None, :]).any(dim=2)  # (B, W)
    ids = torch.cat([everyone[:, None], paths.ids], dim=1)  # (B, 1 + W)
    here = (ids >= bank.held.start) & (ids < bank.held.stop)
    ids = torch.where(here, ids - bank.held.start, -1)
    known = ranks.summed(similarities_to(queries, bank.embeddings, ids).masked_fill(~here, 0.0))
    found = top_m(queries, bank.embeddings, config.num_background)
    members, _ = among_whole_bank(found, bank, config.num_background, ranks)
    place = places(found, ids)
    member = torch.nn.functional.pad(members, (0, 1))  # none past the end
    in_top = ranks.summed(member.gather(1, place[:, 1:]).int()) > 0
    negative = member.scatter(1, place, False)[:, :-1].cpu().numpy()
    around = found.similarities.cpu().numpy()
    counts = torch.from_numpy(np.stack(list(_counts(around, negative)))).to(queries.device)
    sums = torch.from_numpy(np.where(negative, around, 0).sum(axis=1, dtype=np.float64))
    background, total = ranks.summed(counts), ranks.summed(sums.to(queries.device))
    own = slice(len(anchors) * ranks.rank, len(anchors) * (ranks.rank + 1))
    return Inspection(
        anchors=anchors.cpu().numpy(),
        reached=paths.ids[own].cpu().numpy(),
        hops=paths.steps[own].cpu().numpy(),
        similarities=known[own, 1:].cpu().numpy(),
        chosen=picked[own].cpu().numpy(),
        in_top=in_top[own].cpu().numpy(),
        background=background[own].cpu().numpy(),
        background_sum=total[own].cpu().numpy(),
    )


def bins(similarities: NDArray[np.floating]) -> NDArray[np.int64]:
    """The bin of each similarity: the first begins at -1, the last ends at 1, rounding included."""
    places: NDArray[np.int64] = np.floor((similarities + 1) * (BINS / 2)).astype(np.int64)
    return places.clip(0, BINS - 1)


def _counts(
    similarities: NDArray[np.float32], counted: NDArray[np.bool_]
) -> Iterator[NDArray[np.int64]]:
    for line, mask in zip(bins(similarities), counted, strict=True):
        yield np.bincount(line[mask], minlength=BINS)


def _joined(parts: list[Inspection], count: int) -> Inspection:
    """One inspection of the first `count` anchors of all parts; what filled up comes last."""
    return Inspection(
        **{
            field.name: np.concatenate([getattr(part, field.name) for part in parts])[:count]
            for field in fields(Inspection)
        }
    )


def _mean(values: NDArray[np.generic]) -> float | None:
    return float(values.astype(np.float64).mean()) if values.size else None
