"""service.gallery.successor: the new gallery holds what the old one answered, or is not built."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from service.gallery import successor
from service.gallery.database import Database
from service.gallery.logged import LoggedGallery
from service.gallery.oplog import OperationsLog
from service.gallery.protocol import (
    Applied,
    Change,
    GalleryRetired,
    Idempotency,
    Item,
    StorageError,
    Vectors,
)
from service.gallery.rows import galleries_of
from service.gallery.successor import Successor, SwitchRefused, drop_building
from service.gallery.tables import held, pictures
from trainer.representation.bundle import Bundle, open_bundle

WAIT_S = 60
AXES = np.eye(12, dtype=np.float32)


class FakeEncoder:
    """A picture's vector is the axis that its first byte names; what begins with x is none."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.before: Callable[[int], None] = lambda calls: None

    def __call__(self, contents: Sequence[bytes]) -> list[Vectors | str]:
        if contents:
            self.before(len(self.seen))
        self.seen += contents
        return ["no picture" if c[:1] == b"x" else AXES[c[0] % 12] for c in contents]


@pytest.fixture(scope="module")
def new_bundle(
    make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """Another model, trained on two pictures more."""
    return open_bundle(make_bundle(tmp_path_factory.mktemp("new") / "b", seed=5, images=42))


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database of either kind."""
    url = None
    if request.param == "postgresql":
        url = request.getfixturevalue("new_database")()
    database = Database(tmp_path / "state", url)
    yield database
    database.close()


@pytest.fixture
def old(database: Database, bundle: Bundle) -> Iterator[LoggedGallery]:
    """The gallery to be replaced: 39 trained pictures, 3 added ones, one of them twice the same."""
    gallery = LoggedGallery(database, bundle)
    do(gallery, deletes=["train/0002.png"])
    do(gallery, upserts=[picture("a", b"\x01a", n=1), picture("b", b"\x02b")])
    do(gallery, upserts=[picture("a", b"\x03a", n=2), picture("c", b"\x02b")])
    yield gallery
    gallery.close()


def do(gallery: LoggedGallery, **change: Any) -> Applied:
    return gallery.apply(Change(**change)).result(WAIT_S)


def picture(item_id: str, original: bytes, **metadata: Any) -> Item:
    return Item(item_id, AXES[11], metadata, thumbnail=b"small" + original, original=original)


def content(log: OperationsLog, bundle: Bundle) -> dict[str, tuple[Vectors, Any]]:
    gallery = LoggedGallery(log.database, bundle, log=log)
    snapshot = gallery.snapshot()
    items = [snapshot.item(int(row)) for row in snapshot.rows()]
    gallery.close()
    return {i.id: (i.vector, i.metadata) for i in items}


def states(database: Database) -> list[str]:
    with database.reading() as connection:
        return [row.state for row in galleries_of(connection)]


def test_successor__takes_over_every_item(
    database: Database, old: LoggedGallery, new_bundle: Bundle
) -> None:
    encoder = FakeEncoder()
    new = Successor(database, new_bundle, encoder)
    assert states(database) == ["active", "building"]
    log = new.finish()
    assert states(database) == ["retired", "active"]
    assert sorted(encoder.seen) == [b"\x02b", b"\x02b", b"\x03a"]  # what was replaced is left out
    got, own = content(log, new_bundle), new_bundle.gallery()
    trained = {f"train/{n:04d}.png" for n in range(42)} - {"train/0002.png"}  # deleted stays so
    assert set(got) == trained | {"a", "b", "c"}
    for item_id, vector in zip(own.ids, own.embeddings, strict=True):
        if item_id in trained:
            np.testing.assert_array_equal(got[item_id][0], vector)
    for item_id, axis in (("a", 3), ("b", 2), ("c", 2)):
        np.testing.assert_array_equal(got[item_id][0], AXES[axis])
    assert got["a"][1] == {"n": 2}
    assert list(got)[-3:] == ["b", "a", "c"]  # in the order of their last writing
    gallery = LoggedGallery(database, new_bundle, log=log)
    assert gallery.picture("a", "thumbnail") == b"small\x03a"
    assert gallery.picture("a", "original") == b"\x03a"
    assert gallery.picture("train/0001.png", "original") is None
    gallery.close()


def test_successor__knows_the_keys_and_the_old_gallery_takes_no_more(
    database: Database, old: LoggedGallery, new_bundle: Bundle
) -> None:
    key = Idempotency("k", "d")
    first = do(old, upserts=[picture("d", b"\x04")], idempotency=key)
    log = Successor(database, new_bundle, FakeEncoder()).finish()
    with pytest.raises(GalleryRetired, match="takes no more changes"):
        do(old, deletes=["a"])
    assert old.snapshot().row("a") is not None  # it can still be read
    assert old.picture("a", "thumbnail") == b"small\x03a"
    assert old.is_retired
    gallery = LoggedGallery(database, new_bundle, log=log)
    assert do(gallery, upserts=[picture("d", b"\x05")], idempotency=key) == first
    gallery.close()


def test_successor__follows_what_is_written_meanwhile(
    database: Database, old: LoggedGallery, new_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(successor, "CHUNK", 4)
    encoder = FakeEncoder()

    def write(calls: int) -> None:
        if calls < 20:
            do(old, deletes=["b", "train/0003.png"], upserts=[picture("a", bytes([calls + 1]))])
            do(old, upserts=[picture(f"new{calls}", b"\x07")])

    encoder.before = write
    new = Successor(database, new_bundle, encoder)
    new.follow()
    do(old, upserts=[picture("last", b"\x08")], deletes=["c"])
    got = content(new.finish(), new_bundle)
    ids = {i for i in got if not i.startswith("train/")}
    snapshot = old.snapshot()
    expected = {snapshot.item(int(row)).id for row in snapshot.rows()}
    assert ids == {i for i in expected if not i.startswith("train/")}
    assert "new0" in ids
    assert {"b", "c"}.isdisjoint(ids)
    assert "train/0003.png" not in got
    np.testing.assert_array_equal(got["last"][0], AXES[8])
    assert (new.progress.done, new.progress.total) == (snapshot.version, snapshot.version)


def test_successor__takes_over_more_than_a_chunk_that_comes_at_the_last_moment(
    database: Database, old: LoggedGallery, new_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(successor, "CHUNK", 2)
    new = Successor(database, new_bundle, FakeEncoder())
    follow, turns = new.follow, iter(range(2))

    def and_then_there_is_more() -> None:
        follow()
        for turn in turns:
            do(old, upserts=[picture(f"{turn}-{n}", bytes([n])) for n in range(7)])
            break

    monkeypatch.setattr(new, "follow", and_then_there_is_more)
    got = content(new.finish(), new_bundle)
    assert {f"{turn}-{n}" for turn in range(2) for n in range(7)} <= set(got)


def test_successor__goes_on_where_it_was_cut_short(
    database: Database, old: LoggedGallery, new_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(successor, "CHUNK", 2)
    do(old, upserts=[picture(f"p{n}", bytes([n])) for n in range(8)])

    def die(calls: int) -> None:
        if calls >= 6:
            raise KeyboardInterrupt

    broken = FakeEncoder()
    broken.before = die
    with pytest.raises(KeyboardInterrupt):
        Successor(database, new_bundle, broken).finish()
    assert states(database) == ["active", "building"]
    do(old, deletes=["p0"], upserts=[picture("p1", b"\x09")])
    encoder = FakeEncoder()
    got = content(Successor(database, new_bundle, encoder).finish(), new_bundle)
    assert len(encoder.seen) == 8 + 3 - 6 + 1  # nothing is embedded twice
    assert "p0" not in got
    for item_id, axis in (("p1", 9), ("p2", 2), ("p7", 7), ("a", 3)):
        np.testing.assert_array_equal(got[item_id][0], AXES[axis])
    assert states(database) == ["retired", "active"]


def test_successor__is_refused_with_the_number_of_items_without_original(
    database: Database, old: LoggedGallery, new_bundle: Bundle
) -> None:
    do(old, upserts=[Item("v", AXES[0], {}), Item("w", AXES[0], {})])
    with pytest.raises(SwitchRefused, match=r"2 of 44 items have no stored original"):
        Successor(database, new_bundle, FakeEncoder())
    assert states(database) == ["active"]
    do(old, deletes=["v", "w"])
    new = Successor(database, new_bundle, FakeEncoder())
    do(old, upserts=[Item("v", AXES[0], {})])  # comes while it is built
    with pytest.raises(SwitchRefused, match=r"1 of 43 items"):
        new.finish()
    assert drop_building(database) == 1
    assert states(database) == ["active"]
    assert do(old, deletes=["v"]).deleted == 1


def test_successor__leaves_out_what_it_has_no_vector_of_where_that_is_asked_for(
    database: Database, old: LoggedGallery, new_bundle: Bundle
) -> None:
    do(old, upserts=[picture("p", b"\x01"), picture("q", b"\x02"), Item("v", AXES[0], {})])
    new = Successor(database, new_bundle, FakeEncoder(), drop_missing=True)
    new.follow()
    # While it is built: a picture that is replaced by a vector, another vector, one that goes.
    do(old, upserts=[Item("q", AXES[0], {}), Item("w", AXES[0], {})], deletes=["v"])
    got = content(new.finish(), new_bundle)
    assert new.missing == 2  # q and w
    assert len(got) == new.items
    assert {"q", "v", "w"}.isdisjoint(got)
    np.testing.assert_array_equal(got["p"][0], AXES[1])
    assert "train/0041.png" in got  # the new bundle's own
    assert states(database) == ["retired", "active"]


def test_successor__is_refused_when_an_original_is_no_picture_to_it(
    database: Database, old: LoggedGallery, new_bundle: Bundle
) -> None:
    do(old, upserts=[picture("d", b"x")])
    with pytest.raises(SwitchRefused, match=r"1 stored originals cannot be embedded.*no picture"):
        Successor(database, new_bundle, FakeEncoder()).finish()
    assert not old.is_retired
    assert do(old, deletes=["d"]).deleted == 1


def test_successor__loses_no_item_whose_original_was_lost(
    database: Database, old: LoggedGallery, new_bundle: Bundle
) -> None:
    with database.writing() as connection:
        for table in (held, pictures):
            connection.execute(sa.delete(table))
    with pytest.raises(SwitchRefused, match="3 of 42 items could not be taken over"):
        Successor(database, new_bundle, FakeEncoder()).finish()
    assert do(old, deletes=["a"]).deleted == 1


def test_successor__of_the_same_model_or_an_empty_database_is_refused(
    database: Database, bundle: Bundle
) -> None:
    with pytest.raises(SwitchRefused, match="no gallery yet"):
        Successor(database, bundle, FakeEncoder())
    LoggedGallery(database, bundle).close()
    with pytest.raises(SwitchRefused, match="is the active one already"):
        Successor(database, bundle, FakeEncoder())


def test_successor__drops_what_earlier_switches_left(
    database: Database,
    old: LoggedGallery,
    new_bundle: Bundle,
    make_bundle: Callable[..., Path],
    tmp_path: Path,
) -> None:
    third, fourth = (
        open_bundle(make_bundle(tmp_path / f"{seed}", seed=seed, images=42)) for seed in (7, 9)
    )
    Successor(database, new_bundle, FakeEncoder()).finish()
    Successor(database, third, FakeEncoder()).finish()
    assert states(database) == ["retired", "active"]
    Successor(database, fourth, FakeEncoder())  # begun and left
    assert states(database) == ["active", "building"]
    Successor(database, new_bundle, FakeEncoder()).finish()
    assert states(database) == ["retired", "active"]
    with database.reading() as connection:
        kept = set(connection.scalars(sa.select(pictures.c.sha256)))
        wanted = {
            s
            for row in connection.execute(sa.select(held.c.thumbnail, held.c.original))
            for s in row
        }
    originals = (b"\x02b", b"\x03a")
    assert kept == wanted
    assert kept == {hashlib.sha256(c).digest() for o in originals for c in (o, b"small" + o)}


def test_switching__is_for_one_process_at_a_time(new_database: Callable[[], str]) -> None:
    url = new_database()
    one, two = Database(None, url), Database(None, url)
    refused = pytest.raises(StorageError, match="another process is switching")
    with one.switching(), refused, two.switching():
        pass
    with two.switching():
        pass
    one.close()
    two.close()
