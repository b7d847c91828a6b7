import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.representation.neighbours import KnnGraph
from trainer.representation.propagation import (
    all_walks,
    hardest_positives,
    pick_positives,
    propagate,
    propagate_paths,
)

# Eight points on a circle at 0, 20, 32, 48, -36, 100, 140, 210 degrees, k = 2: the worked example.
EXAMPLE = np.array([[1, 2], [2, 0], [1, 3], [2, 1], [0, 1], [6, 3], [5, 7], [6, 5]])


def knn_graph(neighbours: np.ndarray) -> KnnGraph:
    return KnnGraph(neighbours, np.zeros(neighbours.shape, np.float32))


def width(k: int, steps: int) -> int:
    return sum(k**hop for hop in range(1, steps + 1))


def breadth_first(neighbours: np.ndarray, anchor: int, steps: int) -> list[tuple[int, int, int]]:
    """(id, step, via) in order of discovery, with a set and lists: the plain reference."""
    seen, found, frontier = {anchor}, [], [anchor]
    for step in range(1, steps + 1):
        discovered = []
        for node in frontier:
            for target in neighbours[node].tolist():
                if target >= 0 and target not in seen:
                    seen.add(target)
                    discovered.append(target)
                    found.append((target, step, node))
        frontier = discovered
    return found


def easiest(reached: np.ndarray, similarities: np.ndarray, count: int) -> np.ndarray:
    return pick_positives(reached, similarities, count, hardest=False)[0]


@st.composite
def graphs(draw: st.DrawFn) -> np.ndarray:
    """Any graph at all: self-loops, duplicates, -1 anywhere, K up to and beyond N - 1."""
    count, k = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    least = draw(st.sampled_from([-1, 0]))
    row = st.lists(st.integers(least, count - 1), min_size=k, max_size=k)
    return np.array(draw(st.lists(row, min_size=count, max_size=count)), np.int64)


@settings(max_examples=150, deadline=None)
@given(neighbours=graphs(), steps=st.integers(1, 4))
def test_propagate__is_breadth_first_search(neighbours: np.ndarray, steps: int) -> None:
    anchors = np.arange(len(neighbours))[::-1].copy()
    reached = propagate_paths(knn_graph(neighbours), anchors, steps)
    wide = width(neighbours.shape[1], steps)
    for row, anchor in enumerate(anchors):
        expected = breadth_first(neighbours, int(anchor), steps)
        filled = expected + [(-1, -1, -1)] * (wide - len(expected))
        got = zip(*(part[row].tolist() for part in reached), strict=True)
        assert list(got) == filled
    np.testing.assert_array_equal(propagate(knn_graph(neighbours), anchors, steps), reached.ids)


@settings(max_examples=60, deadline=None)
@given(neighbours=graphs(), steps=st.integers(1, 3))
def test_propagate__torch_equals_numpy(neighbours: np.ndarray, steps: int) -> None:
    anchors = np.arange(len(neighbours))
    in_torch = KnnGraph(torch.tensor(neighbours), torch.zeros(neighbours.shape))
    for function in (propagate_paths, all_walks):
        ours = function(knn_graph(neighbours), anchors, steps)
        theirs = function(in_torch, torch.tensor(anchors), steps)
        for one, other in zip(ours, theirs, strict=True):
            assert isinstance(other, torch.Tensor)
            assert other.dtype == torch.int64
            assert one.dtype == np.int64
            np.testing.assert_array_equal(one, other.numpy())


@settings(max_examples=60, deadline=None)
@given(neighbours=graphs(), steps=st.integers(1, 4))
def test_paths__lead_back_to_the_anchor_along_edges(neighbours: np.ndarray, steps: int) -> None:
    anchors = np.arange(len(neighbours))
    reached = propagate_paths(knn_graph(neighbours), anchors, steps)
    for anchor, *row in zip(anchors.tolist(), *(part.tolist() for part in reached), strict=True):
        step_of = {anchor: 0}
        for node, step, via in zip(*row, strict=True):
            if node < 0:
                continue
            assert node in neighbours[via]
            assert step_of[via] + 1 == step  # the parent stands before its child
            step_of[node] = step


def test_propagate__worked_example() -> None:
    ids = propagate(knn_graph(EXAMPLE), np.array([0, 7]), 2)
    assert ids.tolist() == [[1, 2, 3, -1, -1, -1], [6, 5, 3, -1, -1, -1]]


def test_paths__worked_example() -> None:
    reached = propagate_paths(knn_graph(EXAMPLE), np.array([0, 7]), 2)
    assert reached.steps.tolist() == [[1, 1, 2, -1, -1, -1], [1, 1, 2, -1, -1, -1]]
    assert reached.via.tolist() == [[0, 0, 2, -1, -1, -1], [7, 7, 5, -1, -1, -1]]


