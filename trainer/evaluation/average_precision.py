"""Average precision as PASCAL VOC counts it, by both of its rules.

In: scores and what is there. Out: numbers 0..1. Difficult items are left out before this is called.
"""

import numpy as np
from numpy.typing import NDArray

ELEVEN_POINTS = np.arange(11) / 10  # recalls at which VOC2007 looks


def precision_and_recall(
    scores: NDArray[np.floating], there: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall after each item, (N,) of each, the highest score first.

    Items of equal score are told apart by nobody: they count as one step, at its end.
    """
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(there[order])
    precision = found / np.arange(1, len(order) + 1)
    recall = found / max(1, found[-1])
    sorted_scores = scores[order]
    ends = np.append(sorted_scores[1:] != sorted_scores[:-1], True)
    return precision[ends], recall[ends]


def eleven_point(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> float:
    """VOC2007's: the mean over recalls 0, 0.1 .. 1 of the best precision at that recall or more."""
    best = [precision[recall >= at - 1e-12].max(initial=0.0) for at in ELEVEN_POINTS]
    return float(np.mean(best))


def area(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> float:
    """VOC2010's: the area below the precision, made to fall with recall."""
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * falling))


def area_as_it_is(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> float:
    """The area below the precision as it is: scikit-learn's, which the authors' code reports."""
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))
