"""A memory bank divided among ranks: each holds a block of the rows, and all hold the graph.

In: what a whole bank takes, on every rank. Out: changed rows on their owner, changed graph rows
everywhere, so that positives propagate without a word to the others. Saved, it is a whole bank.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from trainer.memory_bank import MemoryBank, last_of_each


class Transport(Protocol):
    """How rows travel between rank 0 and the others; `trainer.distributed.Ranks` is one."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""

    def collect(self, own: Tensor, total: int) -> Tensor | None:
        """The `total` rows of all ranks, on rank 0's host; None elsewhere."""

    def hand_out(self, read: Callable[[slice], Tensor] | None, own: Tensor, total: int) -> None:
        """Fill each rank's `own` rows with what rank 0 reads of `total`."""


class BankShard(MemoryBank):
    """The rows `held` of a bank of N images, and the graph of all N.

    Rows are what they are in a whole bank, bit for bit: drawn from the same stream and moved by the
    same operations. The graph takes 8 K bytes for each image on every rank, the rows 4 D / R.
    """

    def __init__(
        self,
        num_images: int,
        dim: int,
        num_neighbours: int,
        momentum: float = 0.5,
        *,
        held: range,
        generator: torch.Generator | None = None,
    ) -> None:
        """Make a shard of random rows.

        Args:
            held: rows of this rank, within 0..N-1 and at least one.

        Raises:
            ValueError: a number out of its range.
        """
        if not (0 <= held.start < held.stop <= num_images and held.step == 1):
            raise ValueError(f"held must be some of the rows 0..{num_images - 1}, got {held}")
        super().__init__(num_images, dim, num_neighbours, momentum, generator=generator, held=held)

    @torch.no_grad()
    def update(self, indices: Tensor, embeddings: Tensor) -> None:
        """Move those of the rows that are here, see `MemoryBank.update`.

        Args:
            indices: (B,) int64 rows of the whole bank, of the joined batch.
            embeddings: (B, D) unit length.
        """
        place = indices - self.held.start
        here = (place >= 0) & (place < len(self.held))  # (B,)
        fresh = embeddings.to(self.embeddings.dtype)
        rows = self.embeddings[torch.where(here, place, 0)]
        moved = nn.functional.normalize(self.momentum * rows + (1 - self.momentum) * fresh, dim=1)
        # No shape depends on how many are here, which would wait for the device. What is not here
        # writes what the first that is here writes; where none is, row 0 is written as it stands.
        some = here.to(torch.int8).argmax()
        writer = torch.where(here, last_of_each(indices), last_of_each(indices)[some])
        values = torch.where(here.any(), moved[writer], self.embeddings[0])
        self.embeddings[torch.where(here, place, place[some] * here.any())] = values


def whole_state(bank: MemoryBank, ranks: Transport) -> Mapping[str, Tensor] | None:
    """The state of the whole bank, to be saved by rank 0; every rank calls this.

    Returns:
        on rank 0 what a `MemoryBank` gives as its state, a divided one gathered on the host;
        None elsewhere.
    """
    if not isinstance(bank, BankShard):
        return bank.state_dict() if ranks.is_first else None
    rows = ranks.collect(bank.embeddings, bank.num_images)
    return None if rows is None else bank.state_dict() | {"embeddings": rows}


def restore_rows(
    bank: MemoryBank, read: Callable[[slice], Tensor] | None, ranks: Transport
) -> None:
    """Fill the shards of all ranks, where the bank is divided; every rank calls this.

    Args:
        read: on rank 0, gives rows of the whole bank; None elsewhere.
    """
    if isinstance(bank, BankShard):
        ranks.hand_out(read, bank.embeddings, bank.num_images)


def replicated(bank: MemoryBank) -> list[Tensor]:
    """The tensors of a bank of which every rank holds a copy."""
    if isinstance(bank, BankShard):
        return [bank.neighbours]
    return [bank.embeddings, bank.neighbours]
