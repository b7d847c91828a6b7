"""What every gallery promises, whichever engine holds it: one suite over the log and Milvus."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.gallery.logged import LoggedGallery
from service.gallery.milvus_gallery import MilvusGallery
from service.gallery.protocol import (
    Applied,
    Change,
    Filter,
    Gallery,
    GalleryError,
    Idempotency,
    IdempotencyConflict,
    Item,
    Snapshot,
    TooManyMatches,
)
from trainer.representation.bundle import Bundle, open_bundle

WAIT_S = 60
Units = Callable[..., NDArray[np.float32]]
Open = Callable[..., Gallery]
# Texts that mean something to those who quote badly.
HOSTILE = (
    'quote " quote', "apostrophe ' or ' 1 == 1", "backslash \\", '\\"', "line\nend\r\n", "tab\tt",
    '"] or seq > 0 or id in ["', "{placeholder}", "%s %(a)s", "é ü 日本 🐈", "\x00\x1b\x7f\u2028",
    "a/b/../c", "$meta", "True", " ", "x" * 512, "🐈" * 512,
)  # fmt: skip


def do(gallery: Gallery, **change: Any) -> Applied:
    return gallery.apply(Change(**change)).result(WAIT_S)


@pytest.fixture(params=["log", "milvus"])
def open_gallery(request: pytest.FixtureRequest, bundle: Bundle, tmp_path: Path) -> Iterator[Open]:
    """open_gallery() -> always the same gallery, opened again; what is open is closed first."""
    opened: list[Gallery] = []
    if request.param == "milvus":
        from service.gallery.milvus import Store

        url = request.getfixturevalue("new_collection")()

    def _open(of: Bundle = bundle, **options: Any) -> Gallery:
        for gallery in opened:
            gallery.close()
        opened.clear()
        if request.param == "log":
            opened.append(LoggedGallery(tmp_path / "state", of, **options))
        else:
            opened.append(
                MilvusGallery(
                    Store(url),
                    model_id=of.model_id,
                    dim=of.embedding_dim,
                    imported=of.gallery,
                    **options,
                )
            )
        return opened[0]

    yield _open
    for gallery in opened:
        gallery.close()


def content(snapshot: Snapshot) -> dict[str, tuple[bytes, Any]]:
    return {i.id: (i.vector.tobytes(), i.metadata) for i in snapshot.items(snapshot.rows())}


def found_ids(snapshot: Snapshot, vector: NDArray[np.float32], k: int, **how: Any) -> list[str]:
    rows = snapshot.search(vector[None], k, **how).rows[0]
    return list(snapshot.ids(rows[rows >= 0]))


def test_gallery__begins_with_the_bundles_and_is_there_again(
    open_gallery: Open, bundle: Bundle, random_units: Units
) -> None:
    (vector,) = random_units(1, 12, 1)
    imported = bundle.gallery()
    snapshot = open_gallery().snapshot()
    assert (len(snapshot), snapshot.version) == (40, 40)
    assert content(snapshot) == {
        item_id: (embedding.tobytes(), {})
        for item_id, embedding in zip(imported.ids, imported.embeddings, strict=True)
    }
    gallery = open_gallery()
    do(gallery, upserts=[Item("a", vector, {"n": 1})], deletes=["train/0003.png"])
    kept = content(gallery.snapshot())
    again = open_gallery().snapshot()
    assert (again.version, len(again)) == (42, 40)
    assert content(again) == kept


def test_gallery__counts_what_a_change_does(open_gallery: Open, random_units: Units) -> None:
    a, b, c = random_units(3, 12, 1)
    gallery = open_gallery()
    new, old = Item("a", a, {}), Item("train/0001.png", b, {})
    assert do(gallery, upserts=[new, old]) == Applied(42, 1, 1)
    assert do(gallery, deletes=["a", "zz", "train/0002.png"]) == Applied(
        44, deleted=2, missing=("zz",)
    )
    assert do(gallery, deletes=["zz"]) == Applied(44, missing=("zz",))
    # Twice in one change: the last one stays.
    twice = [Item("t", a, {"n": 1}), Item("t", c, {"n": 2})]
    assert do(gallery, upserts=twice) == Applied(46, 1, 1)
    snapshot = gallery.snapshot()
    assert (snapshot.version, len(snapshot)) == (46, 40)
    row = snapshot.row("t")
    assert row is not None
    assert snapshot.item(row).metadata == {"n": 2}
    np.testing.assert_array_equal(snapshot.item(row).vector, c)


def test_gallery__of_another_model_is_refused(
    open_gallery: Open, tmp_path: Path, make_bundle: Callable[..., Path]
) -> None:
    open_gallery()
    other = open_bundle(make_bundle(tmp_path / "other", seed=5))
    with pytest.raises(GalleryError, match="vectors of two models cannot be compared"):
        open_gallery(other)
    assert len(open_gallery().snapshot()) == 40


def test_gallery__remembers_an_answer_and_refuses_the_key_for_another_request(
    open_gallery: Open, random_units: Units
) -> None:
    vectors, now = random_units(3, 12, 1), [1000.0]
    options: dict[str, Any] = {"idempotency_ttl_s": 60, "clock": lambda: now[0]}
    gallery = open_gallery(**options)
    key = Idempotency("k\"' or 1", "digest")
    # Longer than any one text of Milvus.
    rejected = tuple({"id": f"é{n}" + "x" * 400, "reason": "no"} for n in range(300))
    assert gallery.recall(key) is None
    first = do(gallery, upserts=[Item("a", vectors[0], {})], idempotency=key, rejected=rejected)
    assert first.rejected == rejected
    assert do(gallery, upserts=[Item("a", vectors[1], {})], idempotency=key) == first
    assert gallery.recall(key) == first
    with pytest.raises(IdempotencyConflict):
        do(gallery, upserts=[Item("a", vectors[1], {})], idempotency=Idempotency(key.key, "other"))
    with pytest.raises(IdempotencyConflict):
        gallery.recall(Idempotency(key.key, "other"))
    gallery = open_gallery(**options)
    assert gallery.recall(key) == first
    assert content(gallery.snapshot())["a"][0] == vectors[0].tobytes()
    now[0] = 1061.0
    assert gallery.recall(key) is None
    assert do(gallery, upserts=[Item("a", vectors[2], {})], idempotency=key).updated == 1


def test_gallery__tells_listeners_of_every_version(open_gallery: Open, random_units: Units) -> None:
    (vector,) = random_units(1, 12, 1)
    gallery = open_gallery()
    seen: list[int] = []
    gallery.on_change(lambda snapshot: seen.append(snapshot.version))
    do(gallery, upserts=[Item("a", vector, {})])
    do(gallery, deletes=["nothing"])
    do(gallery, deletes=["a"])
    assert seen == [41, 42]
    assert gallery.trouble() is None


def test_snapshot__says_where_items_are(open_gallery: Open, random_units: Units) -> None:
    a, b = random_units(2, 12, 1)
    gallery = open_gallery()
    do(gallery, upserts=[Item("a", a, {}), Item("train/0000.png", b, {})])
    snapshot = gallery.snapshot()
    rows = snapshot.rows()
    assert (np.diff(rows) > 0).all()
    # In the order of writing: what was replaced has moved to the end.
    expected = [f"train/{n:04d}.png" for n in range(1, 40)] + ["a", "train/0000.png"]
    assert snapshot.ids(rows).tolist() == expected
    assert snapshot.seqs(rows).tolist() == list(range(2, 43))
    assert [i.id for i in snapshot.items(rows[[3, 0]])] == [expected[3], expected[0]]
    np.testing.assert_array_equal(snapshot.vectors(rows[-2:]), [a, b])
    assert snapshot.vectors(rows[:0]).shape == (0, 12)
    assert snapshot.rows_of(["a", "zz", expected[0]]).tolist() == [rows[-2], -1, rows[0]]
    assert snapshot.row("zz") is None


@pytest.mark.parametrize("k", [1, 5, 40, 60])
def test_search__finds_what_every_cosine_says(
    open_gallery: Open, bundle: Bundle, random_units: Units, brute_force: Callable[..., Any], k: int
) -> None:
    snapshot = open_gallery().snapshot()
    vectors, queries = bundle.gallery().embeddings, random_units(7, 12, 9)
    rows = snapshot.rows()
    for exclude in (None, np.asarray([-1, 0, 5, 39, 7, -1, 20])):
        places, similarities = brute_force(queries, vectors, k, np.ones(40, bool), exclude)
        mine = None if exclude is None else np.where(exclude >= 0, rows[exclude], -1)
        found = snapshot.search(queries, k, exclude=mine)
        assert found.exact
        np.testing.assert_array_equal(found.rows, np.where(places >= 0, rows[places], -1))
        np.testing.assert_allclose(found.similarities, similarities, atol=1e-6)


def test_search__gives_equal_ones_in_the_order_of_writing(
    open_gallery: Open, random_units: Units
) -> None:
    (vector,) = random_units(1, 12, 1)
    gallery = open_gallery()
    names = [f"copy {n}" for n in (3, 1, 4, 0, 5, 2)]
    do(gallery, upserts=[Item(name, vector, {}) for name in names])
    do(gallery, upserts=[Item("copy 1", vector, {})])
    order = ["copy 3", "copy 4", "copy 0", "copy 5", "copy 2", "copy 1"]
    assert found_ids(gallery.snapshot(), vector, 6) == order
    assert found_ids(gallery.snapshot(), vector, 2) == order[:2]


def test_page__goes_through_all_in_the_order_of_writing(
    open_gallery: Open, random_units: Units
) -> None:
    a, b = random_units(2, 12, 1)
    gallery = open_gallery()
    do(gallery, upserts=[Item("train/0005.png", a, {"even": True}), Item("x", b, {"even": True})])
    do(gallery, deletes=[f"train/{n:04d}.png" for n in range(10, 30)])
    snapshot = gallery.snapshot()
    expected = [f"train/{n:04d}.png" for n in (*range(5), *range(6, 10), *range(30, 40))]
    expected += ["train/0005.png", "x"]
    for limit in (1, 4, 21, 100):
        ids: list[str] = []
        cursor: int | None = 0
        while cursor is not None:
            page = snapshot.page(after=cursor, limit=limit)
            assert len(page.rows) <= limit
            ids += snapshot.ids(page.rows).tolist()
            cursor = page.next
        assert ids == expected, limit
    page = snapshot.page(after=0, limit=1, where={"even": [True]})
    assert snapshot.ids(page.rows).tolist() == ["train/0005.png"]
    assert page.next is not None
    page = snapshot.page(after=page.next, limit=1, where={"even": [True]})
    assert (snapshot.ids(page.rows).tolist(), page.next) == (["x"], None)
    assert snapshot.page(after=snapshot.version, limit=3).rows.tolist() == []


METADATA: dict[str, dict[str, Any]] = {
    "one": {"n": 1, "s": "1", "t": True},
    "float": {"n": 1.0, "s": "a", "t": False},
    "true": {"n": True, "s": "A", "t": 1},
    "null": {"n": None, "s": ""},
    "list": {"n": [1], "s": {"a": 1}},
    "big": {"n": 2**53 + 1, "s": "1.0", "f": 0.1},
    "negative": {"n": -0.0, "s": "null", "f": -1.5},
    "none": {},
}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"n": [1]}, {"one", "float"}),
        ({"n": [1.0]}, {"one", "float"}),
        ({"n": [True]}, {"true"}),
        ({"n": [None]}, {"null"}),
        ({"n": [0]}, {"negative"}),
        ({"n": [2**53 + 1]}, {"big"}),
        ({"n": [2**53]}, set()),
        ({"n": ["1"]}, set()),
        ({"s": ["1"]}, {"one"}),
        ({"s": [""]}, {"null"}),
        ({"s": ["a", "A"]}, {"float", "true"}),
        ({"f": [0.1, -1.5]}, {"big", "negative"}),
        ({"n": [1, True], "t": [True, 1]}, {"one", "true"}),
        ({"n": [1], "s": ["A"]}, set()),
        ({"n": []}, set()),
        ({"no such field": [1]}, set()),
        ({"n.a": [1]}, set()),
    ],
    ids=lambda each: str(sorted(each) if isinstance(each, set) else each),
)
def test_filter__compares_as_json_does(
    filtered: Gallery, random_units: Units, wanted: Filter, expected: set[str]
) -> None:
    snapshot = filtered.snapshot()
    page = snapshot.page(after=0, limit=100, where=wanted)
    assert set(snapshot.ids(page.rows)) == expected
    (query,) = random_units(1, 12, 4)
    assert set(found_ids(snapshot, query, 10, where=wanted)) == expected


@pytest.fixture(scope="module", params=["log", "milvus"])
def filtered(
    request: pytest.FixtureRequest,
    bundle: Bundle,
    tmp_path_factory: pytest.TempPathFactory,
    random_units: Units,
) -> Iterator[Gallery]:
    """A gallery with the items of METADATA beside the bundle's."""
    gallery: Gallery
    if request.param == "log":
        gallery = LoggedGallery(tmp_path_factory.mktemp("filtered"), bundle)
    else:
        from service.gallery.milvus import Store

        gallery = MilvusGallery(
            Store(request.getfixturevalue("milvus").url("filtered")),
            model_id=bundle.model_id,
            dim=bundle.embedding_dim,
            imported=bundle.gallery,
        )
    vectors = random_units(len(METADATA), 12, 3)
    rows = zip(METADATA.items(), vectors, strict=True)
    do(gallery, upserts=[Item(i, vector, metadata) for (i, metadata), vector in rows])
    yield gallery
    gallery.close()


