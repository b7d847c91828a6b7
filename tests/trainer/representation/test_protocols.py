import math

import numpy as np
import pytest

from trainer.representation.protocols import (
    KNN_K,
    KNN_TEMPERATURE,
    knn_accuracy,
    weighted_knn_votes,
)

# Four unit vectors in the plane and the query (1, 0): cosines 1, 0.8, 0.6 and -1.
GALLERY = np.array([[1.0, 0.0], [0.8, 0.6], [0.6, -0.8], [-1.0, 0.0]], np.float32)
QUERY = np.array([[1.0, 0.0]], np.float32)
LABELS = np.array([0, 1, 1, 2])


def test_votes__by_hand() -> None:
    votes = weighted_knn_votes(QUERY, GALLERY, LABELS, num_classes=4, k=3, temperature=0.5)
    # Each of the three nearest gives exp(cosine / 0.5) to its class.
    expected = [math.exp(2), math.exp(1.6) + math.exp(1.2), 0, 0]
    np.testing.assert_allclose(votes, [expected], rtol=1e-6)
    assert votes.argmax() == 1  # 8.27 from two that are less near, 7.39 from the nearest
    assert votes.dtype == np.float64


def test_votes__temperature_decides_between_near_and_many() -> None:
    votes = weighted_knn_votes(QUERY, GALLERY, LABELS, num_classes=3, k=3, temperature=0.07)
    assert votes.argmax() == 0  # exp(14.3) = 1.6e6 against exp(11.4) + exp(8.6) = 9.7e4


def test_votes__k_leaves_the_far_ones_out() -> None:
    votes = weighted_knn_votes(QUERY, GALLERY, LABELS, num_classes=3, k=1, temperature=0.5)
    np.testing.assert_allclose(votes, [[math.exp(2), 0, 0]], rtol=1e-6)


def test_votes__k_beyond_the_gallery_is_all_of_it() -> None:
    votes = weighted_knn_votes(QUERY, GALLERY, LABELS, num_classes=3, temperature=0.5)
    expected = [math.exp(2), math.exp(1.6) + math.exp(1.2), math.exp(-2)]
    np.testing.assert_allclose(votes, [expected], rtol=1e-6)


def test_votes__excluded_row_does_not_vote() -> None:
    votes = weighted_knn_votes(
        QUERY, GALLERY, LABELS, num_classes=3, k=4, temperature=0.5, exclude=np.array([0])
    )
    np.testing.assert_allclose(votes, [[0, math.exp(1.6) + math.exp(1.2), math.exp(-2)]], rtol=1e-6)


def test_votes__labels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="4 gallery rows but 3 labels"):
        weighted_knn_votes(QUERY, GALLERY, LABELS[:3], num_classes=3)


def test_votes__full_size_at_the_protocol_temperature_is_finite() -> None:
    gallery = np.tile(QUERY, (KNN_K, 1))
    votes = weighted_knn_votes(QUERY, gallery, np.zeros(KNN_K, np.int64), num_classes=1)
    np.testing.assert_allclose(votes, [[200 * math.exp(1 / 0.07)]], rtol=1e-5)
    assert (KNN_K, KNN_TEMPERATURE) == (200, 0.07)


def test_accuracy__by_hand() -> None:
    # Queries at (1, 0) and (-1, 0) with k = 1 find rows 0 and 3: classes 0 and 2.
    queries = np.array([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], np.float32)
    accuracy = knn_accuracy(queries, np.array([0, 2, 1, 3]), GALLERY, LABELS, k=1)
    assert accuracy == 0.5


def test_accuracy__tied_vote_goes_to_the_lowest_class() -> None:
    gallery = np.array([[0.8, 0.6], [0.8, -0.6]], np.float32)
    for label, accuracy in ((1, 1.0), (2, 0.0)):
        found = knn_accuracy(QUERY, np.array([label]), gallery, np.array([2, 1]), k=2)
        assert found == accuracy


def test_accuracy__leave_one_out_excludes_the_image_itself() -> None:
    # Two pairs of near vectors with crossed labels: alone each is right, without itself each wrong.
    angles = np.radians([0, 10, 90, 100])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    labels = np.array([0, 1, 0, 1])
    assert knn_accuracy(embeddings, labels, embeddings, labels, k=1) == 1.0
    own = np.arange(4)
    assert knn_accuracy(embeddings, labels, embeddings, labels, k=1, exclude=own) == 0.0
