"""What a gallery in Milvus does that no other does: a lease, other indexes, a server that is away.

What all galleries do is in test_contract.py.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.gallery.milvus import Store
from service.gallery.milvus_facts import read_state
from service.gallery.milvus_gallery import MilvusGallery
from service.gallery.milvus_snapshot import MilvusSnapshot
from service.gallery.protocol import (
    Applied,
    Change,
    GalleryError,
    GalleryUnreachable,
    Item,
    ItemsChanged,
    StorageError,
    Unsupported,
)
from tests.service.gallery.waiting import WAIT_S, until
from trainer.representation.bundle import Bundle

Units = Callable[..., NDArray[np.float32]]
Open = Callable[..., MilvusGallery]


def do(gallery: MilvusGallery, **change: Any) -> Applied:
    return gallery.apply(Change(**change)).result(WAIT_S)


@pytest.fixture
def open_gallery(bundle: Bundle) -> Iterator[Open]:
    """open_gallery(url, ...) -> a gallery, closed at the end."""
    opened: list[MilvusGallery] = []

    def _open(url: str, **options: Any) -> MilvusGallery:
        options = {"follow_interval_s": 0.02, "imported": bundle.gallery, **options}
        gallery = MilvusGallery(
            Store(url, timeout_s=5.0),
            model_id=bundle.model_id,
            dim=bundle.embedding_dim,
            **options,
        )
        opened.append(gallery)
        return gallery

    yield _open
    for gallery in opened:
        gallery.close()


def test_services__on_one_collection_have_one_writer_at_a_time(
    new_collection: Callable[[], str], open_gallery: Open, random_units: Units
) -> None:
    a, b = random_units(2, 12, 1)
    url = new_collection()
    writer = open_gallery(url)
    reader = open_gallery(url, imported=lambda: pytest.fail("it is there already"))
    assert (writer.is_writer, reader.is_writer) == (True, False)
    seen: list[int] = []
    reader.on_change(lambda snapshot: seen.append(snapshot.version))
    done = do(writer, upserts=[Item("a", a, {})])
    until(lambda: seen == [done.gallery_version])
    assert (len(reader.snapshot()), reader.snapshot().row("a")) == (41, 41)
    with pytest.raises(StorageError, match=r"another service \(.*, process \d+\) writes to"):
        do(reader, upserts=[Item("b", b, {})])
    writer.close()
    until(lambda: reader.is_writer)
    assert do(reader, upserts=[Item("b", b, {})]).gallery_version == 42


def test_a_change__that_broke_off_uses_no_number_twice_and_is_counted(
    new_collection: Callable[[], str],
    open_gallery: Open,
    random_units: Units,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = random_units(2, 12, 1)
    url = new_collection()
    gallery = open_gallery(url)
    with monkeypatch.context() as broken:

        def fail(*_: Any) -> None:
            raise StorageError("no more", full=False)

        broken.setattr(gallery._store, "delete", fail)
        with pytest.raises(StorageError, match="no more"):
            do(gallery, upserts=[Item("a", a, {})], deletes=["train/0000.png"])
    assert gallery.snapshot().version == 40
    # Sent again it comes to the same end; the item that was there already counts as such.
    done = do(gallery, upserts=[Item("a", a, {})], deletes=["train/0000.png"])
    assert done == Applied(44, updated=1, deleted=1)
    assert len(gallery.snapshot()) == len(gallery.snapshot().rows()) == 40
    with monkeypatch.context() as broken:
        broken.setattr(gallery._store, "delete", fail)
        with pytest.raises(StorageError, match="no more"):
            do(gallery, upserts=[Item("b", b, {})], deletes=["train/0001.png"])
    gallery.close()
    again = open_gallery(url)  # whoever comes next takes what is there for done
    assert (again.snapshot().version, len(again.snapshot())) == (46, 41)
    assert do(again, deletes=["b"]).gallery_version == 47


def test_a_server__that_goes_away_refuses_and_comes_back_with_what_was_answered(
    milvus: Any, new_collection: Callable[[], str], open_gallery: Open, random_units: Units
) -> None:
    a, b = random_units(2, 12, 1)
    gallery = open_gallery(new_collection(), max_staleness_s=3600.0)
    do(gallery, upserts=[Item("a", a, {"n": 1})])
    snapshot = gallery.snapshot()
    gallery._store._timeout_s = 0.5
    milvus.kill()
    try:
        with pytest.raises(GalleryUnreachable, match="cannot be searched"):
            snapshot.search(a[None], 1)
        with pytest.raises(StorageError):
            do(gallery, upserts=[Item("b", b, {})])
        until(lambda: gallery.trouble() is not None)
    finally:
        gallery._store._timeout_s = 5.0
        milvus.start()
    until(lambda: gallery.trouble() is None)
    again = gallery.snapshot()
    row = again.row("a")
    assert row is not None
    assert again.item(row).metadata == {"n": 1}
    assert do(gallery, upserts=[Item("b", b, {})]).added == 1


def test_an_index_that_is_not_exact__says_so_and_refuses_what_it_cannot(
    new_collection: Callable[[], str], open_gallery: Open, bundle: Bundle, random_units: Units
) -> None:
    url = new_collection()
    gallery = open_gallery(url, index="hnsw")
    snapshot = gallery.snapshot()
    assert snapshot.index()["exact"] is False
    vectors, queries = bundle.gallery().embeddings, random_units(5, 12, 2)
    found = snapshot.search(queries, 3, exact=False)
    assert not found.exact
    best = np.argsort(-(queries @ vectors.T), axis=1)[:, :3] + 1
    assert (found.rows == best).mean() > 0.9  # of 40 items a graph misses hardly any
    with pytest.raises(Unsupported, match="groups need milvus_index = flat"):
        snapshot.search(queries, 3)
    gallery.close()
    with pytest.raises(GalleryError, match="made with milvus_index = hnsw, the setting is flat"):
        open_gallery(url)


def test_a_gallery__that_is_too_large_is_not_gone_through(
    new_collection: Callable[[], str], open_gallery: Open
) -> None:
    url = new_collection()
    assert len(open_gallery(url, whole_items=40).snapshot().rows()) == 40
    with pytest.raises(Unsupported, match=r"holds 40 items: up to 39 \(milvus_whole_items\)"):
        open_gallery(url, whole_items=39).snapshot().rows()


def test_a_snapshot__says_when_what_it_was_told_is_gone(
    new_collection: Callable[[], str], open_gallery: Open, random_units: Units
) -> None:
    (vector,) = random_units(1, 12, 1)
    gallery = open_gallery(new_collection())
    told, untold = gallery.snapshot(), gallery.snapshot()
    told.items(np.asarray([1]))
    do(gallery, upserts=[Item("train/0000.png", vector, {"new": True})])
    assert told.item(1).metadata == {}  # what it was told stays
    with pytest.raises(ItemsChanged, match="1 items were replaced or deleted"):
        untold.vectors(np.asarray([1, 2]))
    # A listing that goes on meanwhile does not miss what has moved to its end.
    assert [i.id for i in untold.items(untold.rows())][-1] == "train/0000.png"


def test_a_page__steps_over_numbers_that_nobody_has_any_more(
    milvus: Any, bundle: Bundle, random_units: Units
) -> None:
    store = Store(milvus.url("sparse"))
    store.make_items(12, "flat", "sparse")
    seqs = [1, 2, 90_000, 90_001, 5_000_000]
    vectors = random_units(len(seqs), 12, 1)
    rows = [
        {"id": f"i{seq}", "seq": seq, "metadata": {}, "terms": [], "vector": vector}
        for seq, vector in zip(seqs, vectors, strict=True)
    ]
    store.upsert(store.items, rows)
    snapshot = MilvusSnapshot(store, 6_000_000, 5, dim=12, exact=True, whole_items=100)
    assert snapshot.rows().tolist() == seqs
    page = snapshot.page(after=0, limit=3)
    assert (page.rows.tolist(), page.next) == (seqs[:3], 90_000)
    assert snapshot.page(after=90_000, limit=3).rows.tolist() == seqs[3:]
    store.close()


def test_a_collection__of_somebody_else_is_left_alone(
    new_collection: Callable[[], str], open_gallery: Open
) -> None:
    url = new_collection()
    store = Store(url)
    store.make_items(12, "flat", "not ours")
    with pytest.raises(GalleryError, match="does not say whose it is"):
        open_gallery(url)
    assert (store.count(), read_state(store)) == (0, None)
    store.close()


def test_a_server__that_is_not_there_is_named(open_gallery: Open) -> None:
    with pytest.raises(GalleryUnreachable, match=r"milvus://127\.0\.0\.1:1/a cannot be opened"):
        Store("milvus://user:word@127.0.0.1:1/a", timeout_s=0.2)


def test_threads__share_a_store(
    new_collection: Callable[[], str], open_gallery: Open, bundle: Bundle
) -> None:
    gallery = open_gallery(new_collection())
    vectors, wrong = bundle.gallery().embeddings, []

    def search(n: int) -> None:
        rows = gallery.snapshot().search(vectors[n : n + 1], 1).rows
        if rows.tolist() != [[n + 1]]:
            wrong.append((n, rows))

    threads = [threading.Thread(target=search, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