def test_hostile_texts__are_texts_and_nothing_more(open_gallery: Open, random_units: Units) -> None:
    gallery = open_gallery()
    vectors = random_units(len(HOSTILE), 12, 3)
    items = [
        Item(text, vector, {text: text, "text": text})
        for text, vector in zip(HOSTILE, vectors, strict=True)
    ]
    assert do(gallery, upserts=items).added == len(HOSTILE)
    snapshot = gallery.snapshot()
    for item in items:
        row = snapshot.row(item.id)
        assert row is not None, item.id
        kept = snapshot.item(row)
        assert (kept.id, kept.metadata) == (item.id, item.metadata)
        for wanted in ({item.id: [item.id]}, {"text": [item.id]}):
            page = snapshot.page(after=0, limit=9, where=wanted)
            assert snapshot.ids(page.rows).tolist() == [item.id]
        assert found_ids(snapshot, item.vector, 1) == [item.id]
    assert len(snapshot) == 40 + len(HOSTILE)
    ordered = list(itertools.chain(HOSTILE, ["train/0000.png"]))
    assert do(gallery, deletes=ordered).deleted == len(ordered)
    assert len(gallery.snapshot()) == len(gallery.snapshot().rows()) == 39


def test_delete_matching__deletes_what_matches_and_refuses_too_many(
    open_gallery: Open, random_units: Units
) -> None:
    gallery = open_gallery()
    vectors = random_units(6, 12, 3)
    do(gallery, upserts=[Item(f"i{n}", v, {"odd": n % 2}) for n, v in enumerate(vectors)])
    with pytest.raises(TooManyMatches, match="finds 3 items"):
        do(gallery, delete_matching={"odd": [1]}, most_matching=2)
    done = do(gallery, delete_matching={"odd": [1]}, most_matching=3)
    assert (done.deleted, done.gallery_version, done.missing) == (3, 49, ())
    snapshot = gallery.snapshot()
    assert [n for n in range(6) if snapshot.row(f"i{n}") is not None] == [0, 2, 4]
    assert do(gallery, delete_matching={"odd": [1]}, most_matching=3).deleted == 0
