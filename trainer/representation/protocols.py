"""How frozen features are scored without training anything: the weighted kNN vote.

In: unit-length embeddings and integer labels. Out: class votes or accuracy.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.representation.neighbours import Array, exact_neighbours

# Instance discrimination (Wu et al., CVPR 2018, section 3.4) and main.kNN of the authors' code.
KNN_K = 200
KNN_TEMPERATURE = 0.07


def weighted_knn_votes(
    queries: Array,
    gallery: Array,
    labels: NDArray[np.int64],
    *,
    num_classes: int,
    k: int = KNN_K,
    temperature: float = KNN_TEMPERATURE,
    exclude: Array | None = None,
) -> NDArray[np.float64]:
    """Vote of each query's k nearest gallery rows, each with weight exp(similarity / temperature).

    Args:
        queries, gallery: (B, D) and (N, D) float32 of unit length.
        labels: (N,) class of each gallery row, 0..num_classes-1.
        k: neighbours that vote; lowered to N where the gallery holds fewer.
        exclude: (B,) gallery row that may not vote on each query, -1 for none.

    Returns:
        (B, num_classes) votes; the prediction is the argmax, the lowest class winning a tie.
    """
    if len(labels) != len(gallery):
        raise ValueError(f"{len(gallery)} gallery rows but {len(labels)} labels")
    found = exact_neighbours(queries, gallery, min(k, len(gallery)), exclude=exclude)
    present = found.ids >= 0
    # exp(1 / 0.07) is 1.6e6: float64 holds the sum of 200 of them without rounding worth a vote.
    weights = np.where(present, np.exp(found.similarities.astype(np.float64) / temperature), 0.0)
    votes = np.zeros((len(found.ids), num_classes))
    rows = np.broadcast_to(np.arange(len(found.ids))[:, None], found.ids.shape)
    np.add.at(votes, (rows[present], np.asarray(labels)[found.ids[present]]), weights[present])
    return votes


def knn_accuracy(
    queries: Array,
    query_labels: NDArray[np.int64],
    gallery: Array,
    gallery_labels: NDArray[np.int64],
    *,
    k: int = KNN_K,
    temperature: float = KNN_TEMPERATURE,
    exclude: Array | None = None,
) -> float:
    """Share of queries, 0..1, whose weighted kNN vote is their own label."""
    num_classes = int(max(np.max(query_labels), np.max(gallery_labels))) + 1
    votes = weighted_knn_votes(
        queries,
        gallery,
        gallery_labels,
        num_classes=num_classes,
        k=k,
        temperature=temperature,
        exclude=exclude,
    )
    return float(np.mean(votes.argmax(axis=1) == query_labels))
