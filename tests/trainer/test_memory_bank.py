"""The bank against what the method says its rows become."""

import pytest
import torch

from trainer import memory_bank
from trainer.memory_bank import MemoryBank


def test_memory_bank__starts_with_unit_rows_and_unknown_neighbours() -> None:
    bank = MemoryBank(50, 8, 3, generator=torch.Generator().manual_seed(1))
    again = MemoryBank(50, 8, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(bank.embeddings.norm(dim=1), torch.ones(50))
    assert torch.equal(bank.embeddings, again.embeddings)
    assert bank.neighbours.shape == (50, 3)
    assert bank.neighbours.dtype == torch.int64
    assert (bank.neighbours == -1).all()
    assert not any(parameter.requires_grad for parameter in bank.parameters())


def test_memory_bank__everything_is_in_its_state() -> None:
    bank, other = MemoryBank(5, 2, 1), MemoryBank(5, 2, 1)
    bank.neighbours.copy_(torch.tensor([[1], [2], [3], [4], [0]]))
    other.load_state_dict(bank.state_dict())
    assert torch.equal(bank.embeddings, other.embeddings)
    assert torch.equal(bank.neighbours, other.neighbours)


def test_update__is_the_unit_vector_halfway() -> None:
    bank = MemoryBank(3, 2, 1)
    bank.embeddings.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    bank.update(torch.tensor([0]), torch.tensor([[0.0, 1.0]]))
    half = 0.5**0.5
    torch.testing.assert_close(
        bank.embeddings, torch.tensor([[half, half], [0.0, 1.0], [-1.0, 0.0]])
    )


def test_update__keeps_the_share_that_momentum_says() -> None:
    bank = MemoryBank(2, 2, 1, momentum=0.75)
    bank.embeddings.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    bank.update(torch.tensor([0]), torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(bank.embeddings[0], torch.tensor([0.75, 0.25]) / 0.625**0.5)


def test_update__of_repeated_indices_the_last_counts() -> None:
    bank = MemoryBank(3, 2, 1)
    bank.embeddings.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    fresh = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    bank.update(torch.tensor([0, 2, 0]), fresh)
    torch.testing.assert_close(bank.embeddings[0], torch.tensor([1.0, 0.0]))


def test_update__passes_no_gradient_on() -> None:
    bank = MemoryBank(2, 2, 1)
    bank.update(torch.tensor([0]), torch.tensor([[0.0, 1.0]], requires_grad=True))
    assert not bank.embeddings.requires_grad


def test_refresh_neighbours__the_anchors_place_goes_to_the_spare() -> None:
    bank = MemoryBank(8, 2, 2)
    nearest = torch.tensor([[0, 1, 2], [5, 4, 3], [6, 2, 1]])
    bank.refresh_neighbours(torch.tensor([0, 7, 2]), nearest)
    assert bank.neighbours[[0, 7, 2]].tolist() == [[2, 1], [5, 4], [6, 1]]


def test_refresh_neighbours__exact_rows_are_stored_without_the_anchor() -> None:
    bank = MemoryBank(8, 2, 2)
    bank.refresh_neighbours(torch.tensor([0, 1]), torch.tensor([[3, 4], [1, 5]]))
    assert bank.neighbours[:2].tolist() == [[3, 4], [-1, 5]]


def test_refresh_neighbours__of_repeated_indices_the_last_counts() -> None:
    bank = MemoryBank(8, 2, 1)
    bank.refresh_neighbours(torch.tensor([3, 3]), torch.tensor([[3, 4], [5, 3]]))
    assert bank.neighbours[3].tolist() == [5]


def test_refresh_neighbours__wrong_width_is_named() -> None:
    with pytest.raises(ValueError, match=r"\(B, 2\) or \(B, 3\), got \(1, 5\)"):
        MemoryBank(8, 2, 2).refresh_neighbours(torch.tensor([0]), torch.zeros(1, 5).long())


@pytest.mark.parametrize("numbers", [(1, 2, 1), (5, 0, 1), (5, 2, 0)])
def test_memory_bank__impossible_sizes_are_named(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"got {numbers[0]}, {numbers[1]} and {numbers[2]}"):
        MemoryBank(*numbers)


def test_memory_bank__momentum_of_one_would_never_move() -> None:
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1"):
        MemoryBank(5, 2, 1, momentum=1.0)


def test_memory_bank__is_drawn_alike_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.nn.functional.normalize(torch.rand(50, 8, generator=generator) * 2 - 1, dim=1)
    monkeypatch.setattr(memory_bank, "ROWS_AT_A_TIME", 7)
    in_blocks = torch.Generator().manual_seed(1)
    assert torch.equal(MemoryBank(50, 8, 3, generator=in_blocks).embeddings, drawn)
    assert torch.equal(torch.rand(1, generator=generator), torch.rand(1, generator=in_blocks))
