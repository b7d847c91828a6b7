"""service.gallery.faiss_index: exact whatever the segments, the dead rows, the ties."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from service.gallery import faiss_index
from service.gallery.choice import Choice, Kind
from service.gallery.faiss_index import FaissSnapshot
from service.gallery.records import Records
from service.gallery.segment import Segment

Units = Callable[..., NDArray[np.float32]]
Make = Callable[..., FaissSnapshot]
Plain = Callable[..., tuple[NDArray[np.int64], NDArray[np.float32]]]


@pytest.mark.parametrize("batch", [1, 30])  # 30 queries of 24 dimensions: faiss multiplies matrices
@pytest.mark.parametrize("cuts", [[], [1], [150], [100, 150, 190]])
def test_search__equals_brute_force(
    random_units: Units, batch: int, cuts: list[int], snapshot: Make, brute_force: Plain
) -> None:
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
    random_units: Units,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    snapshot: Make,
    brute_force: Plain,
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
    random_units: Units, monkeypatch: pytest.MonkeyPatch, most: int, snapshot: Make
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
    random_units: Units, monkeypatch: pytest.MonkeyPatch, snapshot: Make, brute_force: Plain
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


def test_search__orders_near_ties_as_float64_does(snapshot: Make, brute_force: Plain) -> None:
    generator = np.random.default_rng(0)
    near = 1 + generator.standard_normal((400, 256)) * 1e-4  # cosines differ by less than float32
    vectors = (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float32)
    rows, _ = brute_force(vectors[:3], vectors, 5, np.ones(400, bool))
    for cuts in ([], [37], [100, 200]):
        found = snapshot(vectors, cuts=cuts).search(vectors[:3], 5)
        np.testing.assert_array_equal(found.rows, rows)


def test_search__of_an_empty_gallery_finds_nothing(snapshot: Make) -> None:
    found = snapshot(np.empty((0, 4), np.float32)).search(np.eye(4, dtype=np.float32), 3)
    assert (found.rows == -1).all()
    assert (found.similarities == -np.inf).all()


def test_row__is_none_for_the_dead_and_the_unknown(random_units: Units, snapshot: Make) -> None:
    small = snapshot(random_units(6, 4), cuts=[4], dead=[1])
    assert [small.row(f"i{n}") for n in range(7)] == [0, None, 2, 3, 4, 5, None]
    assert len(small) == 5
    assert small.item(5).metadata == {"n": 5, "even": False}


def test_page__walks_through_everything_once(random_units: Units, snapshot: Make) -> None:
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
    random_units: Units, wanted: dict[str, list[object]], rows: list[int], snapshot: Make
) -> None:
    assert snapshot(random_units(4, 4), cuts=[3]).matching(wanted).tolist() == rows


def test_blas_threshold__is_set() -> None:
    assert faiss.cvar.distance_compute_blas_threshold == 800


def segment_of(kind: Kind, directory: Path) -> Callable[[Records], Segment]:
    effort = {"flat": 0, "flat-fp16": 0, "hnsw": 64, "ivf": 12}[kind]
    return lambda records: Segment.indexed(records, Choice(kind, effort), directory=directory)


@pytest.mark.parametrize("kind", ["flat", "flat-fp16", "hnsw", "ivf"])
@pytest.mark.parametrize("seed", [1, 2])
def test_search__of_every_kind_equals_brute_force_where_it_says_exact(
    tmp_path: Path, clustered: Units, snapshot: Make, brute_force: Plain, kind: Kind, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    vectors = clustered(700, seed=seed)
    vectors[300:320] = vectors[299]  # ties
    dead = np.sort(generator.choice(700, 150, replace=False)).tolist()
    small = snapshot(vectors, cuts=[600, 680], dead=dead, first=segment_of(kind, tmp_path))
    queries = np.concatenate([vectors[299:301], clustered(12, seed=seed + 10)])
    exclude = np.where(np.arange(14) % 3 == 0, 299, -1)
    live = np.ones(700, bool)
    live[dead] = False
    for k in (1, 10, 560):
        rows, similarities = brute_force(queries, vectors, k, live, exclude)
        found = small.search(queries, k, exclude=exclude)
        assert found.exact
        np.testing.assert_array_equal(found.rows, rows)
        np.testing.assert_array_equal(found.similarities, similarities)
        among = small.matching({"even": [True]})
        rows, _ = brute_force(queries, vectors, k, live & (np.arange(700) % 2 == 0), exclude)
        found = small.search(queries, k, exclude=exclude, among=among, exact=False)
        assert found.exact  # a filter is always searched exactly
        np.testing.assert_array_equal(found.rows, rows)


def test_search__in_half_precision_orders_what_halves_cannot_tell_apart(
    tmp_path: Path, snapshot: Make, brute_force: Plain
) -> None:
    generator = np.random.default_rng(0)
    near = 1 + generator.standard_normal((600, 64)) * 0.02  # cosines differ by 0.0004
    vectors = (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float32)
    small = snapshot(vectors, first=segment_of("flat-fp16", tmp_path))
    rows, similarities = brute_force(vectors[:20], vectors, 5, np.ones(600, bool))
    found = small.search(vectors[:20], 5)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.similarities, similarities)


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
@pytest.mark.parametrize(
    ("cuts", "dead"), [([], []), ([600], []), ([600, 680], range(0, 700, 5)), ([], range(650))]
)
def test_search__approximately_finds_nearly_all_and_never_fewer(
    tmp_path: Path,
    clustered: Units,
    snapshot: Make,
    brute_force: Plain,
    kind: Kind,
    cuts: list[int],
    dead: Any,
) -> None:
    vectors, queries = clustered(700), clustered(40, seed=5)
    small = snapshot(vectors, cuts=cuts, dead=list(dead), first=segment_of(kind, tmp_path))
    live = np.ones(700, bool)
    live[list(dead)] = False
    exclude = np.full(40, -1)
    exclude[::2] = np.flatnonzero(live)[7]
    for k, left_out in ((10, None), (10, exclude), (60, None), (60, exclude), (1000, exclude)):
        found = small.search(queries, k, exclude=left_out, exact=False)
        rows, _ = brute_force(queries, vectors, k, live, left_out)
        counts = (found.rows >= 0).sum(axis=1)
        np.testing.assert_array_equal(counts, (rows >= 0).sum(axis=1))
        hits = [len(set(a[a >= 0]) & set(b)) for a, b in zip(rows, found.rows, strict=True)]
        assert sum(hits) >= 0.95 * counts.sum()
        if left_out is not None:
            assert not (found.rows == left_out[:, None])[left_out >= 0].any()
        present = found.rows >= 0
        assert live[found.rows[present]].all()
        assert (found.similarities[:, 1:] <= found.similarities[:, :-1]).all()
        products = np.einsum("bkd,bd->bk", vectors[found.rows], queries)
        np.testing.assert_allclose(
            found.similarities[present], products[present].clip(-1, 1), atol=1e-3
        )
        assert np.abs(found.similarities[present]).max() <= 1


def test_search__says_that_it_was_approximate(
    tmp_path: Path, clustered: Units, snapshot: Make
) -> None:
    vectors = clustered(300)
    small = snapshot(vectors, first=segment_of("hnsw", tmp_path))
    assert not small.search(vectors[:2], 3, exact=False).exact
    assert small.search(vectors[:2], 3).exact
    assert snapshot(vectors).search(vectors[:2], 3, exact=False).exact  # there is nothing else
