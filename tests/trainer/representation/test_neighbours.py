import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.representation import neighbours
from trainer.representation.neighbours import Neighbours, exact_graph, exact_neighbours


def plain(
    queries: np.ndarray, gallery: np.ndarray, k: int, exclude: np.ndarray | None = None
) -> Neighbours:
    """Every row sorted in full by similarity, then by id."""
    ids = np.full((len(queries), k), -1, np.int64)
    similarities = np.full((len(queries), k), -np.inf, np.float32)
    for row, query in enumerate(queries):
        scores = (gallery @ query).astype(np.float32)
        order = list(np.lexsort((np.arange(len(gallery)), -scores)))
        if exclude is not None:
            order = [i for i in order if i != exclude[row]]
        best = order[:k]
        ids[row, : len(best)] = best
        similarities[row, : len(best)] = scores[best]
    return Neighbours(ids, similarities)


def assert_same(found: Neighbours, expected: Neighbours) -> None:
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.similarities, expected.similarities)
    assert found.ids.dtype == np.int64
    assert found.similarities.dtype == np.float32


def eighths(rng: np.random.Generator, rows: int, dim: int, levels: int) -> np.ndarray:
    """Multiples of 1/8: sums of their products are exact in any order, so that ties are ties."""
    return rng.integers(-levels, levels + 1, (rows, dim)).astype(np.float32) / 8


@pytest.mark.parametrize("block", [1, 2, 7, 50, 8192])
@pytest.mark.parametrize("k", [1, 3, 50, 60])
def test_exact__equals_a_full_sort(k: int, block: int) -> None:
    rng = np.random.default_rng(k)
    queries, gallery = eighths(rng, 11, 6, 8), eighths(rng, 50, 6, 8)
    exclude = rng.integers(-1, 50, 11)
    assert_same(exact_neighbours(queries, gallery, k, block=block), plain(queries, gallery, k))
    assert_same(
        exact_neighbours(queries, gallery, k, exclude=exclude, block=block),
        plain(queries, gallery, k, exclude),
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(0, 5),
    count=st.integers(0, 40),
    dim=st.integers(1, 3),
    k=st.integers(1, 45),
    block=st.integers(1, 45),
)
def test_exact__heavy_ties_in_ascending_order_of_id(
    seed: int, batch: int, count: int, dim: int, k: int, block: int
) -> None:
    rng = np.random.default_rng(seed)
    queries, gallery = eighths(rng, batch, dim, 1), eighths(rng, count, dim, 1)
    exclude = rng.integers(-1, max(count, 1), batch)
    found = exact_neighbours(queries, gallery, k, exclude=exclude, block=block)
    assert_same(found, plain(queries, gallery, k, exclude))


def test_exact__all_equal_gives_the_first_ids() -> None:
    found = exact_neighbours(np.ones((1, 2)), np.ones((9, 2)), 4, block=2)
    assert found.ids.tolist() == [[0, 1, 2, 3]]
    assert found.similarities.tolist() == [[2.0, 2.0, 2.0, 2.0]]


def test_exact__more_queries_than_a_query_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "QUERY_BLOCK", 4)
    rng = np.random.default_rng(3)
    queries, gallery = eighths(rng, 13, 5, 3), eighths(rng, 20, 5, 3)
    exclude = np.arange(13)
    found = exact_neighbours(queries, gallery, 6, exclude=exclude, block=7)
    assert_same(found, plain(queries, gallery, 6, exclude))


def test_exact__fewer_than_k_end_in_minus_one() -> None:
    found = exact_neighbours(np.eye(2), np.eye(2), 3, exclude=np.array([0, -1]))
    assert found.ids.tolist() == [[1, -1, -1], [1, 0, -1]]
    assert found.similarities.tolist() == [[0.0, -np.inf, -np.inf], [1.0, 0.0, -np.inf]]


def test_exact__empty_gallery() -> None:
    found = exact_neighbours(np.ones((2, 3)), np.empty((0, 3)), 2)
    assert found.ids.tolist() == [[-1, -1], [-1, -1]]


def test_graph__by_hand() -> None:
    """Unit vectors at 0, 20, 50 and 90 degrees: the smaller the angle between, the nearer."""
    angles = np.radians([0, 20, 50, 90])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    graph = exact_graph(embeddings, 2)
    assert graph.neighbours.tolist() == [[1, 2], [0, 2], [1, 3], [2, 1]]
    cosines = np.cos(np.radians([[20, 50], [20, 30], [30, 40], [40, 70]]))
    np.testing.assert_allclose(graph.similarities, cosines, atol=1e-6)


def test_graph__no_node_is_its_own_neighbour_even_among_copies() -> None:
    graph = exact_graph(np.ones((4, 2), np.float32), 5)
    assert graph.neighbours.tolist() == [
        [1, 2, 3, -1, -1],
        [0, 2, 3, -1, -1],
        [0, 1, 3, -1, -1],
        [0, 1, 2, -1, -1],
    ]


def test_graph__one_node_has_no_neighbour() -> None:
    assert exact_graph(np.ones((1, 2), np.float32), 3).neighbours.tolist() == [[-1, -1, -1]]


@pytest.mark.parametrize(
    ("queries", "gallery", "k", "exclude", "said"),
    [
        ((2, 3), (4, 2), 1, None, r"queries \(2, 3\) and gallery \(4, 2\)"),
        ((3,), (4, 3), 1, None, r"queries \(3,\)"),
        ((2, 3), (4, 3), 0, None, "k must be at least 1, got 0"),
        ((2, 3), (4, 3), 1, [0], r"exclude must be \(2,\), got \(1,\)"),
    ],
)
def test_exact__shapes_that_do_not_fit(
    queries: tuple[int, ...], gallery: tuple[int, ...], k: int, exclude: list[int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        exact_neighbours(np.ones(queries), np.ones(gallery), k, exclude=exclude)
