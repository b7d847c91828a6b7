"""The paper's losses written as its text reads: Python sets and loops over one anchor at a time."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def breadth_first(neighbours: Sequence[Sequence[int]], anchor: int, steps: int) -> list[int]:
    """Nodes within `steps` hops of the anchor, in order of discovery, without the anchor."""
    discovered: list[int] = []
    frontier = [anchor]
    for _ in range(steps):
        following = []
        for node in frontier:
            for other in neighbours[node]:
                if other >= 0 and other != anchor and other not in discovered:
                    discovered.append(int(other))
                    following.append(int(other))
        frontier = following
    return discovered


def anchor_losses(
    bank: NDArray[np.float64],
    neighbours: Sequence[Sequence[int]],
    anchor: int,
    embedding: NDArray[np.float64],
    *,
    temperature: float,
    num_background: int,
    steps: int,
    num_positives: int,
    hard: bool = True,
) -> tuple[float, float]:
    """Instance and invariance loss of one anchor."""
    similarity = [float(row @ embedding) for row in bank]
    weight = [math.exp(s / temperature) for s in similarity]
    order = sorted(range(len(bank)), key=lambda j: (-similarity[j], j))
    background = set(order[:num_background])  # N_M, the anchor counted
    positives = breadth_first(neighbours, anchor, steps)
    ranked = sorted(positives, key=lambda j: similarity[j] if hard else -similarity[j])
    chosen = set(ranked[:num_positives])  # N^h

    instance = -math.log(weight[anchor] / sum(weight[j] for j in background | {anchor}))
    if not chosen:
        return instance, 0.0
    negatives = background - set(positives) - {anchor}  # N_neg
    wanted = sum(weight[j] for j in chosen)
    invariance = -math.log(wanted / (wanted + sum(weight[j] for j in negatives)))
    return instance, invariance
