"""Average precision of boxes: by hand, and as pycocotools' own evaluation by torchmetrics.

Run: pytest tests/trainer/evaluation/test_box_precision.py
"""

import numpy as np
import pytest
import torch
from torchmetrics.detection import MeanAveragePrecision

from trainer.evaluation.box_precision import (
    OVERLAPS,
    RECALLS,
    Detections,
    average_precisions,
    match,
    overlaps,
)
from trainer.evaluation.labelled import Boxes


def objects(*corners: tuple[float, ...], labels: list[int], difficult: list[int]) -> Boxes:
    box = np.array(corners, np.float32).reshape(-1, 4)
    return Boxes(box, np.array(labels, np.int64), np.array(difficult, bool))


def detections(*corners: tuple[float, ...], labels: list[int], scores: list[float]) -> Detections:
    box = np.array(corners, np.float32).reshape(-1, 4)
    return Detections(box, np.array(labels, np.int64), np.array(scores, np.float32))


LEFT, RIGHT, NOWHERE = (0.0, 0.0, 10.0, 10.0), (50.0, 0.0, 60.0, 10.0), (80.0, 80.0, 90.0, 90.0)


def test_precision__by_hand() -> None:
    there = [objects(LEFT, RIGHT, labels=[0, 0], difficult=[0, 0])]
    found = [detections(LEFT, NOWHERE, RIGHT, labels=[0, 0, 0], scores=[0.9, 0.8, 0.7])]
    (row,) = average_precisions(match(found, there, 1))
    # Hit, miss, hit: precision 1 up to recall 1/2 (51 of 101 places), 2/3 up to recall 1.
    assert row == pytest.approx(np.full(10, (51 + 50 * 2 / 3) / 101))


def test_precision__depends_on_the_overlap() -> None:
    there = [objects(LEFT, labels=[0], difficult=[0])]
    found = [detections((0, 0, 10, 7.2), labels=[0], scores=[0.9])]
    (row,) = average_precisions(match(found, there, 1))
    # 0.72 of the object: right at 0.5 .. 0.7, wrong from 0.75 on.
    assert row == pytest.approx([1, 1, 1, 1, 1, 0, 0, 0, 0, 0])


def test_precision__difficult_objects_are_neither_found_nor_missed() -> None:
    there = [objects(LEFT, RIGHT, labels=[0, 0], difficult=[0, 1])]
    both = [detections(RIGHT, LEFT, labels=[0, 0], scores=[0.9, 0.8])]
    matches = match(both, there, 1)
    assert matches[0].objects.tolist() == [1]
    assert average_precisions(matches) == pytest.approx(np.ones((1, 10)))
    easy = [objects(LEFT, labels=[0], difficult=[0])]
    assert average_precisions(match(both, easy, 1)) == pytest.approx(np.full((1, 10), 0.5))


def test_precision__of_a_class_without_objects_is_not_a_number() -> None:
    there = [objects(LEFT, labels=[0], difficult=[0])]
    found = [detections(LEFT, LEFT, labels=[0, 1], scores=[0.9, 0.8])]
    rows = average_precisions(match(found, there, 3))
    assert np.isnan(rows).all(axis=1).tolist() == [False, True, True]
    nothing = average_precisions(match([detections(labels=[], scores=[])], there, 1))
    assert nothing.tolist() == [[0.0] * 10]


def drawn(count: int, seed: int) -> tuple[list[Detections], list[Boxes]]:
    """Objects of three classes, some difficult, and detections near them or anywhere."""
    draw = np.random.default_rng(seed)
    found, there = [], []
    for _ in range(count):
        corners = draw.uniform(0, 80, (draw.integers(0, 5), 4)).astype(np.float32)
        corners[:, 2:] = corners[:, :2] + draw.uniform(8, 40, (len(corners), 2))
        labels = draw.integers(0, 3, len(corners))
        there.append(Boxes(corners, labels, draw.random(len(corners)) < 0.2))
        near = np.repeat(corners, 2, axis=0) + draw.normal(0, 3, (2 * len(corners), 4))
        guessed = np.where(draw.random(len(near)) < 0.8, np.repeat(labels, 2), 0)
        scores = draw.random(len(near)).astype(np.float32)
        found.append(Detections(near.astype(np.float32), guessed, scores))
    return found, there


def by_torchmetrics(found: list[Detections], there: list[Boxes]) -> dict[str, torch.Tensor]:
    # Its own recalls are rounded to float32, so that 0.2 of five objects is another place.
    metric = MeanAveragePrecision(class_metrics=True, rec_thresholds=RECALLS.tolist())
    metric.update(
        [
            {
                "boxes": torch.from_numpy(each.corners),
                "scores": torch.from_numpy(each.scores),
                "labels": torch.from_numpy(each.labels),
            }
            for each in found
        ],
        [
            {
                "boxes": torch.from_numpy(each.corners),
                "labels": torch.from_numpy(each.labels),
                "iscrowd": torch.from_numpy(each.difficult.astype(np.int64)),
            }
            for each in there
        ],
    )
    return metric.compute()


@pytest.mark.parametrize("seed", range(3))
def test_precision__equals_torchmetrics(seed: int) -> None:
    found, there = drawn(12, seed)
    ours = average_precisions(match(found, there, 3))
    theirs = by_torchmetrics(found, there)
    assert float(theirs["map"]) == pytest.approx(ours.mean(), abs=1e-6)
    assert float(theirs["map_50"]) == pytest.approx(ours[:, 0].mean(), abs=1e-6)
    assert float(theirs["map_75"]) == pytest.approx(ours[:, 5].mean(), abs=1e-6)
    assert theirs["map_per_class"].tolist() == pytest.approx(ours.mean(axis=1).tolist(), abs=1e-6)
    assert 0.1 < ours.mean() < 0.9


def test_weights__count_images_as_if_they_stood_there_so_often() -> None:
    found, there = drawn(10, 5)
    rows = np.random.default_rng(0).integers(0, 10, 10)
    weighted = average_precisions(match(found, there, 3), np.bincount(rows, minlength=10))
    repeated = match([found[row] for row in rows], [there[row] for row in rows], 3)
    assert weighted == pytest.approx(average_precisions(repeated))
    assert weighted.mean() != pytest.approx(average_precisions(match(found, there, 3)).mean())


def test_overlaps__by_hand() -> None:
    ours = np.array([[0, 0, 10, 10], [0, 0, 5, 10]], np.float32)
    theirs = np.array([[5, 0, 15, 10], [20, 0, 30, 10]], np.float32)
    assert overlaps(ours, theirs) == pytest.approx(np.array([[1 / 3, 0], [0, 0]]))
    assert len(OVERLAPS) == 10
