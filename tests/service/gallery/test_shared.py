"""Several galleries on one PostgreSQL log: one order of changes, one state, nothing lost."""

import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray

from service.gallery.database import Database
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

WAIT_S = 60
ROOT = Path(__file__).parents[3]
Units = Callable[..., NDArray[np.float32]]
Open = Callable[..., LoggedGallery]


def do(gallery: LoggedGallery, **change: Any) -> Applied:
    return gallery.apply(Change(**change)).result(WAIT_S)


def wait_for(gallery: LoggedGallery, done: Callable[[Snapshot], bool]) -> Snapshot:
    """Wait until the gallery has followed so far."""
    seen = threading.Event()
    gallery.on_change(lambda snapshot: seen.set() if done(snapshot) else None)
    if not done(gallery.snapshot()):
        assert seen.wait(WAIT_S)
    return gallery.snapshot()


def content(snapshot: Snapshot) -> list[tuple[Any, ...]]:
    items = [snapshot.item(int(row)) for row in snapshot.rows()]
    seqs = snapshot.seqs(snapshot.rows()).tolist()
    return [(s, i.id, i.vector.tobytes(), i.metadata) for s, i in zip(seqs, items, strict=True)]


@pytest.fixture
def open_gallery(bundle: Bundle, tmp_path: Path) -> Iterator[Open]:
    """open_gallery(url, ...) -> a gallery with a state directory of its own, closed at the end."""
    opened: list[LoggedGallery] = []
    numbers = itertools.count()  # several threads may open

    def _open(url: str, **options: Any) -> LoggedGallery:
        state = tmp_path / f"state-{next(numbers)}"
        options = {"follow_interval_s": 0.01, **options}
        gallery = LoggedGallery(state, bundle, url=url, **options)
        opened.append(gallery)
        return gallery

    yield _open
    for gallery in opened:
        gallery.close()


