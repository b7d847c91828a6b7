"""service.gallery.faiss_index: exact whatever the segments, the dead rows, the ties."""

import itertools
from collections.abc import Callable, Sequence

import faiss
import numpy as np
import orjson
import pytest
from numpy.typing import NDArray

from service.gallery import faiss_index
from service.gallery.faiss_index import FaissSnapshot
from service.gallery.records import Records, records_of
from service.gallery.segment import Segment

Units = Callable[..., NDArray[np.float32]]


def records(vectors: NDArray[np.float32], first: int = 0) -> Records:
    numbers = range(first, first + len(vectors))
    return records_of(
        vectors=vectors,
        ids=[f"i{n}" for n in numbers],
        metadata=[orjson.dumps({"n": n, "even": n % 2 == 0}) for n in numbers],
        seqs=np.asarray(numbers) + 1,
    )


def snapshot(
    vectors: NDArray[np.float32], *, cuts: Sequence[int] = (), dead: Sequence[int] = ()
) -> FaissSnapshot:
    """Cut into segments before each of the rows `cuts`."""
    gone = np.zeros(len(vectors), bool)
    gone[list(dead)] = True
    bounds = sorted({0, *cuts, len(vectors)})
    segments = [Segment.of(records(vectors[a:b], a)) for a, b in itertools.pairwise(bounds)]
    return FaissSnapshot(
        len(vectors), vectors.shape[1], None, tuple(segments), gone, num_dead=len(dead)
    )


