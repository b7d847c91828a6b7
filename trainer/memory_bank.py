"""The memory bank: one embedding and one row of the kNN graph for every training image.

In: the indices of a batch and what was computed for them. Out: changed rows. It is the only mutable
state of the algorithm and stands in every checkpoint. N images, D dimensions, K neighbours.
"""

import torch
from torch import Tensor, nn

from trainer.representation.neighbours import KnnGraph

ROWS_AT_A_TIME = 2**16  # while the bank is drawn: 34 MB at D = 128


class MemoryBank(nn.Module):
    """Running embeddings of N images and the directed kNN graph over them.

    Rows start in random directions, at unit length (the released code starts them at lengths of
    0.95 to 1.01; the first update makes them unit there too). Neighbours start as -1, not known,
    where the released code starts with 0, which makes image 0 everybody's positive.
    """

    embeddings: Tensor  # (N, D) unit length, no gradient; (len(held), D) of a shard
    neighbours: Tensor  # (N, K) int64, row i never holds i, -1 where not known

    def __init__(
        self,
        num_images: int,
        dim: int,
        num_neighbours: int,
        momentum: float = 0.5,
        *,
        generator: torch.Generator | None = None,
        held: range | None = None,
    ) -> None:
        """Make a bank of random rows.

        Args:
            num_images: N >= 2.
            dim: D >= 1.
            num_neighbours: K >= 1.
            momentum: share of the old row kept by `update`, in [0, 1); 0.5 in the released code.
            generator: source of the random directions; torch's global one when None.
            held: the rows that are here, see trainer/sharded_bank.py; all of them when None. A row
                begins the same wherever it is held.

        Raises:
            ValueError: a number out of its range.
        """
        super().__init__()
        if num_images < 2 or dim < 1 or num_neighbours < 1:
            raise ValueError(
                f"a bank needs num_images >= 2, dim >= 1 and num_neighbours >= 1, "
                f"got {num_images}, {dim} and {num_neighbours}"
            )
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.momentum = momentum
        self.held = range(num_images) if held is None else held
        rows = _random_rows(num_images, dim, generator, self.held)
        self.register_buffer("embeddings", rows)
        self.register_buffer(
            "neighbours", torch.full((num_images, num_neighbours), -1, dtype=torch.int64)
        )

    @property
    def num_images(self) -> int:
        """N."""
        return self.neighbours.shape[0]

    @property
    def num_neighbours(self) -> int:
        """K."""
        return self.neighbours.shape[1]

    def graph(self) -> KnnGraph:
        """The kNN graph as it is now; its similarities are not kept and come as None."""
        return KnnGraph(self.neighbours, None)

    @torch.no_grad()
    def update(self, indices: Tensor, embeddings: Tensor) -> None:
        """Move rows: row <- unit(momentum * row + (1 - momentum) * embedding).

        Called after the optimiser's step with the embeddings computed before it, as the released
        code does. Of repeated indices the last one in the batch counts.

        Args:
            indices: (B,) int64 rows.
            embeddings: (B, D) unit length.
        """
        fresh = embeddings.to(self.embeddings.dtype)
        mixed = self.momentum * self.embeddings[indices] + (1 - self.momentum) * fresh
        self.embeddings[indices] = nn.functional.normalize(mixed, dim=1)[last_of_each(indices)]

    @torch.no_grad()
    def refresh_neighbours(self, indices: Tensor, ids: Tensor) -> None:
        """Rewrite graph rows from the nearest bank rows of the fresh embeddings.

        The anchor's own place is taken by the (K+1)-th id, as in the released code: the order
        within a row carries no meaning. Of repeated indices the last one in the batch counts.

        Args:
            indices: (B,) int64 rows.
            ids: (B, K+1) int64 as `Objective.nearest`, or (B, K) rows to be stored as they are;
                -1 where there are fewer. The anchor itself is never stored.
        """
        k = self.num_neighbours
        if ids.ndim != 2 or ids.shape[1] not in (k, k + 1):
            raise ValueError(f"ids must be (B, {k}) or (B, {k + 1}), got {tuple(ids.shape)}")
        own = indices[:, None]
        spare = ids[:, k:] if ids.shape[1] > k else torch.full_like(own, -1)  # (B, 1)
        rows = torch.where(ids[:, :k] == own, spare, ids[:, :k])
        self.neighbours[indices] = rows[last_of_each(indices)]


def last_of_each(indices: Tensor) -> Tensor:
    """(B,) -> (B,) position of the last entry with the same index: repeated rows write one value.

    Writing equal values to one place is deterministic on every device; unequal ones are not.
    """
    same = indices[:, None] == indices[None, :]  # (B, B)
    positions = torch.arange(len(indices), device=indices.device)
    return torch.where(same, positions, -1).amax(dim=1)


def _random_rows(
    num_images: int, dim: int, generator: torch.Generator | None, held: range
) -> Tensor:
    """(H, D) unit rows: those of `held` among the (N, D) that are drawn, a block at a time."""
    kept = torch.empty(len(held), dim)
    for start in range(0, num_images, ROWS_AT_A_TIME):
        count = min(ROWS_AT_A_TIME, num_images - start)
        rows = torch.rand(count, dim, generator=generator) * 2 - 1
        first, last = max(start, held.start), min(start + count, held.stop)
        if first < last:
            own = rows[first - start : last - start]
            kept[first - held.start : last - held.start] = nn.functional.normalize(own, dim=1)
    return kept
