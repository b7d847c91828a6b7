"""The objective of a batch against a memory bank that is divided among ranks.

In: this rank's rows, the whole graph, this rank's share of the embeddings. Out: what
`trainer.objective` gives for the joined batch against the whole bank, on every rank. All ranks call
it together and talk through the `Exchange` they are given; nothing is changed and nothing drawn.

Each rank compares the embeddings of all with its own rows. The losses need of the M nearest only
sums, so no row and no list of the M nearest ever travels: what does is, in bytes a step for B
embeddings of the joined batch, R ranks and W positives within reach,

    embeddings, their gradient  8 B D                  similarities of positives    4 B (1 + W)
    threshold of the M nearest  8 B x 8 x 4            sums of both sets            8 B R
    the K + 1 nearest           4 B (K + 1) (R + 2)    ties at the threshold        4 B R

3.92 MB for B = 2048, D = 128, M = 4096, R = 8, K = 4, W = 84 (counted by
tests/benchmarks/sharded_bank.py); each is the size of what all hold afterwards. A rank holds
B x min(M, N / R) candidates.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from trainer.objective import LossConfig, Objective, both_losses, reach, similarities_to
from trainer.representation.propagation import pick_positives
from trainer.search import TopM, nearest, places, top_m
from trainer.sharded_bank import BankShard
from trainer.threshold import (
    BOUNDS,
    SHIFTS,
    Bracket,
    among_largest,
    ascending,
    counts_of_round,
    everywhere,
    narrowed,
    order_keys,
    packed,
    ties_taken,
    unpacked,
)


class Exchange(Protocol):
    """What ranks say to each other in a step; `trainer.distributed.Ranks` is one."""

    @property
    def rank(self) -> int:
        """Which of them this process is."""

    @property
    def size(self) -> int:
        """How many there are."""

    def joined(self, *parts: Tensor) -> list[Tensor]:
        """For each (b, ...) the (size * b, ...) of all ranks in their order."""

    def summed(self, own: Tensor) -> Tensor:
        """The sum of all ranks' tensors, the same on every rank."""

    def share_of_sum(self, own: Tensor) -> Tensor:
        """(size * b, ...) -> (b, ...) this rank's part of the sum of all ranks' tensors."""


class JoinedObjective(NamedTuple):
    """The objective of the joined batch, equal on all ranks, and the batch itself."""

    found: Objective  # of all B anchors
    embeddings: Tensor  # (B, D) without gradient