def test_shared_log__is_imported_once_by_whoever_is_first(
    new_database: Callable[[], str], open_gallery: Open
) -> None:
    url, opened = new_database(), []
    threads = [threading.Thread(target=lambda: opened.append(open_gallery(url))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(len(g.snapshot()), g.snapshot().version) for g in opened] == [(40, 40)] * 3
    assert len({g.log_id for g in opened}) == 1


def test_shared_log__makes_two_writers_agree_with_one_dict(
    new_database: Callable[[], str], open_gallery: Open, random_units: Units
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    sys.stdout.write(f"seed {seed}\n")
    choice = random.Random(seed)
    url, vectors = new_database(), random_units(20, 12, 1)
    galleries = [open_gallery(url, follow_interval_s=60.0), open_gallery(url)]
    model: dict[str, tuple[bytes, int]] = {
        item[1]: (item[2], 0) for item in content(galleries[0].snapshot())
    }
    version = 40
    for number in range(60):
        gallery = choice.choice(galleries)
        ids = [f"i{n}" for n in choice.sample(range(8), choice.randint(1, 3))]
        if choice.random() < 0.6:
            vector = choice.choice(vectors)
            done = do(gallery, upserts=[Item(i, vector, {"n": number}) for i in ids])
            assert (done.added, done.updated) == (
                sum(i not in model for i in ids),
                sum(i in model for i in ids),
            )
            for item_id in ids:
                model.pop(item_id, None)
                model[item_id] = (vector.tobytes(), number)
            version += len(ids)
        else:
            done = do(gallery, deletes=ids)
            assert list(done.missing) == [i for i in ids if i not in model]
            version += done.deleted
            for item_id in ids:
                model.pop(item_id, None)
        # What was answered is read where it was written, with all that others wrote before it.
        assert done.gallery_version == version
        snapshot = gallery.snapshot()
        assert (snapshot.version, len(snapshot)) == (version, len(model))
    do(galleries[0], deletes=["nothing"])  # looks at the log
    states = [content(wait_for(g, lambda s: s.version == version)) for g in galleries]
    assert states[0] == states[1]
    assert [(i, v, m.get("n", 0)) for _, i, v, m in states[0]] == [
        (item_id, vector, number) for item_id, (vector, number) in model.items()
    ]
    again = open_gallery(url)
    assert content(again.snapshot()) == states[0]


PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from service.gallery.logged import LoggedGallery
from service.gallery.protocol import Change, Item
from service.observability import configure_logging
from trainer.representation.bundle import open_bundle
configure_logging()  # to stderr
state, bundle, url, name = sys.argv[1:]
gallery = LoggedGallery(Path(state), open_bundle(bundle), url=url)
print("open", flush=True)
sys.stdin.readline()
for n in range(30):
    vector = np.eye(12, dtype=np.float32)[n % 12]
    items = [Item(f"{name}-{n}", vector, {"by": name}), Item("both", vector, {"by": name, "n": n})]
    done = gallery.apply(Change(upserts=items)).result(60)
    print(done.gallery_version, done.added, done.updated, flush=True)
gallery.close()
"""


def test_shared_log__is_written_by_two_processes_at_once(
    new_database: Callable[[], str], open_gallery: Open, bundle: Bundle, tmp_path: Path
) -> None:
    url = new_database()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, tmp_path / name, bundle.directory, url, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        for name in ("a", "b")
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    answers = []
    for child in children:
        out, _ = child.communicate(timeout=WAIT_S)
        assert child.returncode == 0
        answers.append([tuple(map(int, line.split())) for line in out.splitlines()])
    for mine in answers:
        assert len(mine) == 30
        assert [a[0] for a in mine] == sorted({a[0] for a in mine})
        assert all(a[1] + a[2] == 2 for a in mine)
    everyone = sorted(a for mine in answers for a in mine)
    # 120 operations without a gap; "both" was new once, its 59 repetitions replaced it.
    assert [a[0] for a in everyone] == list(range(42, 161, 2))
    assert sum(a[1] for a in everyone) == 61
    snapshot = open_gallery(url).snapshot()
    assert (len(snapshot), snapshot.version) == (101, 160)
    expected = {f"{name}-{n}" for name in "ab" for n in range(30)} | {"both"}
    assert {i for _, i, _, _ in content(snapshot)} - expected == {
        f"train/{n:04d}.png" for n in range(40)
    }


def test_shared_log__remembers_keys_for_every_process(
    new_database: Callable[[], str], open_gallery: Open, random_units: Units
) -> None:
    url, (a, b) = new_database(), random_units(2, 12, 1)
    one, two = open_gallery(url), open_gallery(url)
    key = Idempotency("k", "digest")
    first = do(one, upserts=[Item("a", a, {})], idempotency=key)
    assert do(two, upserts=[Item("a", b, {})], idempotency=key) == first
    assert two.snapshot().version == first.gallery_version
    other = Idempotency("k", "other")
    with pytest.raises(IdempotencyConflict):
        do(two, upserts=[Item("a", b, {})], idempotency=other)


def test_shared_log__that_is_lost_refuses_changes_only_and_comes_back_by_itself(
    postgresql: Any, new_database: Callable[[], str], open_gallery: Open, random_units: Units
) -> None:
    (vector,) = random_units(1, 12, 1)
    gallery = open_gallery(new_database())
    do(gallery, upserts=[Item("a", vector, {})])
    assert gallery.trouble() is None
    postgresql.stop()
    try:
        with pytest.raises(StorageError) as error:
            do(gallery, upserts=[Item("b", vector, {})])
        assert not error.value.full
        assert "secret-word" not in str(error.value)
        wait_until(lambda: gallery.trouble() is not None)
        assert "changes are refused" in str(gallery.trouble())
        assert "secret-word" not in str(gallery.trouble())
        found = gallery.snapshot().search(vector[None], 1).rows[0]
        assert gallery.snapshot().item(int(found[0])).id == "a"
    finally:
        postgresql.start()
    assert do(gallery, upserts=[Item("b", vector, {})]).gallery_version == 42
    wait_until(lambda: gallery.trouble() is None)


def wait_until(done: Callable[[], bool]) -> None:
    """Ask again and again for what no event tells."""
    tick = threading.Event()
    for _ in range(WAIT_S * 50):
        if done():
            return
        tick.wait(0.02)
    raise AssertionError("it did not come")


def test_staleness__past_its_bound_is_trouble_with_a_name(
    new_database: Callable[[], str], open_gallery: Open
) -> None:
    gallery = open_gallery(new_database(), follow_interval_s=60.0, max_staleness_s=1e-6)
    assert gallery.staleness_s() > 0
    assert "max_staleness_s" in str(gallery.trouble())
    fresh = open_gallery(new_database(), max_staleness_s=WAIT_S)
    assert fresh.trouble() is None
    assert fresh.lag() == 0


def test_staleness__ends_with_a_change_too(
    new_database: Callable[[], str], open_gallery: Open
) -> None:
    gallery = open_gallery(new_database(), follow_interval_s=3600.0)
    gallery._in_step_at -= 1000.0
    assert "max_staleness_s" in str(gallery.trouble())
    do(gallery, deletes=["nothing"])  # under a constant load there is no time for looking
    assert gallery.trouble() is None


def test_shared_log__damaged_while_it_is_followed_is_named_and_not_served(
    new_database: Callable[[], str], open_gallery: Open, random_units: Units
) -> None:
    url, (vector,) = new_database(), random_units(1, 12, 1)
    one, two = open_gallery(url, follow_interval_s=60.0), open_gallery(url)
    do(two, upserts=[Item("a", vector, {})])
    with psycopg.connect(url) as connection:
        connection.execute("UPDATE operations SET id = 'b' WHERE seq = 41")
    with pytest.raises(GalleryError, match="seq 41: it does not match its checksum"):
        do(one, deletes=["train/0000.png"])
    assert "seq 41" in str(one.trouble())
    assert len(one.snapshot()) == 40
    with pytest.raises(StorageError, match="an earlier failure"):
        do(one, deletes=["train/0000.png"])


def test_database__names_no_password(
    bundle: Bundle, tmp_path: Path, new_database: Callable[[], str], open_gallery: Open
) -> None:
    for url in (
        "postgresql://user:secret-word@127.0.0.1:1/x",
        "postgresql://user@127.0.0.1:1/x?password=secret-word",
        "mysql://user:secret-word@127.0.0.1/x",
        "postgresql://user:secret-word@127.0.0.1:port/x",
        "secret-word",
    ):
        with pytest.raises(GalleryError) as error:
            LoggedGallery(tmp_path / "lost", bundle, url=url)
        assert "secret-word" not in str(error.value)
    gallery = open_gallery(new_database())
    assert "secret-word" not in gallery.database.name
    assert "tester" not in gallery.database.name
    assert gallery.database.version.startswith("postgresql 1")


def test_database__of_another_model_is_refused(
    new_database: Callable[[], str], open_gallery: Open, make_bundle: Any, tmp_path: Path
) -> None:
    url = new_database()
    open_gallery(url)
    other = open_bundle(make_bundle(tmp_path / "other", seed=5))
    with pytest.raises(GalleryError, match="vectors of two models cannot be compared"):
        LoggedGallery(tmp_path / "beside", other, url=url)


def test_database__commits_synchronously_whatever_the_server_prefers(
    new_database: Callable[[], str],
) -> None:
    url = new_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER ROLE tester SET synchronous_commit = off")
    try:
        database = Database(None, url)
        with database.writing() as connection_of_ours:
            shown = connection_of_ours.exec_driver_sql("SHOW synchronous_commit").scalar()
        database.close()
    finally:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("ALTER ROLE tester RESET synchronous_commit")
    assert shown == "on"
