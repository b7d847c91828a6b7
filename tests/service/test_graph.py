"""service.graph: carried from version to version, it equals a new one, and training's."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from service.gallery.faiss_index import FaissSnapshot
from service.gallery.records import records_of
from service.gallery.segment import Segment
from service.graph import ItemGraph, built_graph, carried_graph, marks_of
from trainer.representation.neighbours import exact_graph

Units = Callable[..., NDArray[np.float32]]


def silent(done: int, total: int) -> None:
    """No progress is wanted."""


def snapshot_of(
    vectors: NDArray[np.float32], seqs: NDArray[np.int64], version: int, *, main: int | None = None
) -> FaissSnapshot:
    """Items in the order of their sequence numbers; the first `main` of them in the main segment,
    each followed by a dead row, so that rows are not places."""
    main = len(vectors) if main is None else main
    doubled = np.repeat(np.arange(main), 2)
    dead = np.zeros(2 * main + len(vectors) - main, bool)
    dead[1 : 2 * main : 2] = True
    segments = [
        Segment.of(
            records_of(
                vectors=vectors[places],
                ids=[f"i{p}" for p in places],
                metadata=[b"{}"] * len(places),
                seqs=seqs[places],
            )
        )
        for places in (doubled, np.arange(main, len(vectors)))
        if len(places)
    ]
    return FaissSnapshot(version, vectors.shape[1], None, tuple(segments), dead, main)


class Items:
    """The items of a gallery as a plain list, and snapshots of them."""

    def __init__(self, draw: np.random.Generator, grid: int) -> None:
        self._draw, self._grid = draw, grid
        self.version = 0
        self.vectors: list[NDArray[np.float32]] = []
        self.seqs: list[int] = []

    def add(self, count: int) -> None:
        for _ in range(count):
            # Few different vectors: ties and equal items are met again and again.
            vector = self._draw.integers(-self._grid, self._grid + 1, 3) + np.asarray([0, 0, 0.5])
            self.version += 1
            self.seqs.append(self.version)
            self.vectors.append((vector / np.linalg.norm(vector)).astype(np.float32))

    def delete(self, count: int) -> None:
        for place in sorted(self._draw.permutation(len(self.seqs))[:count], reverse=True):
            self.version += 1
            del self.seqs[place], self.vectors[place]

    def snapshot(self) -> FaissSnapshot:
        vectors = np.asarray(self.vectors, np.float32).reshape(-1, 3)
        main = int(self._draw.integers(0, len(vectors) + 1))
        return snapshot_of(vectors, np.asarray(self.seqs, np.int64), self.version, main=main)


def assert_exact(graph: ItemGraph, k: int) -> None:
    """Equal to training's exact graph in float64 on the same vectors, in the order of writing."""
    vectors = graph.snapshot.vectors(graph.snapshot.rows()).astype(np.float64)
    if not len(vectors):
        assert len(graph) == 0
        return
    # One block: equal products are equal numbers then.
    expected = exact_graph(vectors.clip(-1, 1), k)
    seqs = graph.snapshot.seqs(graph.snapshot.rows())
    names = np.where(expected.neighbours >= 0, seqs[expected.neighbours], -1)
    np.testing.assert_array_equal(graph.seqs, seqs)
    np.testing.assert_array_equal(graph.neighbours, names)
    np.testing.assert_allclose(graph.similarities, expected.similarities, atol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_graph__carried_through_random_changes_is_exact(seed: int) -> None:
    draw = np.random.default_rng(seed)
    items = Items(draw, grid=(1, 2, 3, 30)[seed % 4])
    k = int(draw.integers(1, 9))
    items.add(int(draw.integers(0, 80)))
    graph = built_graph(items.snapshot(), k, progress=silent)
    assert_exact(graph, k)
    for _ in range(20):
        # Mostly small changes beside a gallery that is large enough not to be built anew.
        size = int(draw.choice([1, 2, 5, 60], p=[0.5, 0.2, 0.2, 0.1]))
        if draw.random() < 0.55:
            items.add(size)
        if draw.random() < 0.45:
            items.delete(size)
        snapshot = items.snapshot()
        graph = carried_graph(graph, snapshot, progress=silent)
        assert_exact(graph, k)


class Counting:
    """A snapshot that counts what is searched for."""

    def __init__(self, snapshot: FaissSnapshot) -> None:
        self.snapshot, self.searched = snapshot, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.snapshot, name)

    def __len__(self) -> int:
        return len(self.snapshot)

    def search(self, queries: NDArray[np.float32], k: int, **options: object) -> object:
        self.searched += len(queries)
        return self.snapshot.search(queries, k, **options)  # type: ignore[arg-type]


