"""Counting a classification: figures by hand, intervals, who is the most confused.

Run: pytest tests/trainer/evaluation/test_outcome.py
"""

import numpy as np
import pytest

from trainer.evaluation.outcome import accuracies, bootstrap, classified, label_ranks

# Four items of two classes: three of class 0 (two right), one of class 1 (wrong).
SCORES = np.array([[2.0, 1.0], [3.0, 0.0], [0.0, 1.0], [5.0, 2.0]])
LABELS = np.array([0, 0, 0, 1])


def test_accuracies__by_hand() -> None:
    # top-1: 2 of 4. By class: 2/3 and 0/1, their mean 1/3. Five guesses of two say nothing.
    assert accuracies(SCORES, LABELS) == {"top1": 0.5, "mean_per_class": pytest.approx(1 / 3)}


def test_accuracies__top5_of_six_classes() -> None:
    scores = np.arange(6.0)[None].repeat(2, axis=0)  # class 5 first, class 0 last
    assert accuracies(scores, np.array([1, 0]))["top5"] == 0.5


def test_ranks__of_equal_scores_the_lower_class_comes_first() -> None:
    scores = np.zeros((3, 3))
    assert label_ranks(scores, np.array([0, 1, 2])).tolist() == [0, 1, 2]


def test_classified__tables_by_hand() -> None:
    result = classified("x", SCORES, LABELS, ["a", "b"], rows=np.array([4, 5, 6, 9]), seed=0)
    assert result.confusion is not None
    assert result.confusion.tolist() == [[2, 1], [1, 0]]
    assert [row["count"] for row in result.per_class] == [3, 1]
    assert result.per_class[0]["top1"] == pytest.approx(2 / 3)
    # Item 9 is 3 above its class, item 6 only 1.
    assert [(m.row, m.label, m.predicted, m.margin) for m in result.mistakes] == [
        (9, 1, 0, 3.0),
        (6, 0, 1, 1.0),
    ]
    assert classified("x", SCORES[:3], LABELS[:3], ["a", "b"], rows=np.arange(3), seed=0).per_class[
        1
    ] == {"class": "b", "count": 0, "top1": None}


def test_gain__is_counted_on_the_same_items() -> None:
    # Both right on the same 80 of 100, ours on 10 more: whatever is drawn, it is never below 0.
    labels = np.zeros(100, np.int64)
    ours, theirs = np.zeros((100, 2)), np.zeros((100, 2))
    ours[90:, 1] = theirs[80:, 1] = 1
    result = classified("x", ours, labels, ["a", "b"], rows=labels, seed=0, untrained=theirs)
    assert result.untrained == {"top1": 0.8, "mean_per_class": 0.8}
    low, high = result.gains["top1"]
    assert 0.03 <= low <= 0.06 < 0.14 <= high <= 0.18  # 0.1 +- 1.96 * sqrt(0.1 * 0.9 / 100)
    assert not classified("x", ours, labels, ["a", "b"], rows=labels, seed=0).gains


def test_bootstrap__is_the_binomial_interval_of_a_share() -> None:
    right = np.arange(400) < 300  # 0.75 +- 1.96 * sqrt(0.75 * 0.25 / 400) = 0.0424
    low, high = bootstrap(lambda rows: {"top1": right[rows].mean()}, 400, seed=0)["top1"]
    assert low == pytest.approx(0.75 - 0.0424, abs=0.008)
    assert high == pytest.approx(0.75 + 0.0424, abs=0.008)
    again = bootstrap(lambda rows: {"top1": right[rows].mean()}, 400, seed=0)["top1"]
    assert again == (low, high)


def test_confusion__has_the_true_classes_as_rows() -> None:
    scores, labels = np.array([[0.0, 1.0]] * 3), np.array([0, 0, 1])
    result = classified("x", scores, labels, ["a", "b"], rows=np.arange(3), seed=0)
    assert result.confusion is not None
    assert result.confusion.tolist() == [[0, 2], [0, 1]]
