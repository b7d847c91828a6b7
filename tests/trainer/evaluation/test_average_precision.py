"""Average precision by both rules of VOC, on rankings small enough for a pencil.

Run: pytest tests/trainer/evaluation/test_average_precision.py
"""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from trainer.evaluation.average_precision import (
    area,
    area_as_it_is,
    eleven_point,
    precision_and_recall,
)

# Ranked: hit, miss, hit, miss. Precision 1, 1/2, 2/3, 1/2 at recall 1/2, 1/2, 1, 1.
SCORES = np.array([0.9, 0.8, 0.7, 0.1])
THERE = np.array([True, False, True, False])


def test_precision_and_recall__by_hand() -> None:
    precision, recall = precision_and_recall(SCORES, THERE)
    assert precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2])
    assert recall.tolist() == [0.5, 0.5, 1, 1]


def test_average_precision__by_hand() -> None:
    curve = precision_and_recall(SCORES, THERE)
    # Recalls 0 .. 0.5 see 1, 0.6 .. 1 see 2/3.
    assert eleven_point(*curve) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert area(*curve) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # miss, hit, hit: precision 1/2 then 2/3; made to fall, the first is 2/3 too.
    late = precision_and_recall(np.array([3.0, 2.0, 1.0]), np.array([False, True, True]))
    assert area(*late) == pytest.approx(2 / 3)
    assert area_as_it_is(*late) == pytest.approx(0.5 / 2 + 0.5 * 2 / 3)


def test_area_as_it_is__is_scikit_learns() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        scores, there = draw.integers(0, 9, 40).astype(float), draw.random(40) < 0.3
        there[0] = True
        ours = area_as_it_is(*precision_and_recall(scores, there))
        assert ours == pytest.approx(average_precision_score(there, scores))


def test_ties__are_one_step_whatever_their_order() -> None:
    scores = np.ones(4)
    for there in (THERE, THERE[::-1]):
        assert area(*precision_and_recall(scores, there)) == 0.5