def test_graph__searches_only_for_what_changed(random_units: Units) -> None:
    vectors, seqs = random_units(200, 6), np.arange(1, 201)
    graph = built_graph(snapshot_of(vectors, seqs, 200), 4, progress=silent)
    more = random_units(3, 6, seed=5)
    grown = Counting(snapshot_of(np.concatenate([vectors, more]), np.arange(1, 204), 203))
    graph = carried_graph(graph, grown, progress=silent)  # type: ignore[arg-type]
    assert grown.searched == 3
    gone = 17
    held = int((graph.neighbours == seqs[gone]).any(axis=1).sum())
    left = np.delete(np.arange(203), gone)
    shrunk = Counting(
        snapshot_of(np.concatenate([vectors, more])[left], np.arange(1, 204)[left], 204)
    )
    graph = carried_graph(graph, shrunk, progress=silent)  # type: ignore[arg-type]
    assert (shrunk.searched, held > 0) == (held, True)
    assert_exact(replace(graph, snapshot=shrunk.snapshot), 4)


def test_graph__is_not_changed_by_the_one_carried_on(random_units: Units) -> None:
    vectors = random_units(50, 6)
    old = built_graph(snapshot_of(vectors[:48], np.arange(1, 49), 48), 4, progress=silent)
    before = old.neighbours.copy(), old.similarities.copy()
    carried_graph(old, snapshot_of(vectors, np.arange(1, 51), 50), progress=silent)
    np.testing.assert_array_equal(old.neighbours, before[0])
    np.testing.assert_array_equal(old.similarities, before[1])


def test_graph__sees_who_is_nearer_by_less_than_products_are_exact(random_units: Units) -> None:
    vectors = random_units(20, 128)
    # Each of them nearer to item 0 than item 1 was, by a millionth.
    closer = vectors[1] + 2e-6 * vectors[0] * np.arange(1, 4)[:, None]
    closer = (closer / np.linalg.norm(closer, axis=1, keepdims=True)).astype(np.float32)
    vectors = np.concatenate([vectors[:2], closer])
    graph = built_graph(snapshot_of(vectors[:2], np.arange(1, 3), 2), 1, progress=silent)
    assert graph.neighbours[0].tolist() == [2]
    for count in (3, 4, 5):
        snapshot = snapshot_of(vectors[:count], np.arange(1, count + 1), count)
        graph = carried_graph(graph, snapshot, progress=silent)
        assert graph.neighbours[0].tolist() == [count]


def test_edges__are_what_a_search_finds_however_rows_are_numbered(random_units: Units) -> None:
    vectors, seqs = random_units(60, 6), np.arange(1, 61)
    graph = built_graph(snapshot_of(vectors, seqs, 60), 7, progress=silent)
    for main in (60, 0, 33):  # the same version, cut into segments otherwise
        other = snapshot_of(vectors, seqs, 60, main=main)
        rows = other.rows()[[0, 59, 30]]
        found = other.search(other.vectors(rows), 5, exclude=rows)
        np.testing.assert_array_equal(graph.edges(other, rows, 5), found.rows)


def test_edges__end_in_none_where_there_are_fewer_items(random_units: Units) -> None:
    graph = built_graph(snapshot_of(random_units(3, 6), np.arange(1, 4), 3), 4, progress=silent)
    edges = graph.edges(graph.snapshot, graph.rows[:1], 4)
    assert (edges >= 0).sum() == 2
    assert edges[0, 2:].tolist() == [-1, -1]
    assert (graph.size_bytes, graph.version, graph.k) == (3 * 4 * 12, 3, 4)


def test_progress__may_end_the_work(random_units: Units) -> None:
    def stop(done: int, total: int) -> None:
        assert (done, total) == (0, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built_graph(snapshot_of(random_units(3, 6), np.arange(1, 4), 3), 2, progress=stop)


def test_marks__change_with_the_last_bit_of_a_vector(random_units: Units) -> None:
    vectors = random_units(5, 6)
    other = vectors.copy()
    other[3, 5] = np.nextafter(other[3, 5], np.float32(2))
    one, two = (snapshot_of(v, np.arange(1, 6), 5) for v in (vectors, other))
    same = marks_of(one, one.rows()) == marks_of(two, two.rows())
    assert same.tolist() == [True, True, True, False, True]
