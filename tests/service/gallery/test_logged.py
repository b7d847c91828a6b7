"""service.gallery.logged: what was answered is there, after restarts too; searches are exact."""

import queue
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray

from service.gallery import levels, logged
from service.gallery.logged import LoggedGallery
from service.gallery.protocol import (
    Applied,
    Change,
    GalleryError,
    Idempotency,
    IdempotencyConflict,
    Item,
    Snapshot,
    StorageError,
)
from trainer.representation.bundle import Bundle, open_bundle

WAIT_S = 30


def item(item_id: str, vector: NDArray[np.float32], **metadata: Any) -> Item:
    return Item(item_id, vector, metadata)


def do(gallery: LoggedGallery, **change: Any) -> Applied:
    return gallery.apply(Change(**change)).result(WAIT_S)


@pytest.fixture
def gallery(bundle: Bundle, tmp_path: Path) -> Iterator[LoggedGallery]:
    gallery = LoggedGallery(tmp_path / "state", bundle)
    yield gallery
    gallery.close()


def test_gallery__starts_with_the_bundles(gallery: LoggedGallery, bundle: Bundle) -> None:
    snapshot, imported = gallery.snapshot(), bundle.gallery()
    assert (len(snapshot), snapshot.version) == (40, 40)
    row = snapshot.row("train/0007.png")
    assert row is not None
    np.testing.assert_array_equal(snapshot.item(row).vector, imported.embeddings[7])


def test_gallery__counts_what_a_change_does(
    gallery: LoggedGallery, random_units: Callable[..., NDArray[np.float32]]
) -> None:
    a, b = random_units(2, 12, 1)
    assert do(gallery, upserts=[item("a", a), item("train/0001.png", b)]) == Applied(42, 1, 1)
    assert do(gallery, deletes=["a", "zz", "train/0002.png"]) == Applied(
        44, deleted=2, missing=("zz",)
    )
    assert do(gallery, deletes=["zz"]) == Applied(44, missing=("zz",))  # nothing changed
    assert gallery.snapshot().version == 44
    assert len(gallery.snapshot()) == 39


def test_gallery__keeps_a_snapshot_as_it_was(
    gallery: LoggedGallery, random_units: Callable[..., NDArray[np.float32]]
) -> None:
    before = gallery.snapshot()
    (vector,) = random_units(1, 12, 1)
    do(gallery, upserts=[item("a", vector)], deletes=["train/0000.png"])
    assert (len(before), before.row("a"), before.row("train/0000.png")) == (40, None, 0)
    assert before.search(vector[None], 40).rows.min() == 0


def test_gallery__remembers_an_answer_and_refuses_the_key_for_another_request(
    bundle: Bundle, tmp_path: Path, random_units: Callable[..., NDArray[np.float32]]
) -> None:
    vectors, now = random_units(3, 12, 1), [1000.0]
    gallery = LoggedGallery(tmp_path, bundle, idempotency_ttl_s=60, clock=lambda: now[0])
    key = Idempotency("k", "digest")
    assert gallery.recall(key) is None
    first = do(gallery, upserts=[item("a", vectors[0])], idempotency=key)
    assert do(gallery, upserts=[item("a", vectors[1])], idempotency=key) == first
    assert gallery.recall(key) == first
    with pytest.raises(IdempotencyConflict):
        do(gallery, upserts=[item("a", vectors[1])], idempotency=Idempotency("k", "other"))
    gallery.close()

    gallery = LoggedGallery(tmp_path, bundle, idempotency_ttl_s=60, clock=lambda: now[0])
    row = gallery.snapshot().row("a")
    assert row is not None
    np.testing.assert_array_equal(gallery.snapshot().item(row).vector, vectors[0])
    assert gallery.recall(key) == first
    now[0] = 1061.0
    assert gallery.recall(key) is None
    assert do(gallery, upserts=[item("a", vectors[2])], idempotency=key).updated == 1
    gallery.close()


