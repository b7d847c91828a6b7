"""The counted threshold against sorting everything: ranks, ties, signs, extremes."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from trainer import threshold
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


def select(shards: list[Tensor], wanted: int) -> Bracket:
    """What the ranks do together, one after the other: each has a list (B, m_r) of keys."""
    lists = [ascending(keys) for keys in shards]
    bracket = everywhere(len(shards[0]), torch.device("cpu"))
    for shift in SHIFTS:
        counts = [counts_of_round(keys, bracket, shift) for keys in lists]
        bracket = narrowed(bracket, torch.stack(counts).sum(dim=0), shift, wanted)
    return bracket


def numbers(seed: int, *, tied: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if tied:
        return torch.randint(-2, 3, (4, 57), generator=generator).float() / 2
    return torch.randn(4, 57, generator=generator)


def test_order_keys__keep_the_order_of_the_numbers() -> None:
    values = [-torch.inf, -2.0, -1.0, -1e-40, 0.0, 1e-40, 0.5, 1.0, 3e38, torch.inf]
    keys = order_keys(torch.tensor(values))
    assert (keys[1:] > keys[:-1]).all()
    assert order_keys(torch.tensor([-0.0])) == order_keys(torch.tensor([0.0]))
    drawn = torch.randn(1000)
    assert torch.equal(order_keys(drawn).argsort(), drawn.argsort())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cuts", [[], [20], [1, 30], [10, 11, 40]])  # 1 to 4 ranks
def test_selection__equals_a_full_sort(cuts: list[int], tied: bool) -> None:
    edges = [0, *cuts, 57]
    for seed in range(5):
        values = numbers(seed, tied=tied)
        shards = [order_keys(values[:, a:b]) for a, b in pairwise(edges)]
        for wanted in (1, 2, 19, 40, 57):
            bracket = select(shards, wanted)
            ranked = values.sort(dim=1, descending=True, stable=True)  # lowest places first
            assert torch.equal(bracket.low, order_keys(ranked.values[:, wanted - 1]))
            past = (values > ranked.values[:, wanted - 1 : wanted]).sum(dim=1)
            assert torch.equal(bracket.above, past)
            ties = torch.stack([(keys == bracket.low[:, None]).sum(dim=1) for keys in shards])
            chosen = [
                among_largest(keys, bracket.low, ties_taken(ties, bracket.above, rank, wanted))
                for rank, keys in enumerate(shards)
            ]
            wanted_places = torch.zeros(4, 57, dtype=torch.bool)
            wanted_places.scatter_(1, ranked.indices[:, :wanted], True)
            assert torch.equal(torch.cat(chosen, dim=1), wanted_places)


def test_selection__of_extreme_numbers() -> None:
    values = torch.tensor([[torch.inf, -torch.inf, 3e38, -3e38]])
    keys = order_keys(values)
    found = [int(select([keys[:, :2], keys[:, 2:]], wanted).low[0]) for wanted in (1, 2, 3, 4)]
    assert found == order_keys(torch.tensor([torch.inf, 3e38, -3e38, -torch.inf])).tolist()
    least = torch.tensor([[-(2**31), 2**31 - 1]], dtype=torch.int32)
    assert int(select([least], 2).low) == -(2**31)
    assert int(select([least], 1).low) == 2**31 - 1


@pytest.mark.parametrize(("ranks", "most"), [(8, 4096), (3, 4096), (2, 1), (16, 2**20), (1, 2**40)])
def test_packed__summing_words_sums_counts(ranks: int, most: int) -> None:
    generator = torch.Generator().manual_seed(ranks)
    each = torch.randint(0, most + 1, (ranks, 5, BOUNDS), generator=generator)
    each[:, 0] = most  # all fields full, the uppermost one too
    words = torch.stack([packed(counts, ranks * most) for counts in each])
    assert torch.equal(unpacked(words.sum(dim=0), BOUNDS, ranks * most), each.sum(dim=0))


def test_packed__eight_ranks_of_4096_take_four_bytes_less_than_half() -> None:
    words = packed(torch.zeros(1, BOUNDS, dtype=torch.int64), 8 * 4096)
    assert words.numel() * 8 == 32  # 16 fields of 16 bits


def test_ties_taken__lowest_ranks_first() -> None:
    ties = torch.tensor([[2, 0, 5], [3, 1, 5], [1, 4, 5]])
    above = torch.tensor([6, 8, 9])  # of 10 wanted: 4, 2 and 1 ties have room
    each = [ties_taken(ties, above, rank, 10).tolist() for rank in range(3)]
    assert each == [[2, 0, 1], [2, 1, 0], [0, 1, 0]]


def test_ascending__the_path_of_other_devices_agrees() -> None:
    keys = order_keys(numbers(3, tied=True))
    assert torch.equal(ascending(keys), keys.sort(dim=1).values)
    assert threshold.SHIFTS == (28, 24, 20, 16, 12, 8, 4, 0)
