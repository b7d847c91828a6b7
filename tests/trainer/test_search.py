"""The blocked search against a full sort, with and without ties."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference.tape import never_waits
from trainer import search
from trainer.search import TopM, nearest, places, top_m


def sorted_top(queries: Tensor, bank: Tensor, m: int) -> tuple[list[list[int]], Tensor]:
    """The plain reference: sort everything by descending similarity, then by id."""
    scores = (queries @ bank.T).numpy()
    ids = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    order = np.lexsort((ids, -scores))[:, :m]
    return order.tolist(), torch.from_numpy(np.take_along_axis(scores, order, axis=1))


def rows(count: int, dim: int, seed: int, *, tied: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if tied:  # small whole numbers: many equal products, all exact in float32
        return torch.randint(-1, 2, (count, dim), generator=generator).float()
    return torch.randn(count, dim, generator=generator)


def check(found: TopM, queries: Tensor, bank: Tensor, m: int) -> None:
    order, scores = sorted_top(queries, bank, m)
    assert found.ids.tolist() == [sorted(line) for line in order]
    expected = torch.stack([line[np.argsort(ids)] for ids, line in zip(order, scores, strict=True)])
    torch.testing.assert_close(found.similarities, expected)
    count = min(5, m, len(bank))
    assert nearest(found, count).tolist() == [line[:count] for line in order]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("block_rows", [None, 1, 7, 64, 300])
@pytest.mark.parametrize("m", [1, 5, 37, 130, 300])
def test_top_m__equals_a_full_sort(m: int, block_rows: int | None, tied: bool) -> None:
    for seed in range(3):
        queries, bank = rows(6, 3, seed, tied=tied), rows(300, 3, seed + 50, tied=tied)
        check(top_m(queries, bank, m, block_rows=block_rows), queries, bank, m)


@pytest.mark.parametrize("tied", [False, True])
def test_top_m__large_enough_for_the_sampled_bound(tied: bool) -> None:
    queries, bank = rows(4, 16, 1, tied=tied), rows(20_000, 16, 2, tied=tied)
    for m in (64, 1000, 4096, 19_000):
        check(top_m(queries, bank, m), queries, bank, m)


def test_top_m__sampled_bound_too_high_falls_back_to_the_exact_one() -> None:
    # Every sampled row is a perfect match and the others are not: the sample promises too much.
    bank = torch.zeros(3200, 2)
    bank[:, 0] = torch.linspace(-1, 0, 3200)
    bank[:: search.SAMPLE_STRIDE, 0] = 1.0
    queries = torch.tensor([[1.0, 0.0]])
    check(top_m(queries, bank, 900), queries, bank, 900)


def test_top_m__more_than_the_bank_holds_is_lowered() -> None:
    queries, bank = rows(2, 3, 0, tied=False), rows(9, 3, 1, tied=False)
    found = top_m(queries, bank, 50)
    assert found.ids.tolist() == [list(range(9))] * 2
    assert nearest(found, 11)[:, 9:].tolist() == [[-1, -1]] * 2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("block_rows", [16, 100, 700, 1500, 3001])  # tiles of 4 from 700 on
@pytest.mark.parametrize("m", [1, 20, 40])
def test_top_m__the_path_of_other_devices_agrees(m: int, block_rows: int, tied: bool) -> None:
    queries, bank = rows(5, 4, 3, tied=tied), rows(3001, 4, 4, tied=tied)
    with never_waits():
        there = search._top_m_on_device(queries, bank, m, block_rows)
    check(there, queries, bank, m)


def test_top_m__the_path_of_other_devices_survives_what_is_no_number() -> None:
    queries, bank = rows(2, 4, 3, tied=False), rows(900, 4, 4, tied=False)
    queries[1] = torch.nan
    found = search._top_m_on_device(queries, bank, 20, 900)
    check(TopM(found.ids[:1], found.similarities[:1]), queries[:1], bank, 20)
    assert ((found.ids >= 0) & (found.ids < 900)).all()  # or a GPU would give up altogether


def test_top_m__works_in_double_precision() -> None:
    queries, bank = rows(5, 8, 3, tied=False).double(), rows(100, 8, 4, tied=False).double()
    assert top_m(queries, bank, 20).similarities.dtype == torch.float64
    check(top_m(queries, bank, 20), queries, bank, 20)


def test_top_m__memory_is_not_shared_between_calls() -> None:
    bank = rows(100, 8, 4, tied=False)
    first = top_m(rows(5, 8, 3, tied=False), bank, 20)
    kept = first.similarities.clone()
    top_m(rows(5, 8, 9, tied=False), bank, 20)
    assert torch.equal(first.similarities, kept)


def test_nearest__leaves_what_was_found_untouched() -> None:
    similarities = torch.rand(3, 2 * search.TILE)
    found = TopM(torch.arange(2 * search.TILE).expand(3, -1), similarities.clone())
    nearest(found, 5)
    assert torch.equal(found.similarities, similarities)


def test_places__finds_members_and_marks_the_others() -> None:
    found = TopM(torch.tensor([[2, 5, 9], [0, 1, 3]]), torch.zeros(2, 3))
    place = places(found, torch.tensor([[9, 4, -1, 10], [3, 0, 2, -1]]))
    assert place.tolist() == [[2, 3, 3, 3], [2, 0, 3, 3]]
