"""A divided bank against the whole one: the same losses, gradients and ids, whatever the ranks."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.reference.threads import Threads, together
from trainer.memory_bank import MemoryBank
from trainer.objective import LossConfig, Objective, objective
from trainer.sharded_bank import BankShard
from trainer.sharded_objective import best_of_all, scaled_exponentials, sharded_objective

BATCH, DIM, K = 12, 5, 3
BOTH = 0.6  # weight of the invariance loss in the gradients that are compared
CONFIG = LossConfig(temperature=0.2, num_background=17, steps=2, num_positives=4)


class Case(NamedTuple):
    bank: MemoryBank
    indices: Tensor
    fresh: Tensor


def case(seed: int, *, num_images: int, tied: bool = False, gaps: float = 0.1) -> Case:
    """A bank with an arbitrary graph (self-loops, repeats and -1 included) and a batch."""
    generator = torch.Generator().manual_seed(seed)
    bank = MemoryBank(num_images, DIM, K, generator=generator)
    graph = torch.randint(0, num_images, (num_images, K), generator=generator)
    graph[torch.rand(num_images, K, generator=generator) < gaps] = -1
    bank.neighbours.copy_(graph)
    fresh = torch.nn.functional.normalize(torch.randn(BATCH, DIM, generator=generator), dim=1)
    if tied:  # multiples of a half: many equal products, zeros of both signs, all exact in float32
        bank.embeddings.copy_(torch.randint(-1, 2, (num_images, DIM), generator=generator) / 2)
        fresh = torch.randint(-1, 2, (BATCH, DIM), generator=generator) / 2
    indices = torch.randperm(num_images, generator=generator)[:BATCH]
    if len(indices) < BATCH:  # repeated indices too
        indices = torch.randint(0, num_images, (BATCH,), generator=generator)
    return Case(bank, indices, fresh)


def shard(bank: MemoryBank, rank: int, size: int) -> BankShard:
    count = bank.num_images
    held = range(count * rank // size, count * (rank + 1) // size)
    own = BankShard(count, DIM, bank.num_neighbours, held=held)
    own.embeddings.copy_(bank.embeddings[held.start : held.stop])
    own.neighbours.copy_(bank.neighbours)
    return own


class Result(NamedTuple):
    found: Objective
    gradient: Tensor  # (B, D) of both losses, joined
    instance_gradient: Tensor


def whole(given: Case, config: LossConfig) -> Result:
    gradients = []
    for weight in (BOTH, 0.0):
        fresh = given.fresh.clone().requires_grad_()
        found = objective(given.bank, given.indices, fresh, config)
        (found.instance + weight * found.invariance).backward()
        gradients.append(fresh.grad)
    return Result(found, *gradients)


def divided(given: Case, config: LossConfig, size: int) -> list[Result]:
    def one(ranks: Threads) -> tuple[Objective, list[Tensor]]:
        own = shard(given.bank, ranks.rank, size)
        gradients = []
        for weight in (BOTH, 0.0):
            share = given.fresh.chunk(size)[ranks.rank].clone().requires_grad_()
            found, joined = sharded_objective(own, given.indices, share, config, ranks)
            assert torch.equal(joined, given.fresh)
            assert not joined.requires_grad
            (found.instance + weight * found.invariance).backward()
            assert share.grad is not None
            gradients.append(share.grad / size)  # the network's wrapper takes the mean over ranks
        return found, gradients

    each = together(size, one)
    gradients = [torch.cat([own[i] for _, own in each]) for i in range(2)]
    return [Result(found, *gradients) for found, _ in each]


def compare(given: Case, config: LossConfig, size: int) -> None:
    wanted = whole(given, config)
    for found in divided(given, config, size):
        for name in ("instance", "invariance"):
            torch.testing.assert_close(
                getattr(found.found, name), getattr(wanted.found, name), rtol=1e-5, atol=1e-5
            )
        for name in ("reached", "hard_positives", "nearest"):
            assert torch.equal(getattr(found.found, name), getattr(wanted.found, name)), name
        for name in ("gradient", "instance_gradient"):
            off = (getattr(found, name) - getattr(wanted, name)).norm()
            assert off <= 1e-4 * getattr(wanted, name).norm() + 1e-6, name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", ["paper", "official"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sharded__equals_the_whole_bank(size: int, mode: Any, tied: bool) -> None:
    for seed in range(3):
        compare(case(seed, num_images=50, tied=tied), replace(CONFIG, mode=mode), size)


@pytest.mark.parametrize("mode", ["paper", "official"])
@pytest.mark.parametrize(
    ("num_images", "gaps", "changes"),
    [
        (50, 0.0, {"positives": "easy"}),
        (50, 0.0, {"exclusive": False}),
        (50, 0.0, {"num_background": 300}),  # more than there are images: all of them
        (50, 0.0, {"num_background": 20}),  # more than a rank holds
        (50, 0.0, {"num_background": 2}),  # fewer than K + 1
        (50, 0.0, {"num_positives": 40}),  # more than can be reached
        (9, 0.0, {"num_background": 8}),  # a rank holds fewer than K + 1; repeated indices
        (12, 0.0, {"num_background": 6, "steps": 4}),  # hardly a negative is left
        (50, 0.8, {}),  # most walks break off
        (50, 1.0, {}),  # nothing is known yet
    ],
)
def test_sharded__equals_the_whole_bank_at_the_edges(
    num_images: int, gaps: float, changes: dict[str, Any], mode: Any
) -> None:
    for seed, tied in ((5, False), (6, True)):
        given = case(seed, num_images=num_images, gaps=gaps, tied=tied)
        compare(given, replace(CONFIG, mode=mode, **changes), 4)


def test_sharded__a_set_that_is_empty_gives_no_gradient() -> None:
    given = case(0, num_images=9, gaps=0.0)
    given.bank.neighbours.copy_((torch.arange(9)[:, None] + torch.arange(1, 4)) % 9)
    config = replace(CONFIG, num_background=9, steps=3, num_positives=9)
    results = divided(given, config, 3)
    assert results[0].found.invariance.item() == pytest.approx(0, abs=1e-7)
    torch.testing.assert_close(results[0].gradient, results[0].instance_gradient)


def test_sharded__small_temperature_is_finite() -> None:
    given = case(1, num_images=50)
    for mode in ("paper", "official"):
        compare(given, replace(CONFIG, mode=mode, temperature=0.07), 2)  # type: ignore[arg-type]
    (found, *_) = divided(given, replace(CONFIG, temperature=0.005), 2)
    assert found.gradient.isfinite().all()


def test_sharded__ranks_get_the_same_to_the_last_bit() -> None:
    first, *others = divided(case(2, num_images=50), CONFIG, 4)
    for other in others:
        for one, another in zip(first.found, other.found, strict=True):
            assert torch.equal(one, another)


def test_sharded__reduced_precision_is_computed_in_float32() -> None:
    given = case(3, num_images=50)
    half = given.fresh.to(torch.bfloat16)

    def one(ranks: Threads) -> Objective:
        share = half.chunk(2)[ranks.rank]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            own = shard(given.bank, ranks.rank, 2)
            return sharded_objective(own, given.indices, share, CONFIG, ranks).found

    exact = objective(given.bank, given.indices, half.float(), CONFIG)
    for found in together(2, one):
        torch.testing.assert_close(found.instance, exact.instance)
        assert torch.equal(found.nearest, exact.nearest)


def test_sharded__bytes_are_those_of_the_docstring() -> None:
    given = case(4, num_images=50)

    def one(ranks: Threads) -> tuple[int, int]:
        share = given.fresh.chunk(4)[ranks.rank].clone().requires_grad_()
        found, _ = sharded_objective(
            shard(given.bank, ranks.rank, 4), *given[1:2], share, CONFIG, ranks
        )
        (found.instance + found.invariance).backward()
        return sum(ranks.payload.values()), sum(ranks.calls.values())

    width, ranks = K + K**2, 4
    counts = 8 * 8 * 2  # 8 rounds of 15 counts up to 4 x 17, 9 of them in a word
    each = 8 * DIM + 4 * (1 + width) + counts + 8 * ranks + 4 * (K + 1) * (ranks + 2) + 4 * ranks
    assert together(4, one) == [(BATCH * each, 14)] * 4


def test_scaled_exponentials__of_parts_give_the_weights_in_the_whole() -> None:
    logits = torch.tensor([[0.0, 400.0, -torch.inf, 399.0], [-torch.inf] * 4, [-500.0, 1, 2, 3]])
    parts = [scaled_exponentials(logits[:, :2]), scaled_exponentials(logits[:, 2:])]
    total = torch.stack([each.log_sum for each in parts]).logsumexp(dim=0)
    torch.testing.assert_close(total, logits.logsumexp(dim=1))
    weights = [each.values * each.share_of(total)[:, None] for each in parts]
    wanted = logits.softmax(dim=1).nan_to_num(0.0)  # nothing in a set that is empty
    torch.testing.assert_close(torch.cat(weights, dim=1), wanted)


def test_best_of_all__of_equals_the_lowest_rank_and_place() -> None:
    similarities = torch.tensor([[[0.9, 0.5]], [[0.9, 0.8]], [[0.5, -torch.inf]]])
    rank, place = best_of_all(similarities, 6)
    assert rank.tolist() == [[0, 1, 1, 0, 2, 2]]
    assert place.tolist() == [[0, 0, 1, 1, 0, 1]]
