"""service.gallery.upkeep: a start reads a generation and the rest; indexes grow beside the work."""

import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from structlog.testing import capture_logs

from service.gallery import segment, upkeep
from service.gallery.choice import SearchOptions
from service.gallery.logged import LoggedGallery
from service.gallery.oplog import OperationsLog
from service.gallery.protocol import Change, Item, StorageError
from trainer.representation.bundle import Bundle

WAIT_S = 30
LOTS = 2**40
Units = Callable[..., NDArray[np.float32]]


def until(reached: Callable[[], bool]) -> None:
    """Wait for another thread."""
    deadline = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def add(gallery: LoggedGallery, vectors: NDArray[np.float32], first: int = 0) -> None:
    items = [Item(f"i{first + n}", v, {"n": first + n}) for n, v in enumerate(vectors)]
    gallery.apply(Change(upserts=items)).result(WAIT_S)


def content(gallery: LoggedGallery) -> dict[str, Any]:
    snapshot = gallery.snapshot()
    rows = snapshot.rows()
    items = [snapshot.item(int(row)) for row in rows]
    return {
        "version": snapshot.version,
        "seqs": snapshot.seqs(rows).tolist(),
        "items": [(i.id, i.vector.tobytes(), dict(i.metadata)) for i in items],
    }


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Behind which operation the log was read, each time that it was."""
    seen: list[int] = []
    replay = OperationsLog.replay

    def noted(self: OperationsLog, after: int = 0) -> Iterator[Any]:
        seen.append(after)
        return replay(self, after)

    monkeypatch.setattr(OperationsLog, "replay", noted)
    return seen


@pytest.fixture
def unscrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is not read in the background."""
    monkeypatch.setattr(upkeep.Upkeep, "_scrub", lambda self: None)


def generations(state: Path) -> list[Path]:
    return sorted(state.glob("generations/*/gen-*"))


@pytest.mark.usefixtures("unscrubbed")
def test_start__reads_the_generation_that_the_stop_wrote(
    bundle: Bundle, tmp_path: Path, random_units: Units, replayed: list[int]
) -> None:
    gallery = LoggedGallery(tmp_path, bundle)
    add(gallery, random_units(20, 12, 1))
    gallery.apply(Change(deletes=["i3", "train/0001.png"])).result(WAIT_S)
    before = content(gallery)
    gallery.close()
    replayed.clear()
    gallery = LoggedGallery(tmp_path, bundle)
    assert replayed == [62]  # 40 of the bundle, 20, 2
    assert gallery.generation_seq == 62
    assert content(gallery) == before
    gallery.close()
    assert [p.name for p in generations(tmp_path)] == ["gen-000000000062"]  # nothing was new


@pytest.mark.usefixtures("unscrubbed")
def test_start__reads_what_came_after_the_generation(
    bundle: Bundle, tmp_path: Path, random_units: Units, replayed: list[int]
) -> None:
    vectors = random_units(30, 12, 1)
    gallery = LoggedGallery(tmp_path / "a", bundle, search=SearchOptions(snapshot_every=10))
    until(lambda: gallery.generation_seq == 40)
    add(gallery, vectors[:9])
    assert gallery.generation_seq == 40
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # as a kill leaves it
    before = content(gallery)
    gallery.close()
    replayed.clear()
    gallery = LoggedGallery(tmp_path / "b", bundle, search=SearchOptions(snapshot_every=10))
    assert replayed == [40]
    assert content(gallery) == before
    add(gallery, vectors[9:10], 9)
    until(lambda: gallery.generation_seq == 50)
    gallery.close()


