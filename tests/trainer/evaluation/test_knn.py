"""The kNN vote: by hand, equal to the plain reference, deaf to the test items.

Run: pytest tests/trainer/evaluation/test_knn.py
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from trainer.evaluation.context import Evaluation
from trainer.evaluation.knn import knn
from trainer.evaluation.labelled import LabelledSplit
from trainer.evaluation.protocol_settings import KnnSettings
from trainer.evaluation.votes import knn_votes, unit_rows
from trainer.representation.protocols import weighted_knn_votes

Make = Callable[..., Evaluation]


def test_votes__by_hand() -> None:
    # One query along x; rows at 0, 60 and 90 degrees with similarities 1, 0.5 and 0.
    gallery = np.array([[1, 0], [0.5, 3**0.5 / 2], [0, 1]], np.float32)
    query, labels = np.array([[1, 0]], np.float32), np.array([0, 1, 1])
    votes = knn_votes(query, gallery, labels, num_classes=2, ks=(3, 1), temperature=0.5)
    assert votes[1].tolist() == [[pytest.approx(np.e**2), 0]]
    assert votes[3].tolist() == [[pytest.approx(np.e**2), pytest.approx(np.e + 1)]]


@pytest.mark.parametrize(("count", "ks"), [(500, (200, 20, 1)), (50, (200, 7))])
def test_votes__equal_the_plain_reference(count: int, ks: tuple[int, ...]) -> None:
    draw = np.random.default_rng(count)
    gallery = unit_rows(draw.normal(size=(count, 16)).astype(np.float32))
    gallery[7] = gallery[3]  # an equal row
    queries = unit_rows(draw.normal(size=(300, 16)).astype(np.float32))  # more than one block
    labels = draw.integers(0, 5, count)
    found = knn_votes(queries, gallery, labels, num_classes=5, ks=ks, temperature=0.07)
    for k in ks:
        wanted = weighted_knn_votes(queries, gallery, labels, num_classes=5, k=k, temperature=0.07)
        assert (
            np.abs(
                found[k] / wanted.sum(axis=1, keepdims=True)
                - wanted / wanted.sum(axis=1, keepdims=True)
            ).max()
            < 1e-5
        )


def test_unit_rows__keep_zeros() -> None:
    assert unit_rows(np.array([[3, 4], [0, 0]], np.float32)).tolist() == [
        [pytest.approx(0.6), pytest.approx(0.8)],
        [0, 0],
    ]


def test_knn__gives_each_output_and_k_a_result(make_evaluation: Make) -> None:
    outcome = knn(make_evaluation(), KnnSettings(k=(5, 1), outputs=("features",)))
    assert [each.name for each in outcome.results] == ["features, k=5", "features, k=1"]
    assert all(each.untrained is not None for each in outcome.results)
    assert outcome.results[0].metrics["top1"] > 0.9  # three greys


def test_leak__test_items_do_not_change_each_others_votes(make_evaluation: Make) -> None:
    evaluation = make_evaluation()
    dataset, settings = evaluation.dataset, KnnSettings(k=(5,), outputs=("features",))
    assert dataset.test.source.labels is not None
    permuted = dataclasses.replace(
        dataset.test.source, labels=(dataset.test.source.labels + 1) % 3
    ).subset(np.arange(30)[::-1])
    splits = {**dataset.splits, "test": LabelledSplit(permuted)}
    other = dataclasses.replace(evaluation, dataset=dataclasses.replace(dataset, splits=splits))
    one, two = knn(evaluation, settings).results[0], knn(other, settings).results[0]
    assert one.confusion is not None
    assert two.confusion is not None
    assert two.confusion.tolist() == np.roll(one.confusion, 1, axis=0).tolist()
    assert one.metrics["top1"] > 0.9 > 0.1 > two.metrics["top1"]


def test_leak__a_query_alone_gets_the_votes_that_it_gets_among_others() -> None:
    draw = np.random.default_rng(3)
    gallery = unit_rows(draw.normal(size=(80, 4)).astype(np.float32))
    queries = unit_rows(draw.normal(size=(9, 4)).astype(np.float32))
    labels = draw.integers(0, 3, 80)
    all_votes = knn_votes(queries, gallery, labels, num_classes=3, ks=(7,), temperature=0.1)[7]
    for row in range(9):
        alone = knn_votes(
            queries[row : row + 1], gallery, labels, num_classes=3, ks=(7,), temperature=0.1
        )[7]
        assert alone[0].tolist() == pytest.approx(all_votes[row].tolist(), rel=1e-5)
