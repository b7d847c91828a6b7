"""The memory bank: one embedding and one row of the kNN graph for every training image.

In: the indices of a batch and what was computed for them. Out: changed rows. It is the only mutable
state of the algorithm and stands in every checkpoint. N images, D dimensions, K neighbours.
"""

import torch
from torch import Tensor, nn

from trainer.representation.neighbours import KnnGraph


class MemoryBank(nn.Module):
    """Running embeddings of N images and the directed kNN graph over them.

    Rows start in random directions, at unit length (the released code starts them at lengths of
    0.95 to 1.01; the first update makes them unit there too). Neighbours start as -1, not known,
    where the released code starts with 0, which makes image 0 everybody's positive.
    """

    embeddings: Tensor  # (N, D) unit length, no gradient
    neighbours: Tensor  # (N, K) int64, row i never holds i, -1 where not known

    def __init__(
        self,
        num_images: int,
        dim: int,
        num_neighbours: int,
        momentum: float = 0.5,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Make a bank of random rows.

        Args:
            num_images: N >= 2.
            dim: D >= 1.
            num_neighbours: K >= 1.
            momentum: share of the old row kept by `update`, in [0, 1); 0.5 in the released code.
            generator: source of the random directions; torch's global one when None.

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
        rows = torch.rand(num_images, dim, generator=generator) * 2 - 1
        self.register_buffer("embeddings", nn.functional.normalize(rows, dim=1))
        self.register_buffer(
            "neighbours", torch.full((num_images, num_neighbours), -1, dtype=torch.int64)
        )

    @property
    def num_images(self) -> int:
        """N."""
        return self.embeddings.shape[0]

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
        self.embeddings[indices] = nn.functional.normalize(mixed, dim=1)[_last_of_each(indices)]

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
        self.neighbours[indices] = rows[_last_of_each(indices)]


def _last_of_each(indices: Tensor) -> Tensor:
    """(B,) -> (B,) position of the last entry with the same index: repeated rows write one value.

    Writing equal values to one place is deterministic on every device; unequal ones are not.
    """
    same = indices[:, None] == indices[None, :]  # (B, B)
    positions = torch.arange(len(indices), device=indices.device)
    return torch.where(same, positions, -1).amax(dim=1)