@pytest.mark.parametrize("which", ["facts.json", "vectors.f32", "ids.json", "manifest.json"])
def test_start__from_a_damaged_generation_names_it_and_reads_the_log(
    bundle: Bundle, tmp_path: Path, random_units: Units, which: str
) -> None:
    gallery = LoggedGallery(tmp_path, bundle)
    add(gallery, random_units(5, 12, 1))
    before = content(gallery)
    gallery.close()
    (generation,) = generations(tmp_path)
    damaged = bytearray((generation / which).read_bytes())
    damaged[len(damaged) // 2] ^= 4
    (generation / which).write_bytes(damaged)
    with capture_logs() as lines:
        gallery = LoggedGallery(tmp_path, bundle)
    refused = [line for line in lines if line["event"] == "generation_refused"]
    assert [line["generation"] for line in refused] == ["gen-000000000045"]
    assert content(gallery) == before
    gallery.close()
    assert [p.name for p in generations(tmp_path)] == ["gen-000000000045"]  # made again


def test_start__after_the_log_was_restored_does_not_use_its_future(
    bundle: Bundle, tmp_path: Path, random_units: Units
) -> None:
    vectors = random_units(20, 12, 1)
    gallery = LoggedGallery(tmp_path / "a", bundle)
    add(gallery, vectors[:5])
    gallery.close()
    backup = (tmp_path / "a" / "operations.sqlite3").read_bytes()
    gallery = LoggedGallery(tmp_path / "a", bundle)
    add(gallery, vectors[5:10], 5)
    gallery.close()  # a generation of seq 50
    (tmp_path / "a" / "operations.sqlite3").write_bytes(backup)
    gallery = LoggedGallery(tmp_path / "a", bundle)
    assert gallery.snapshot().version == 45
    assert gallery.snapshot().row("i5") is None
    add(gallery, vectors[10:15], 10)  # other operations up to seq 50
    other = content(gallery)
    gallery.close()
    (older,) = [p for p in generations(tmp_path / "a") if p.name.endswith("50")]
    shutil.copytree(older, tmp_path / "kept")
    (tmp_path / "a" / "operations.sqlite3").write_bytes(backup)
    gallery = LoggedGallery(tmp_path / "a", bundle)
    add(gallery, vectors[15:20], 15)
    last = content(gallery)
    gallery.close()
    shutil.rmtree(older)
    shutil.copytree(tmp_path / "kept", older)  # of the right seq, of another past
    with capture_logs() as lines:
        gallery = LoggedGallery(tmp_path / "a", bundle)
    assert any("another operation at seq 50" in str(line.get("reason")) for line in lines)
    assert content(gallery) == last != other
    gallery.close()


def test_start__removes_the_generations_of_other_logs_and_says_so(
    bundle: Bundle, tmp_path: Path
) -> None:
    LoggedGallery(tmp_path, bundle).close()
    (own,) = generations(tmp_path)
    shutil.copytree(own.parent, own.parent.with_name("other"))
    with capture_logs() as lines:
        LoggedGallery(tmp_path, bundle).close()
    assert generations(tmp_path) == [own]
    assert [line["log"] for line in lines if line["event"] == "generations_removed"] == ["other"]


def test_scrub__names_damage_that_the_start_did_not_meet(
    bundle: Bundle, tmp_path: Path, random_units: Units
) -> None:
    gallery = LoggedGallery(tmp_path, bundle)
    add(gallery, random_units(5, 12, 1))
    before = content(gallery)
    gallery.close()
    with sqlite3.connect(tmp_path / "operations.sqlite3") as connection:
        connection.execute("UPDATE operations SET vector = zeroblob(48) WHERE seq = 17")
    connection.close()
    gallery = LoggedGallery(tmp_path, bundle)
    until(lambda: gallery.is_damaged)
    assert "seq 17" in str(gallery.trouble())
    assert content(gallery) == before  # searches go on, from what was verified
    with pytest.raises(StorageError, match="seq 17"):
        add(gallery, random_units(1, 12, 2))
    gallery.close()


def test_scrub__of_a_sound_log_says_so(bundle: Bundle, tmp_path: Path) -> None:
    LoggedGallery(tmp_path, bundle).close()
    with capture_logs() as lines:
        gallery = LoggedGallery(tmp_path, bundle)
        until(lambda: any(line["event"] == "log_verified" for line in lines))
    assert gallery.trouble() is None
    gallery.close()


def nearest(gallery: LoggedGallery, query: NDArray[np.float32], *, exact: bool) -> list[str]:
    snapshot = gallery.snapshot()
    found = snapshot.search(query[None], 5, exact=exact)
    assert found.exact == exact
    ids: list[str] = snapshot.ids(found.rows[0]).tolist()
    return ids


@pytest.mark.parametrize(("allowed_bytes", "kind"), [(LOTS, "hnsw"), (60_000, "ivf")])
def test_index__is_built_beside_the_work_and_kept(
    bundle: Bundle,
    tmp_path: Path,
    random_units: Units,
    monkeypatch: pytest.MonkeyPatch,
    allowed_bytes: int,
    kind: str,
) -> None:
    monkeypatch.setattr(upkeep, "OUTSIDE_ROWS", 100)
    options = SearchOptions(allowed_bytes, exact_items=300)
    vectors = random_units(700, 12, 1)
    gallery = LoggedGallery(tmp_path, bundle, search=options)
    add(gallery, vectors[:200])
    assert gallery.snapshot().index()["index"] == "flat"
    add(gallery, vectors[200:500], 200)
    until(lambda: gallery.snapshot().index()["index"] == kind)
    for n in range(500, 700, 4):  # changes while it is built anew
        add(gallery, vectors[n : n + 4], n)
        gallery.apply(Change(deletes=[f"i{n - 450}"])).result(WAIT_S)
    until(lambda: len(gallery.snapshot().segments[0]) > 600)
    for n in (499, 550, 699):
        assert nearest(gallery, vectors[n], exact=False)[0] == f"i{n}"
        assert nearest(gallery, vectors[n], exact=True)[0] == f"i{n}"
    gone = gallery.snapshot().search(vectors[50:54], 1, exact=False)
    assert not {"i50"} & set(gallery.snapshot().ids(gone.rows[:, 0]).tolist())
    before = content(gallery)
    gallery.close()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the index is there")

    monkeypatch.setattr(segment, "build", never)
    gallery = LoggedGallery(tmp_path, bundle, search=options)
    assert gallery.snapshot().index()["index"] == kind
    assert content(gallery) == before
    assert nearest(gallery, vectors[699], exact=False)[0] == "i699"
    gallery.close()


def test_index__in_half_precision_is_exact(
    bundle: Bundle, tmp_path: Path, random_units: Units
) -> None:
    vectors = random_units(200, 12, 1)
    gallery = LoggedGallery(tmp_path, bundle, search=SearchOptions(9_000))
    add(gallery, vectors)
    until(lambda: gallery.snapshot().index()["index"] == "flat-fp16")
    expected = np.argsort(-(vectors @ vectors[7]), kind="stable")[:5]
    found = nearest(gallery, vectors[7], exact=True)
    own = [i for i in found if i.startswith("i")]
    assert own == [f"i{n}" for n in expected][: len(own)]
    gallery.close()


def test_upkeep__that_fails_is_logged_and_searches_go_on(
    bundle: Bundle, tmp_path: Path, random_units: Units, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise MemoryError("no room for a graph")

    monkeypatch.setattr(segment, "build", broken)
    with capture_logs() as lines:
        gallery = LoggedGallery(tmp_path, bundle, search=SearchOptions(exact_items=10))
        until(lambda: any(line["event"] == "upkeep_failed" for line in lines))
    assert len(nearest(gallery, random_units(1, 12, 1)[0], exact=True)) == 5
    gallery.close()
    assert len(generations(tmp_path)) == 1
