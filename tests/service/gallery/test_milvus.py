"""What a gallery in Milvus does that no other does: leases, other indexes, a server that goes away.

What all galleries do is in test_contract.py.
"""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.gallery.milvus import Store
from service.gallery.milvus_facts import read_state
from service.gallery.milvus_gallery import MilvusGallery
from service.gallery.milvus_language import any_of, expression_of, place_of, quoted, term, terms_of
from service.gallery.milvus_lease import LEASE_S, Lease
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
from tests.service.conftest import Service
from trainer.representation.bundle import Bundle

WAIT_S = 30
Units = Callable[..., NDArray[np.float32]]
Open = Callable[..., MilvusGallery]
Start = Callable[..., Iterator[Service]]


def do(gallery: MilvusGallery, **change: Any) -> Applied:
    return gallery.apply(Change(**change)).result(WAIT_S)


def until(holds: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


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


@pytest.mark.parametrize(
    ("url", "uri", "name"),
    [
        ("milvus://host/a", "http://host:19530", "milvus://host:19530/a"),
        ("milvus://u:p%40w@host:1/b_1", "http://host:1", "milvus://host:1/b_1"),
        ("milvus+tls://[::1]:2/c", "https://[::1]:2", "milvuss://[::1]:2/c"),
    ],
)
def test_url__says_where_and_its_name_says_no_password(url: str, uri: str, name: str) -> None:
    place = place_of(url)
    assert (place.uri, place.name) == (uri, name.replace("milvuss", "milvus+tls"))
    assert place.password == ("p@w" if "@" in url else "")


@pytest.mark.parametrize(
    "url",
    ["http://h/a", "milvus://h", "milvus://h/", "milvus:///a", "milvus://h/a/b", "milvus://h/a-b",
     "milvus://h:x/a", "milvus://secret:word@h:99999/a", "milvus://h/é", "milvus://h/1a", ""],
)  # fmt: skip
def test_url__that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(GalleryError, match=r"wanted milvus://") as refused:
        place_of(url)
    assert "word" not in str(refused.value)


def test_expressions__hold_nothing_that_a_caller_wrote() -> None:
    wanted = {'"] or 1 == 1 or x in ["': ["\\", 'a"b', True, None, 0.5], "b": [1]}
    made = expression_of(wanted)
    assert set(made) <= set('abcdef0123456789_tr,ins(ms)yl[o"] ')
    assert made.count("array_contains_any") == 2
    assert expression_of({}) == ""
    assert quoted('a"\\\n') == '"a\\"\\\\\\n"'
    assert any_of(["a", 'b"']) == '["a", "b\\""]'
    assert any_of([1, 2]) == "[1, 2]"


def test_terms__are_equal_where_json_values_are() -> None:
    assert term("a", 1) == term("a", 1.0) != term("a", True)
    assert len({term(*pair) for pair in [("a", 1), ("a", "1"), ("a", None), ("b", 1)]}) == 4
    assert term("ab", "c") != term("a", "bc")
    assert terms_of({"a": 1, "l": [1], "d": {}}) == [term("a", 1)]


class Facts:
    """The facts of a store, in a dict."""

    facts = "facts"

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def query(self, collection: str, expression: str, fields: Any) -> list[dict[str, Any]]:
        row = self.rows.get(expression.split('"')[1])
        return [] if row is None else [row]

    def upsert(self, collection: str, rows: list[dict[str, Any]]) -> None:
        self.rows.update((row["name"], row) for row in rows)

    def delete(self, collection: str, expression: str) -> None:
        del self.rows[expression.split('"')[1]]


def test_lease__has_one_holder_and_goes_on_when_that_gives_no_sign_of_life() -> None:
    facts: Any = Facts()
    now = [100.0]

    def lease() -> Lease:
        return Lease(facts, clock=lambda: now[0], sleep=lambda seconds: None)

    one, two = lease(), lease()
    assert not one.keep()
    assert one.take()
    assert not two.take()
    assert "process" in two.holder
    for _ in range(5):  # alive: it counts up
        now[0] += LEASE_S * 0.9
        assert one.keep()
        assert not two.take()
    now[0] += LEASE_S * 0.99
    assert not two.take()
    now[0] += LEASE_S * 0.02
    assert two.take()
    assert not one.keep()  # it comes back, and sees that it was given up
    assert not one.is_held
    assert not one.take()
    two.release()
    assert one.take()


def test_lease__taken_by_two_at_once_is_the_last_ones() -> None:
    facts: Any = Facts()
    two = Lease(facts, sleep=lambda seconds: None)
    taken = []
    one = Lease(facts, sleep=lambda seconds: taken.append(two._write()))
    assert not one.take()
    assert two._confirm(0.0)


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


@pytest.fixture
def pair(
    start_service: Start, new_collection: Callable[[], str], tmp_path: Path
) -> Iterator[tuple[Service, Service, str]]:
    """Two services on one collection: the first writes, the second looks at it every minute."""
    url = new_collection()
    options: dict[str, Any] = {"gallery": url, "thumbnails": False}
    first = start_service(tmp_path / "a", **options)
    one = next(first)
    second = start_service(tmp_path / "b", follow_interval_s=60.0, **options)
    yield one, next(second), url
    for started in (second, first):
        assert next(started, None) is None


def test_service__answers_from_milvus_as_from_its_log(
    pair: tuple[Service, Service, str],
    start_service: Start,
    tmp_path: Path,
    picture: Callable[..., bytes],
) -> None:
    (one, _, url), plain = pair, start_service(tmp_path / "plain", thumbnails=False)
    other = next(plain)
    files = [("images", (f"{n}.png", picture(n), "image/png")) for n in range(3)]
    metadata = '[{"n": 0}, {"n": 1}, {"n": 1}]'

    def ask(service: Service) -> list[Any]:
        client = service.client
        answers = [
            client.post("/items", files=files, data={"metadata": metadata}),
            client.post("/neighbours", json={"ids": ["0.png", "train/0001.png"], "k": 4}),
            client.post(
                "/neighbours?k=3&include=metadata,vector",
                content=picture(1),
                headers={"Content-Type": "image/png"},
            ),
            client.post("/neighbours", json={"ids": ["0.png"], "filter": {"n": 1}, "k": 9}),
            client.post("/groups", json={"ids": ["1.png"], "k": 3, "steps": 2}),
            client.get("/items?limit=7"),
            client.get('/items?filter={"n":1}'),
            client.get("/items/2.png?include=vector"),
            client.get("/items/nothing"),
            client.get("/images/2.png"),
            client.post("/neighbours", json={"ids": ["0.png", "nothing"]}),
            client.get("/map?sample=20"),
            client.delete("/items/2.png"),
            client.post("/items/delete", json={"filter": {"n": 1}}),
        ]
        return [rounded(answer.json()) for answer in answers]

    assert ask(one) == ask(other)
    info = one.client.get("/info").json()
    assert info["gallery"]["database"].startswith("milvus")
    assert (info["gallery"]["items"], info["gallery"]["graph"]["state"]) == (41, "off")
    grouping = one.client.post("/groupings", json={"k": 3, "steps": 2, "min_size": 2})
    assert grouping.status_code == 202
    until(
        lambda: (
            one.client.get(grouping.headers["Location"]).json()["state"]
            not in ("queued", "running")
        )
    )
    done = one.client.get(grouping.headers["Location"]).json()
    assert (done["state"], sum(done["sizes"]) + done["ungrouped"]) == ("succeeded", 41)
    assert next(plain, None) is None
    assert url


def rounded(value: Any) -> Any:
    """The same answer with numbers that may differ in their last place left at five."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    return value


def test_service__reads_what_another_one_has_written_to_milvus(
    pair: tuple[Service, Service, str],
) -> None:
    writer, reader, _ = pair
    line = b'{"id": "new", "vector": [1' + b", 0" * 11 + b"]}"
    kind = {"Content-Type": "application/x-ndjson", "Idempotency-Key": "k"}
    done = writer.client.post("/items", content=line, headers=kind)
    assert done.json()["gallery_version"] == 41
    assert writer.client.post("/items", content=line, headers=kind).json() == done.json()
    header = {"X-Min-Gallery-Version": "41"}
    assert reader.client.get("/items?limit=1").json()["gallery_version"] == 40
    answer = reader.client.post("/neighbours", json={"ids": ["new"]}, headers=header)
    assert (answer.status_code, answer.json()["gallery_version"]) == (200, 41)
    refused = reader.client.post("/items", content=line, headers=kind | {"Idempotency-Key": "l"})
    assert (refused.status_code, refused.json()["code"]) == (503, "storage_failed")
    assert refused.headers["Retry-After"] == "5"


def test_service__says_what_milvus_cannot_do_and_when_it_is_away(
    milvus: Any, start_service: Start, new_collection: Callable[[], str], tmp_path: Path
) -> None:
    started = start_service(
        tmp_path / "a", gallery=new_collection(), thumbnails=False, milvus_index="hnsw",
        milvus_whole_items=10,
    )  # fmt: skip
    client = next(started).client
    exact = client.post("/neighbours", json={"ids": ["train/0001.png"], "exact": True})
    assert (exact.status_code, exact.json()["code"]) == (422, "unsupported_by_gallery")
    found = client.post("/neighbours", json={"ids": ["train/0001.png"]})
    assert (found.status_code, found.json()["exact"]) == (200, False)
    for answer in (
        client.post("/groups", json={"ids": ["train/0001.png"]}),
        client.post("/groupings", json={}),
        client.get("/map"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (422, "unsupported_by_gallery")
    gallery = client.app.state.runtime.gallery  # type: ignore[attr-defined]
    gallery._store._timeout_s = 0.5
    milvus.kill()
    try:
        away = client.get("/items/train/0001.png")
        assert (away.status_code, away.json()["code"]) == (503, "gallery_unreachable")
        until(lambda: client.get("/readyz").status_code == 503)
        assert "Milvus is away" in client.get("/readyz").text
    finally:
        gallery._store._timeout_s = 5.0
        milvus.start()
    until(lambda: client.get("/readyz").status_code == 200)
    assert next(started, None) is None


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
