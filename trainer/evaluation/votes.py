"""The weighted vote of the k nearest rows, for several k from one search.

In: unit rows with labels. Out: votes for each class, as
trainer.representation.protocols.weighted_knn_votes counts them, at little more than the cost of the
matrix product.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.search import top_m

# Queries that are compared with the rows at once.
QUERIES_TOGETHER = 256
# Rows compared with them at once, 26 MB of similarities: fewer cost more searches, more leave the
# cache (CPU time of 512 x 50,000: 0.23 s at 12,500, 0.18 s at 25,000, 0.28 s at 50,000).
ROWS_TOGETHER = 25_000


def knn_votes(
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    num_classes: int,
    ks: Sequence[int],
    temperature: float,
    device: torch.device | str = "cpu",
    advance: Callable[[int], object] = lambda count: None,
) -> dict[int, NDArray[np.float64]]:
    """Votes (B, num_classes) for each k: every neighbour adds exp(similarity / temperature).

    Args:
        queries, gallery: (B, D) and (N, D) of unit length.
        labels: (N,) 0..num_classes-1.
        ks: each is lowered to N where the gallery holds fewer. Of equally near rows at the k-th
            place the lowest vote.
    """
    bank = torch.from_numpy(gallery).to(device)
    most = min(max(ks), len(gallery))
    votes = {k: np.zeros((len(queries), num_classes)) for k in ks}
    for first in range(0, len(queries), QUERIES_TOGETHER):
        block = torch.from_numpy(queries[first : first + QUERIES_TOGETHER]).to(device)
        found = top_m(block, bank, most, block_rows=ROWS_TOGETHER)
        similarities, ids = _best_first(found.similarities, found.ids)
        weights = np.exp(similarities.astype(np.float64) / temperature)
        seats = np.arange(len(block))[:, None] * num_classes + labels[ids]
        for k in ks:
            counted = np.bincount(
                seats[:, :k].ravel(), weights[:, :k].ravel(), minlength=len(block) * num_classes
            )
            votes[k][first : first + len(block)] = counted.reshape(len(block), num_classes)
        advance(len(block))
    return votes


def unit_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows scaled to unit length; a row of zeros stays one."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, np.finfo(np.float32).tiny), np.float32)


def _best_first(similarities: Tensor, ids: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Descending; of equal ones the lowest id, as the ids ascend, comes first."""
    values, order = similarities.sort(dim=1, descending=True, stable=True)
    return values.cpu().numpy(), ids.gather(1, order).cpu().numpy()