def sharded_objective(
    bank: BankShard, indices: Tensor, embeddings: Tensor, config: LossConfig, ranks: Exchange
) -> JoinedObjective:
    """Compute both losses of the joined batch against the bank before this step's update.

    Args:
        bank: the rows of this rank.
        indices: (B,) int64 of the joined batch; B is a multiple of the number of ranks.
        embeddings: (b, D) this rank's share, of unit length, with gradient; computed in float32.
        config: as in `objective`.

    Returns:
        losses that are means over the joined batch. Their gradient reaches this rank's
        `embeddings`, R times as large: as if each rank's loss were a mean over its own share, for
        the network takes the mean of the ranks' gradients.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        return _objective(bank, indices, embeddings.to(bank.embeddings.dtype), config, ranks)


def _objective(
    bank: BankShard, indices: Tensor, embeddings: Tensor, config: LossConfig, ranks: Exchange
) -> JoinedObjective:
    rows, first = bank.embeddings, bank.held.start
    temperature = config.temperature
    with torch.no_grad():
        (queries,) = ranks.joined(embeddings)  # (B, D)
        reached = reach(bank.graph(), indices, config)  # (B, W)
        wanted = torch.cat([indices[:, None], reached], dim=1)  # (B, 1 + W)
        here = (wanted >= first) & (wanted < bank.held.stop)
        place = torch.where(here, wanted - first, -1)  # among the rows of this rank
        # Of each similarity all ranks but the row's owner add 0: nothing is rounded.
        known = ranks.summed(similarities_to(queries, rows, place).masked_fill(~here, 0.0))
        own_similarity, similarities = known[:, :1], known[:, 1:]
        chosen, chosen_similarities = pick_positives(
            reached, similarities, config.num_positives, hardest=config.positives == "hard"
        )

        found = top_m(queries, rows, config.num_background)
        members, neighbours = among_whole_bank(found, bank, config.num_background, ranks)
        # One column more, which is in no set: what is not among the found is taken out there.
        logits = found.similarities.new_full((len(queries), found.ids.shape[1] + 1), -torch.inf)
        logits[:, :-1] = torch.where(members, found.similarities / temperature, -torch.inf)
        columns = places(found, place)  # (B, 1 + W)
        if config.mode == "paper":
            logits.scatter_(1, columns[:, :1], -torch.inf)  # N_M - {i}
            sets = [logits, logits.scatter(1, columns, -torch.inf)]  # N_neg = N_M - {i} - N(i)
        else:
            sets = [logits]
        exponentials = [scaled_exponentials(each) for each in sets]
        sums = torch.stack([each.log_sum for each in exponentials], dim=1)  # (B, S)
        # In the order of the ranks, whatever the exchange: the same bits on all.
        sums = ranks.joined(sums[None])[0].logsumexp(dim=0)
        shares = [(each.values, each.share_of(sums[:, i])) for i, each in enumerate(exponentials)]
        mine = (chosen >= first) & (chosen < bank.held.stop)
        direct = torch.cat([place[:, :1], torch.where(mine, chosen - first, -1)], dim=1)
        seen = torch.cat([own_similarity, chosen_similarities, temperature * sums], dim=1)
    own, positives, background = _SimilarityToShards.apply(
        embeddings, seen, (rows, direct, found.ids), shares, ranks
    ).split([1, chosen.shape[1], len(sets)], dim=1)
    # A set of rows competes like one row whose exponential is their sum.
    instance, invariance = both_losses(
        own[:, 0],
        positives,
        chosen >= 0,
        (background[:, :1], background[:, -1:]),
        config,
    )
    return JoinedObjective(Objective(instance, invariance, reached, chosen, neighbours), queries)


def among_whole_bank(
    found: TopM, bank: BankShard, num_background: int, ranks: Exchange
) -> tuple[Tensor, Tensor]:
    """Compare what each rank found among its own rows.

    Args:
        found: the M nearest of this rank's rows, by their places there.
        num_background: M.

    Returns:
        (B, m) bool, which of the found are among the M nearest of all; (B, K+1) the nearest ids of
        all, on every rank.
    """
    wanted = min(num_background, bank.num_images)
    keys = order_keys(found.similarities)
    bracket = _threshold(keys, wanted, ranks)
    ties = (keys == bracket.low[:, None]).sum(dim=1, dtype=torch.int32)
    count = bank.num_neighbours + 1
    ids = nearest(found, count)  # (B, K+1) places among the rows of this rank
    columns = places(found, ids)
    none = found.similarities.new_full((len(ids), 1), -torch.inf)
    best = torch.cat([found.similarities, none], dim=1).gather(1, columns)
    all_ties, all_best = ranks.joined(ties[None], best[None] + 0.0)  # no -0.0, see order_keys
    taken = ties_taken(all_ties, bracket.above, ranks.rank, wanted)
    members = among_largest(keys, bracket.low, taken)

    rank, place = best_of_all(all_best, min(count, wanted))
    picked = ids.gather(1, place)
    own = torch.where((rank == ranks.rank) & (picked >= 0), picked + bank.held.start + 1, 0)
    neighbours = nn.functional.pad(own, (0, count - own.shape[1]))  # fewer than K+1 are wanted
    return members, ranks.summed(neighbours) - 1


class Exponentials(NamedTuple):
    """exp(logits) of a rank's part of a set, so scaled that the largest is 1."""

    values: Tensor  # (B, m), 0 where there is none
    log_scale: Tensor  # (B,) finite
    log_sum: Tensor  # (B,) of the unscaled ones, -inf for none

    def share_of(self, total: Tensor) -> Tensor:
        """(B,) log of the sum over all ranks -> (B,) what `values` are to be multiplied with.

        The products are the weights of the rows in the gradient of `total`.
        """
        return (self.log_scale - _finite(total)).exp()


