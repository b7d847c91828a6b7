"""Shards of a bank against the whole one, bit for bit."""

import pytest
import torch
from torch import Tensor

from trainer import memory_bank
from trainer.memory_bank import MemoryBank
from trainer.sharded_bank import BankShard

HELD = (range(5), range(5, 6), range(6, 17))


def shards(num_images: int = 17, dim: int = 4) -> tuple[MemoryBank, list[BankShard]]:
    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    whole = MemoryBank(num_images, dim, 2, 0.5, generator=seeded())
    return whole, [
        BankShard(num_images, dim, 2, 0.5, held=held, generator=seeded()) for held in HELD
    ]


def rows(parts: list[BankShard]) -> Tensor:
    return torch.cat([part.embeddings for part in parts])


@pytest.mark.parametrize("block", [4, 2**16])
def test_shards__begin_as_the_rows_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(memory_bank, "ROWS_AT_A_TIME", block)
    whole, parts = shards()
    assert torch.equal(rows(parts), whole.embeddings)
    assert [part.num_images for part in parts] == [17] * 3
    assert all(torch.equal(part.neighbours, whole.neighbours) for part in parts)


@pytest.mark.parametrize(
    "indices",
    [[0, 4, 5, 6, 16], [5], [16, 2, 9, 2, 16, 2], [7, 8, 9], [0, 0, 0]],
)
def test_update__of_shards_writes_what_the_whole_bank_writes(indices: list[int]) -> None:
    whole, parts = shards()
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        fresh = torch.randn(len(indices), 4, generator=generator)
        fresh = torch.nn.functional.normalize(fresh, dim=1)
        for bank in (whole, *parts):
            bank.update(torch.tensor(indices), fresh)
        assert torch.equal(rows(parts), whole.embeddings)


def test_refresh_neighbours__of_a_shard_writes_any_row() -> None:
    whole, parts = shards()
    for bank in (whole, *parts):
        bank.refresh_neighbours(torch.tensor([1, 16]), torch.tensor([[1, 2, 3], [4, 5, 16]]))
    assert all(torch.equal(part.neighbours, whole.neighbours) for part in parts)


@pytest.mark.parametrize("held", [range(3, 3), range(-1, 3), range(10, 18), range(0, 6, 2)])
def test_bank_shard__rows_that_are_not_there_are_named(held: range) -> None:
    with pytest.raises(ValueError, match=r"some of the rows 0\.\.16, got range\("):
        BankShard(17, 4, 2, held=held)