def brute_force(
    queries: NDArray[np.float32],
    vectors: NDArray[np.float32],
    k: int,
    allowed: NDArray[np.bool_],
    exclude: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The plain answer: every cosine in float64, sorted; equal ones by row."""
    rows = np.full((len(queries), k), -1)
    similarities = np.full((len(queries), k), -np.inf, np.float32)
    for place, query in enumerate(queries):
        cosines = (vectors.astype(np.float64) * query).sum(axis=1).clip(-1, 1).astype(np.float32)
        usable = allowed.copy()
        if exclude is not None and exclude[place] >= 0:
            usable[exclude[place]] = False
        best = [r for r in np.lexsort((np.arange(len(vectors)), -cosines)) if usable[r]][:k]
        rows[place, : len(best)] = best
        similarities[place, : len(best)] = cosines[best]
    return rows, similarities


@pytest.mark.parametrize("batch", [1, 30])  # 30 queries of 24 dimensions: faiss multiplies matrices
@pytest.mark.parametrize("cuts", [[], [1], [150], [100, 150, 190]])
def test_search__equals_brute_force(random_units: Units, batch: int, cuts: list[int]) -> None:
    vectors, queries = random_units(200, 24), random_units(batch, 24, 1)
    dead = [0, 3, 77, 120, *range(150, 190)] if cuts else []
    exclude = np.arange(batch, dtype=np.int64) * 3 - 1  # -1, 2, 5, ...
    found = snapshot(vectors, cuts=cuts, dead=dead).search(queries, 10, exclude=exclude)
    allowed = np.ones(200, bool)
    allowed[dead] = False
    rows, similarities = brute_force(queries, vectors, 10, allowed, exclude)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.similarities, similarities)


@pytest.mark.parametrize("share", [0.0, 1.1])  # in the segments, or in a copy of the rows
def test_search__among_some_rows_gives_as_many_as_there_are(
    random_units: Units, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(faiss_index, "_BLOCK_ROWS", 16)
    monkeypatch.setattr(faiss_index, "GATHERED_SHARE", share)
    vectors, queries = random_units(100, 8), random_units(5, 8, 1)
    small = snapshot(vectors, cuts=[70], dead=[2, 4])
    among = small.matching({"even": [True]})
    assert among.tolist() == [n for n in range(0, 100, 2) if n not in (2, 4)]
    exclude = np.asarray([-1, 6, 98, 0, 1])
    for k in (1, 7, 60):
        found = small.search(queries, k, exclude=exclude, among=among)
        rows, similarities = brute_force(
            queries, vectors, k, np.isin(np.arange(100), among), exclude
        )
        np.testing.assert_array_equal(found.rows, rows)
        np.testing.assert_array_equal(found.similarities, similarities)


@pytest.mark.parametrize("most", [4096, 16])  # proposed by faiss, or all of them looked at
def test_search__orders_equal_items_by_writing_however_many_there_are(
    random_units: Units, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(faiss_index, "MAX_CANDIDATES", most)
    monkeypatch.setattr(faiss_index, "_RESCORE_FLOATS", 128)  # 16 vectors at a time
    vectors = np.repeat(random_units(2, 8), 300, axis=0)  # more ties than are proposed at first
    queries = np.stack([vectors[0], vectors[-1]])
    for cuts in ([], [450], [3, 290, 310]):
        small = snapshot(vectors, cuts=cuts, dead=[0, 5])
        found = small.search(queries, 8, exclude=np.asarray([2, -1]))
        assert found.rows.tolist() == [[1, 3, 4, 6, 7, 8, 9, 10], [*range(300, 308)]]
        assert (np.ptp(found.similarities, axis=1) == 0).all()
        found = small.search(queries[:1], 3, among=np.asarray([7, 299, 400, 599]))
        assert found.rows.tolist() == [[7, 299, 400]]


def test_search__among_the_least_similar_finds_all_that_are_asked_for(
    random_units: Units, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss_index, "MAX_CANDIDATES", 64)
    vectors = random_units(500, 8)
    (query,) = random_units(1, 8, 1)
    farthest = np.sort(np.argsort(vectors @ query)[:100])  # a fifth of all, none near the top
    found = snapshot(vectors, cuts=[300]).search(query[None], 9, among=farthest)
    allowed = np.isin(np.arange(500), farthest)
    rows, similarities = brute_force(query[None], vectors, 9, allowed)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.similarities, similarities)


def test_search__orders_near_ties_as_float64_does() -> None:
    generator = np.random.default_rng(0)
    near = 1 + generator.standard_normal((400, 256)) * 1e-4  # cosines differ by less than float32
    vectors = (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float32)
    rows, _ = brute_force(vectors[:3], vectors, 5, np.ones(400, bool))
    for cuts in ([], [37], [100, 200]):
        found = snapshot(vectors, cuts=cuts).search(vectors[:3], 5)
        np.testing.assert_array_equal(found.rows, rows)


def test_search__of_an_empty_gallery_finds_nothing() -> None:
    found = snapshot(np.empty((0, 4), np.float32)).search(np.eye(4, dtype=np.float32), 3)
    assert (found.rows == -1).all()
    assert (found.similarities == -np.inf).all()


def test_row__is_none_for_the_dead_and_the_unknown(random_units: Units) -> None:
    small = snapshot(random_units(6, 4), cuts=[4], dead=[1])
    assert [small.row(f"i{n}") for n in range(7)] == [0, None, 2, 3, 4, 5, None]
    assert len(small) == 5
    assert small.item(5).metadata == {"n": 5, "even": False}


def test_page__walks_through_everything_once(random_units: Units) -> None:
    small = snapshot(random_units(10, 4), cuts=[7], dead=[0, 3])
    seen, after = [], 0
    while True:
        page = small.page(after=after, limit=3)
        seen.append(page.rows.tolist())
        if page.next is None:
            break
        after = page.next
    assert seen == [[1, 2, 4], [5, 6, 7], [8, 9]]
    assert small.page(after=0, limit=8).next is None  # exactly the last ones
    assert small.page(after=10, limit=8).rows.tolist() == []
    assert small.page(after=4, limit=2).rows.tolist() == [4, 5]  # the cursor's own item is gone


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        ({"n": [1, 2]}, [1, 2]),
        ({"n": [1.0]}, [1]),
        ({"even": [True]}, [0, 2]),
        ({"even": [1]}, []),  # JSON's true is not 1
        ({"n": [1], "even": [True]}, []),
        ({"n": [True]}, []),
        ({"none": [None]}, []),
        ({"n": []}, []),
    ],
)
def test_matching__compares_as_json_does(
    random_units: Units, wanted: dict[str, list[object]], rows: list[int]
) -> None:
    assert snapshot(random_units(4, 4), cuts=[3]).matching(wanted).tolist() == rows


def test_blas_threshold__is_set() -> None:
    assert faiss.cvar.distance_compute_blas_threshold == 800