def test_walks__worked_example_keeps_repeats_and_the_anchor() -> None:
    walks = all_walks(knn_graph(EXAMPLE), np.array([0, 7]), 2)
    assert walks.ids.tolist() == [[1, 2, 2, 0, 1, 3], [6, 5, 5, 7, 6, 3]]
    assert walks.steps.tolist() == [[1, 1, 2, 2, 2, 2]] * 2
    assert walks.via.tolist() == [[0, 0, 1, 1, 2, 2], [7, 7, 6, 6, 5, 5]]


def test_propagate__a_chain_of_one_neighbour_each() -> None:
    chain = np.array([[1], [2], [3], [0]])  # K = 1, in a ring
    assert propagate(knn_graph(chain), np.array([2]), 1).tolist() == [[3]]
    assert propagate(knn_graph(chain), np.array([2]), 3).tolist() == [[3, 0, 1]]
    assert propagate(knn_graph(chain), np.array([2]), 5).tolist() == [[3, 0, 1, -1, -1]]


def test_propagate__minus_one_is_no_id() -> None:
    # Read as an index, -1 would be the last row, and lead from 0 to 1.
    neighbours = np.array([[-1, -1], [0, -1], [1, -1]])
    assert propagate(knn_graph(neighbours), np.array([0]), 2).tolist() == [[-1] * 6]
    assert propagate(knn_graph(neighbours), np.array([1]), 2).tolist() == [[0] + [-1] * 5]


def test_propagate__everything_is_a_neighbour() -> None:
    neighbours = np.array([[1, 2], [0, 2], [0, 1]])  # K = N - 1
    assert propagate(knn_graph(neighbours), np.array([1]), 2).tolist() == [[0, 2, -1, -1, -1, -1]]


def test_propagate__no_anchors() -> None:
    assert propagate(knn_graph(EXAMPLE), np.array([], np.int64), 3).shape == (0, 2 + 4 + 8)


@pytest.mark.parametrize("steps", [0, -1])
def test_propagate__without_steps(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
        propagate(knn_graph(EXAMPLE), np.array([0]), steps)


def test_hardest__least_similar_first() -> None:
    reached = np.array([[4, 9, 2, 7]])
    similarities = np.array([[0.5, -0.25, 0.75, 0.0]])
    assert hardest_positives(reached, similarities, 2).tolist() == [[9, 7]]
    assert easiest(reached, similarities, 2).tolist() == [[2, 4]]


def test_hardest__ties_keep_their_order() -> None:
    reached = np.array([[4, 9, 2, 7]])
    similarities = np.array([[0.5, 0.25, 0.5, 0.25]])
    assert hardest_positives(reached, similarities, 4).tolist() == [[9, 7, 4, 2]]
    assert easiest(reached, similarities, 4).tolist() == [[4, 2, 9, 7]]


def test_hardest__fewer_than_asked_for() -> None:
    reached = np.array([[4, -1, 2, -1], [-1, -1, -1, -1]])
    similarities = np.array([[0.5, -1.0, 0.75, np.nan], [0.0, 1.0, -1.0, 0.5]])
    assert hardest_positives(reached, similarities, 3).tolist() == [[4, 2, -1], [-1, -1, -1]]
    wide = hardest_positives(reached, similarities, 6)
    assert wide.tolist() == [[4, 2, -1, -1, -1, -1], [-1] * 6]
    assert easiest(reached, similarities, 3).tolist() == [[2, 4, -1], [-1, -1, -1]]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(0, 3),
    wide=st.integers(1, 12),
    count=st.integers(1, 15),
)
def test_hardest__equals_a_plain_sort_in_numpy_and_torch(
    seed: int, batch: int, wide: int, count: int
) -> None:
    rng = np.random.default_rng(seed)
    reached = rng.integers(-1, 5, (batch, wide))
    similarities = (rng.integers(-2, 3, (batch, wide)) / 2).astype(np.float32)  # ties galore
    for hardest in (True, False):
        expected = []
        for ids, values in zip(reached.tolist(), similarities.tolist(), strict=True):
            places = [place for place, node in enumerate(ids) if node >= 0]
            places.sort(key=lambda place: values[place] if hardest else -values[place])
            best = [(ids[place], values[place]) for place in places][:count]
            expected.append(best + [(-1, 0.0)] * (count - len(best)))
        got = pick_positives(reached, similarities, count, hardest=hardest)
        pairs = [
            list(zip(*row, strict=True)) for row in zip(*(p.tolist() for p in got), strict=True)
        ]
        assert pairs == expected
        assert got[0].shape == got[1].shape == (batch, count)
        in_torch = pick_positives(
            torch.tensor(reached), torch.tensor(similarities), count, hardest=hardest
        )
        for one, other in zip(got, in_torch, strict=True):
            np.testing.assert_array_equal(one, other.numpy())
            assert str(one.dtype) == str(other.dtype).removeprefix("torch.")


def test_hardest__none_asked_for() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        hardest_positives(np.array([[1]]), np.array([[0.5]]), 0)