def scaled_exponentials(logits: Tensor) -> Exponentials:
    """(B, m) logits, -inf for none -> their exponentials."""
    largest = _finite(logits.amax(dim=1))
    values = (logits - largest[:, None]).exp_()
    return Exponentials(values, largest, values.sum(dim=1).log() + largest)


def best_of_all(similarities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which of the ranks' best are the best of all.

    Args:
        similarities: (R, B, C) each rank's, best first and of equals the lowest id first, -inf
            where there are fewer; the ranks' ids are in their order.
        count: how many; at most R C.

    Returns:
        (B, count) the rank, and its place 0..C-1 there; of equals the lowest id first.
    """
    ranks, batch, width = similarities.shape
    lines = similarities.transpose(0, 1).reshape(batch, ranks * width)
    order = lines.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return order // width, order % width


def _threshold(keys: Tensor, wanted: int, ranks: Exchange) -> Bracket:
    """The key that `wanted` keys of all ranks reach, for each of B queries."""
    lists = ascending(keys)
    bracket = everywhere(len(keys), keys.device)
    most = ranks.size * wanted  # a rank finds no more than M of its rows
    for shift in SHIFTS:
        words = ranks.summed(packed(counts_of_round(lists, bracket, shift), most))
        bracket = narrowed(bracket, unpacked(words, BOUNDS, most), shift, wanted)
    return bracket


def _finite(values: Tensor) -> Tensor:
    """0 in place of -inf, the log of an empty sum."""
    return torch.where(values == -torch.inf, 0.0, values)


class _SimilarityToShards(torch.autograd.Function):
    """Similarities of the joined batch, known already, as a function of a rank's own embeddings.

    The gradient is a sum of rows: each rank adds up its own ones for all embeddings, and gets the
    sum of all ranks for its own embeddings.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        known: Tensor,
        looked_at: tuple[Tensor, Tensor, Tensor],
        shares: list[tuple[Tensor, Tensor]],
        ranks: Exchange,
    ) -> Tensor:
        """Give `known` back.

        Args:
            embeddings: (b, D).
            known: (B, 1 + P + S) similarities to single rows, and to S sets of rows.
            looked_at: (H, D) rows, (B, 1 + P) single ones among them, (B, m) members of the sets.
            shares: for each set (B, m + 1) exponentials and (B,) their scale.
        """
        ctx.save_for_backward(*looked_at, *(each for pair in shares for each in pair))
        ctx.ranks = ranks
        return known

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        """(B, 1 + P + S) -> (b, D)."""
        rows, direct, members, *shares = ctx.saved_tensors
        gradient = gradients[0].to(rows.dtype)
        width = direct.shape[1]
        total = _weighted_sums(
            rows, direct.clamp(min=0), torch.where(direct >= 0, gradient[:, :width], 0.0)
        )
        weights = torch.zeros(members.shape, dtype=rows.dtype, device=rows.device)
        for i, (values, scale) in enumerate(zip(shares[::2], shares[1::2], strict=True)):
            weights.addcmul_(values[:, :-1], (gradient[:, width + i] * scale)[:, None])
        total += _weighted_sums(rows, members, weights)
        return ctx.ranks.share_of_sum(total) * ctx.ranks.size, None, None, None, None


def _weighted_sums(rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """(H, D), (B, C) and (B, C) -> (B, D)."""
    return nn.functional.embedding_bag(ids, rows, per_sample_weights=weights, mode="sum")