def test_gallery__refuses_a_second_owner_and_names_the_first(
    gallery: LoggedGallery, bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(GalleryError, match=r"in use by process \d+: one service owns a state"):
        LoggedGallery(tmp_path / "state", bundle)


def test_gallery__of_another_model_is_refused_and_the_state_is_free_again(
    bundle: Bundle, tmp_path: Path, make_bundle: Callable[..., Path]
) -> None:
    LoggedGallery(tmp_path / "state", bundle).close()
    other = open_bundle(make_bundle(tmp_path / "other", seed=5))
    with pytest.raises(GalleryError, match="vectors of two models cannot be compared"):
        LoggedGallery(tmp_path / "state", other)
    LoggedGallery(tmp_path / "state", bundle).close()


def test_gallery__says_when_the_state_cannot_be_written(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(GalleryError, match="cannot be used: Not a directory"):
        LoggedGallery(tmp_path / "file" / "state", bundle)


def test_gallery__changes_nothing_when_storing_fails(
    gallery: LoggedGallery,
    monkeypatch: pytest.MonkeyPatch,
    random_units: Callable[..., NDArray[np.float32]],
) -> None:
    (vector,) = random_units(1, 12, 1)
    key = Idempotency("k", "d")
    with monkeypatch.context() as broken:

        def full(*_: Any, **__: Any) -> int:
            raise StorageError("database or disk is full", full=True)

        broken.setattr(logged.Writing, "append", full)
        with pytest.raises(StorageError):
            do(gallery, upserts=[item("a", vector)], idempotency=key)
        assert gallery.snapshot().row("a") is None
        assert gallery.recall(key) is None
    assert do(gallery, upserts=[item("a", vector)], idempotency=key).added == 1


def test_gallery__bounds_what_waits(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = LoggedGallery(tmp_path, bundle, max_pending=1)
    monkeypatch.setattr(gallery._queue, "_entries", queue.Queue(1))  # which nobody empties
    gallery.apply(Change(deletes=["a"]))
    with pytest.raises(queue.Full):
        gallery.apply(Change(deletes=["a"]))
    monkeypatch.undo()
    gallery.close()


# Few directions, so that many items are equally similar.
GRID = [
    (np.asarray(v) / np.linalg.norm(v)).astype(np.float32)
    for v in ([1, 0, 0], [0, 1, 0], [1, 1, 0], [-1, 0, 0], [1, 1, 1], [1, 2, 0])
]
IDS = st.sampled_from(["a", "b", "c", "d/e", "f", "g", "h", "i", "j"])
VECTORS = st.sampled_from(range(len(GRID)))
COLOURS = st.sampled_from(["red", "blue"])


class AgainstAModel(RuleBasedStateMachine):
    """The gallery beside a dict that holds (vector, colour) in the order of the last writing."""

    empty_bundle: Bundle

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory()
        self._open()
        self.model: dict[str, tuple[NDArray[np.float32], str]] = {}

    def _open(self) -> None:
        self.gallery = LoggedGallery(Path(self._directory.name), self.empty_bundle)
        self.seen: list[Snapshot] = [self.gallery.snapshot()]
        self.gallery.on_change(self.seen.append)

    def teardown(self) -> None:
        self.gallery.close()
        self._directory.cleanup()

    @rule(written=st.lists(st.tuples(IDS, VECTORS, COLOURS), min_size=1, max_size=4))
    def upsert(self, written: list[tuple[str, int, str]]) -> None:
        done = do(self.gallery, upserts=[item(i, GRID[v], colour=c) for i, v, c in written])
        known = set(self.model)
        added = len({i for i, _, _ in written} - known)
        assert (done.added, done.updated) == (added, len(written) - added)
        for item_id, vector, colour in written:
            self.model.pop(item_id, None)
            self.model[item_id] = (GRID[vector], colour)

    @rule(ids=st.lists(IDS, min_size=1, max_size=3, unique=True))
    def delete(self, ids: list[str]) -> None:
        done = do(self.gallery, deletes=ids)
        assert list(done.missing) == [i for i in ids if i not in self.model]
        for item_id in ids:
            self.model.pop(item_id, None)

    @rule()
    def restart(self) -> None:
        version = self.gallery.snapshot().version
        self.gallery.close()
        self._open()
        assert self.gallery.snapshot().version == version

    def _nearest(self, query: NDArray[np.float32], k: int, among: list[str]) -> list[str]:
        order = list(self.model)
        cosines = {
            i: np.float32(
                min(1, max(-1, sum(float(a) * float(b) for a, b in zip(query, v[0], strict=True))))
            )
            for i, v in self.model.items()
        }
        return sorted(among, key=lambda i: (-cosines[i], order.index(i)))[:k]

    @rule(vector=VECTORS, k=st.integers(1, 12))
    def search(self, vector: int, k: int) -> None:
        snapshot = self.gallery.snapshot()
        rows = snapshot.search(GRID[vector][None], k).rows[0]
        found = [snapshot.item(int(row)).id for row in rows if row >= 0]
        assert found == self._nearest(GRID[vector], k, list(self.model))

    @rule(vector=VECTORS, k=st.integers(1, 5), colour=COLOURS)
    def search_among(self, vector: int, k: int, colour: str) -> None:
        snapshot = self.gallery.snapshot()
        among = snapshot.matching({"colour": [colour]})
        rows = snapshot.search(GRID[vector][None], k, among=among).rows[0]
        found = [snapshot.item(int(row)).id for row in rows if row >= 0]
        matching = [i for i, (_, c) in self.model.items() if c == colour]
        assert found == self._nearest(GRID[vector], k, matching)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), k=st.integers(1, 5))
    def search_by_id(self, data: st.DataObject, k: int) -> None:
        snapshot = self.gallery.snapshot()
        own = data.draw(st.sampled_from(sorted(self.model)))
        row = np.asarray([snapshot.row(own)])
        rows = snapshot.search(snapshot.vectors(row), k, exclude=row).rows[0]
        found = [snapshot.item(int(r)).id for r in rows if r >= 0]
        others = [i for i in self.model if i != own]
        assert found == self._nearest(self.model[own][0], k, others)

    @invariant()
    def lists_the_same_items(self) -> None:
        snapshot = self.gallery.snapshot()
        rows = snapshot.page(after=0, limit=100).rows
        items = [snapshot.item(int(row)) for row in rows]
        assert [(i.id, i.metadata["colour"]) for i in items] == [
            (item_id, colour) for item_id, (_, colour) in self.model.items()
        ]
        assert len(snapshot) == len(self.model)
        assert snapshot.rows().tolist() == rows.tolist()
        seqs = snapshot.seqs(rows).tolist()
        assert seqs == sorted(set(seqs))
        assert self.seen[-1] is snapshot  # what listeners were told last


def test_gallery__agrees_with_a_dict_and_brute_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_bundle: Callable[..., Path]
) -> None:
    # So small that segments are merged and compacted all the time.
    monkeypatch.setattr(levels, "SMALL_ROWS", 2)
    monkeypatch.setattr(levels, "MAX_DEAD", 1)
    bundle = open_bundle(make_bundle(tmp_path / "empty", images=0))
    three = {f: getattr(bundle, f) for f in ("directory", "model_id", "contract", "manifest")}

    class Empty(Bundle):
        def gallery(self) -> Any:
            whole = bundle.gallery()
            return whole._replace(embeddings=np.empty((0, 3), np.float32))

    machine = type(
        "Machine",
        (AgainstAModel,),
        {"empty_bundle": Empty(**three, feature_dim=16, embedding_dim=3)},
    )
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
