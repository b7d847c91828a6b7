"""service.migrate: what arrives is what was there, or nothing is served."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service import migrate
from service.gallery.faiss_index import FaissSnapshot
from service.gallery.logged import LoggedGallery
from service.gallery.milvus import Store
from service.gallery.milvus_gallery import MilvusGallery
from service.gallery.protocol import Change, Gallery, GalleryError, Item
from service.gallery.records import records_of
from service.migrate import MigrationError, compare, from_milvus, main, to_milvus
from trainer.representation.bundle import Bundle

WAIT_S = 30
ROOT = Path(__file__).parents[2]
Units = Callable[..., NDArray[np.float32]]


def content(gallery: Gallery) -> list[tuple[str, bytes, Any]]:
    snapshot = gallery.snapshot()
    return [(i.id, i.vector.tobytes(), i.metadata) for i in snapshot.items(snapshot.rows())]


@pytest.fixture
def state(bundle: Bundle, tmp_path: Path, random_units: Units) -> Path:
    """A stopped gallery of 42 items at version 46, some of them replaced, some deleted."""
    gallery = LoggedGallery(tmp_path / "state", bundle)
    vectors = random_units(5, 12, 1)
    items = [Item(f'ü/"{n}', v, {"n": n, "é": [n, 0.5]}) for n, v in enumerate(vectors)]
    gallery.apply(Change(upserts=[*items[:3], *items])).result(WAIT_S)
    gallery.apply(Change(deletes=["train/0001.png", 'ü/"1', "train/0039.png"])).result(WAIT_S)
    gallery.close()
    return tmp_path / "state"


def opened(url: str, bundle: Bundle, **options: Any) -> MilvusGallery:
    def imported() -> Any:
        pytest.fail("it is filled already")

    return MilvusGallery(
        Store(url), model_id=bundle.model_id, dim=bundle.embedding_dim, imported=imported, **options
    )


@pytest.mark.parametrize("index", ["flat", "hnsw"])
def test_migrate__there_and_back_keeps_every_item(
    state: Path, bundle: Bundle, new_collection: Callable[[], str], tmp_path: Path, index: Any
) -> None:
    before = LoggedGallery(state, bundle)
    wanted, seqs = content(before), before.snapshot().seqs(before.snapshot().rows())
    version = before.snapshot().version
    before.close()
    url = new_collection()
    assert main(["--from", str(state), "--to", url, "--index", index]) == 0
    moved = opened(url, bundle, index=index)
    assert content(moved) == wanted
    assert moved.snapshot().version == version
    np.testing.assert_array_equal(moved.snapshot().rows(), seqs)
    added = moved.apply(Change(upserts=[Item("new", np.eye(12, dtype=np.float32)[0], {})]))
    assert added.result(WAIT_S).gallery_version == version + 1
    moved.close()
    assert main(["--from", url, "--to", str(tmp_path / "back")]) == 0
    back = LoggedGallery(tmp_path / "back", bundle)
    assert content(back)[:-1] == wanted
    assert (back.snapshot().version, content(back)[-1][0]) == (43, "new")
    back.close()


def test_migrate__takes_a_postgresql_log_too(
    state: Path,
    bundle: Bundle,
    new_collection: Callable[[], str],
    new_database: Callable[[], str],
    tmp_path: Path,
) -> None:
    url, database = new_collection(), new_database()
    to_milvus(str(state), url, index="flat", without_pictures=False)
    assert from_milvus(url, database) == 42
    there = LoggedGallery(tmp_path / "other", bundle, url=database)
    original = LoggedGallery(state, bundle)
    assert content(there) == content(original)
    there.close()
    original.close()
    assert to_milvus(database, new_collection(), index="flat", without_pictures=False) == 42


class Broken(Exception):
    pass


def broken_after(blocks: int) -> Callable[[int, int], None]:
    told = []

    def say(done: int, total: int) -> None:
        told.append(done)
        assert done <= total
        if len(told) == blocks:
            raise Broken

    return say


def test_migrate__that_was_broken_off_goes_on_and_is_not_served_before(
    state: Path,
    bundle: Bundle,
    new_collection: Callable[[], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(migrate, "BLOCK", 10)
    url = new_collection()
    with pytest.raises(Broken):
        to_milvus(str(state), url, index="flat", without_pictures=False, say=broken_after(2))
    with pytest.raises(GalleryError, match=r"is being filled from log [0-9a-f]{32} at version 51"):
        opened(url, bundle)
    with pytest.raises(MigrationError, match="holds no gallery that is whole"):
        from_milvus(url, str(tmp_path / "back"))
    told: list[tuple[int, int]] = []

    def say(done: int, total: int) -> None:
        told.append((done, total))

    to_milvus(str(state), url, index="flat", without_pictures=False, say=say)
    assert told == [(30, 42), (40, 42), (42, 42)]  # the first twenty were there
    with pytest.raises(Broken):
        from_milvus(url, str(tmp_path / "back"), say=broken_after(3))
    told.clear()
    from_milvus(url, str(tmp_path / "back"), say=say)
    assert told == [(40, 42), (42, 42)]
    back, original = LoggedGallery(tmp_path / "back", bundle), LoggedGallery(state, bundle)
    assert content(back) == content(original)
    back.close()
    original.close()


def test_migrate__refuses_a_source_that_has_changed_since_it_was_broken_off(
    state: Path, bundle: Bundle, new_collection: Callable[[], str]
) -> None:
    url = new_collection()
    with pytest.raises(Broken):
        to_milvus(str(state), url, index="flat", without_pictures=False, say=broken_after(1))
    gallery = LoggedGallery(state, bundle)
    gallery.apply(Change(deletes=["train/0002.png"])).result(WAIT_S)
    gallery.close()
    with pytest.raises(MigrationError, match=r"and not from log .* at version 52"):
        to_milvus(str(state), url, index="flat", without_pictures=False)


def test_migrate__refuses_a_target_that_holds_a_gallery(
    state: Path,
    bundle: Bundle,
    new_collection: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(migrate, "LEASE_S", 0.0)
    url = new_collection()
    to_milvus(str(state), url, index="flat", without_pictures=False)
    with pytest.raises(MigrationError, match="is in use, and not from log"):
        to_milvus(str(state), url, index="flat", without_pictures=False)
    with pytest.raises(MigrationError, match="holds a gallery already"):
        from_milvus(url, str(state))
    writer = opened(url, bundle)
    with pytest.raises(MigrationError, match="is held by another process"):
        from_milvus(url, str(state.parent / "back"))
    writer.close()


def test_migrate__leaves_no_picture_behind_unasked(
    state: Path, bundle: Bundle, new_collection: Callable[[], str], random_units: Units
) -> None:
    gallery = LoggedGallery(state, bundle)
    (vector,) = random_units(1, 12, 4)
    gallery.apply(Change(upserts=[Item("p", vector, {}, b"thumbnail")])).result(WAIT_S)
    gallery.close()
    with pytest.raises(MigrationError, match="1 items have pictures"):
        to_milvus(str(state), new_collection(), index="flat", without_pictures=False)
    assert to_milvus(str(state), new_collection(), index="flat", without_pictures=True) == 43


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("a", "b", "one of --from and --to is in Milvus"),
        ("milvus://h/a", "milvus://h/b", "one of --from and --to is in Milvus"),
        ("missing", "milvus://h/b", "there is no gallery in missing"),
        ("milvus://h/a/b", "target", "the gallery's URL cannot be used"),
    ],
)
def test_main__says_what_is_wrong_in_one_line(
    source: str, target: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--from", source, "--to", target]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_main__wants_pymilvus_only_when_it_is_needed() -> None:
    code = (
        "import sys; sys.modules['pymilvus'] = None\n"
        "from service.migrate import main\n"
        "sys.exit(main(['--from', 'milvus://127.0.0.1:1/a', '--to', 'b']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (
        1,
        "error: a gallery in Milvus wants pymilvus: install invprop[service,milvus]\n",
    )


@pytest.fixture
def pair(random_units: Units) -> Callable[..., tuple[FaissSnapshot, FaissSnapshot]]:
    """pair(...) -> a snapshot of 30, and one that differs in what is given."""
    vectors = random_units(30, 12, 1)

    def _pair(**changes: Any) -> tuple[FaissSnapshot, FaissSnapshot]:
        records = records_of(
            vectors=vectors,
            ids=[f"i{n}" for n in range(30)],
            metadata=[b"{}"] * 30,
            seqs=np.arange(1, 31),
        )
        other = replace(records, **changes)
        return FaissSnapshot.of(records, 30), FaissSnapshot.of(other, 30)

    return _pair


def test_compare__sees_what_differs(
    pair: Callable[..., tuple[FaissSnapshot, FaissSnapshot]], random_units: Units
) -> None:
    compare(*pair())
    ours, theirs = pair()
    with pytest.raises(MigrationError, match="holds 30 items and Milvus 29"):
        compare(ours, FaissSnapshot.of(theirs.take(np.arange(29)), 30))
    ids = np.asarray([f"i{n + 1}" for n in range(30)], np.object_)
    with pytest.raises(MigrationError, match="1 of 30 sampled items are missing"):
        compare(*pair(ids=ids))
    vectors = random_units(30, 12, 1)
    vectors[7, 0] += np.float32(1e-3)
    with pytest.raises(MigrationError, match="item 'i7' is not the same"):
        compare(*pair(vectors=vectors))


class Forgetful:
    """A snapshot whose search misses the nearest."""

    def __init__(self, whole: FaissSnapshot, exact: bool) -> None:
        self._whole, self._exact = whole, exact

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def __len__(self) -> int:
        return len(self._whole)

    def index(self) -> Any:
        return {"exact": self._exact}

    def search(self, queries: Any, k: int, **_: Any) -> Any:
        found = self._whole.search(queries, k + 2)
        return replace_found(found)


def replace_found(found: Any) -> Any:
    return found._replace(rows=found.rows[:, 2:], similarities=found.similarities[:, 2:])


@pytest.mark.parametrize(
    ("exact", "said"), [(True, "differ by .* in similarity"), (False, r"finds 0\.80 of")]
)
def test_compare__sees_neighbours_that_are_missing(
    pair: Callable[..., tuple[FaissSnapshot, FaissSnapshot]], exact: bool, said: str
) -> None:
    ours, theirs = pair()
    forgetful: Any = Forgetful(theirs, exact)
    with pytest.raises(MigrationError, match=said):
        compare(ours, forgetful)
