"""VOC07: the tree's targets, means by hand, the choice of C, and what is never looked at.

Run: pytest tests/trainer/evaluation/test_voc07.py
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trainer.datasets import DataError
from trainer.evaluation.context import Evaluation
from trainer.evaluation.job import JobError
from trainer.evaluation.protocol_settings import Voc07Settings
from trainer.evaluation.voc07 import _choose_c, mean_average_precision, voc07_svm

CLASSES = ["dark", "light"]
SVM = Voc07Settings(c=(0.1, 10.0))
SGD = Voc07Settings(classifier="sgd", iterations=60, lr=0.5)
Make = Callable[..., Evaluation]


@pytest.fixture
def evaluation(make_evaluation: Make, voc_tree: Path) -> Evaluation:
    return make_evaluation(kind="voc", root=str(voc_tree), class_names=CLASSES)


def test_tree__targets_and_boxes(evaluation: Evaluation) -> None:
    train = evaluation.dataset.train
    assert train.targets is not None
    assert train.boxes is not None
    # Images 0, 3, ..: dark; 1, 4, ..: light; 2, 5, ..: dark with a difficult light one.
    assert train.targets[:3].tolist() == [[1, 0], [0, 1], [1, -1]]
    assert train.boxes[0].corners.tolist() == [[0, 0, 10, 8]]  # VOC counts from 1
    assert train.boxes[2].difficult.tolist() == [False, True]
    assert train.source.ids[0] == "JPEGImages/train00.jpg"


def test_tree__of_unknown_classes_or_parts_missing(make_evaluation: Make, voc_tree: Path) -> None:
    with pytest.raises(DataError, match=r"labels out of range: .* shows 'dark'"):
        make_evaluation(kind="voc", root=str(voc_tree))
    with pytest.raises(DataError, match=r"'dim' and 0 more have no training image"):
        make_evaluation(kind="voc", root=str(voc_tree), class_names=[*CLASSES, "dim"])
    (voc_tree / "Annotations" / "train00.xml").write_text("<annotation>")
    with pytest.raises(DataError, match=r"train00\.xml cannot be read as an annotation"):
        make_evaluation(kind="voc", root=str(voc_tree), class_names=CLASSES)
    (voc_tree / "Annotations").rename(voc_tree / "Labels")
    with pytest.raises(DataError, match="lacks Annotations"):
        make_evaluation(kind="voc", root=str(voc_tree), class_names=CLASSES)


def test_mean__leaves_difficult_items_and_absent_classes_out() -> None:
    scores = np.array([[0.8, 0.1, 0], [0.9, 0.2, 0], [0.7, 0.3, 0]])
    targets = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0]], np.int8)
    # Class 0: the difficult one first, which does not count, then a hit, a miss: 1. Class 1: its
    # hit comes first: 1. Class 2 is nowhere.
    assert mean_average_precision(scores, targets, "map_area") == 1
    targets[1, 0] = 0
    scores[:, 0] = [0.7, 0.8, 0.9]  # miss, miss, hit: 1/3
    assert mean_average_precision(scores, targets, "map_area") == pytest.approx((1 / 3 + 1) / 2)


@pytest.mark.parametrize("settings", [SVM, SGD], ids=["svm", "sgd"])
def test_voc07__tells_dark_from_light(evaluation: Evaluation, settings: Voc07Settings) -> None:
    outcome = voc07_svm(evaluation, settings)
    (result,) = outcome.results
    assert outcome.headline == "map_11point"
    assert result.metrics["map_11point"] > 0.9
    assert result.metrics["map_area"] > 0.9
    assert result.untrained is not None
    assert [row["class"] for row in result.per_class] == CLASSES
    # Tested: 8 dark (4 of them beside a difficult light one), 4 light.
    assert [row["count"] for row in result.per_class] == [8, 4]
    assert result.confusion is None


@pytest.mark.parametrize("settings", [SVM, SGD], ids=["svm", "sgd"])
def test_leak__test_images_and_labels_choose_nothing(
    evaluation: Evaluation, settings: Voc07Settings
) -> None:
    dataset = evaluation.dataset
    assert dataset.test.targets is not None
    flipped = dataclasses.replace(dataset.test, targets=dataset.test.targets[:, ::-1])
    permuted = dataclasses.replace(
        evaluation,
        dataset=dataclasses.replace(dataset, splits={**dataset.splits, "test": flipped}),
    )
    honest, other = voc07_svm(evaluation, settings), voc07_svm(permuted, settings)
    for one, two in zip(honest.results[0].per_class, other.results[0].per_class, strict=True):
        assert one.get("c") == two.get("c")
        assert one.get("cross_validated_ap") == two.get("cross_validated_ap")
    assert honest.curves == other.curves
    assert other.results[0].metrics["map_area"] < honest.results[0].metrics["map_area"]


def test_choice__of_a_class_with_one_image_takes_the_smallest_c() -> None:
    there = np.array([True, False, False, False])
    rows = np.eye(4, dtype=np.float32)
    assert _choose_c(rows, there, SVM, seed=0) == (0.1, None)


def test_voc07__of_a_set_with_one_class_an_image(make_evaluation: Make) -> None:
    with pytest.raises(JobError, match="kind `voc`"):
        voc07_svm(make_evaluation(), SVM)
