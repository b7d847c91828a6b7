"""service.gallery.oplog: what was appended comes back, or its damage is named."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.gallery import oplog
from service.gallery.database import FILE_NAME, Database
from service.gallery.oplog import Operation, Remembered, open_active
from service.gallery.protocol import GalleryError, GalleryRetired, StorageError
from service.gallery.rows import add_gallery, galleries_of, update_gallery

MODEL, DIM = "m" * 64, 3
FIRST = Operation("upsert", "a/ü.png", np.float32([1, 0, 0]).tobytes(), b'{"n":1}')
SECOND = Operation("upsert", "b", np.float32([0, 1, 0]).tobytes(), b"{}")
THIRD = Operation("delete", "b")
KEPT = Remembered("key", "digest", b'{"added":1}', 100.0)


class Opened:
    """A log with its database, as most tests want them."""

    def __init__(self, directory: Path, *, model_id: str = MODEL, dim: int = DIM) -> None:
        self.database = Database(directory)
        try:
            self.log = open_active(self.database, model_id=model_id, dim=dim, first=lambda: ())
        except BaseException:
            self.database.close()
            raise

    def append(self, operations: list[Operation], **more: Any) -> int:
        with self.log.writing() as transaction:
            return transaction.append(operations, **more)

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.database.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A state with three operations and an answer."""
    with Opened(tmp_path) as opened:
        assert opened.append([FIRST, SECOND]) == 2
        assert opened.append([THIRD], remember=[KEPT]) == 3
    return tmp_path


def change(directory: Path, statement: str, *values: object) -> None:
    """Damage the file as no program of ours would."""
    connection = sqlite3.connect(directory / FILE_NAME)
    with connection:
        connection.execute(statement, values)
    connection.close()


def replayed(directory: Path) -> list[tuple[int, Operation]]:
    with Opened(directory) as opened:
        opened.log.check_end()
        opened.log.remembered()
        return list(opened.log.replay())


def test_log__gives_back_what_was_appended(directory: Path) -> None:
    assert replayed(directory) == [(1, FIRST), (2, SECOND), (3, THIRD)]
    with Opened(directory) as opened:
        assert (opened.log.last_seq, opened.log.remembered()) == (3, [KEPT])
        assert list(opened.log.replay(after=2)) == [(3, THIRD)]
        assert list(opened.log.replay(after=3)) == []


def test_log__is_read_in_parts(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oplog, "_READ_ROWS", 2)
    assert [seq for seq, _ in replayed(directory)] == [1, 2, 3]


def test_log__begins_with_its_first_operations_or_not_at_all(tmp_path: Path) -> None:
    def broken() -> Iterator[Operation]:
        yield FIRST
        raise OSError("cut short")

    database = Database(tmp_path)
    with pytest.raises(OSError, match="cut short"):
        open_active(database, model_id=MODEL, dim=DIM, first=broken)
    log = open_active(database, model_id=MODEL, dim=DIM, first=lambda: [SECOND])
    assert list(log.replay()) == [(1, SECOND)]
    again = open_active(database, model_id=MODEL, dim=DIM, first=lambda: [FIRST])
    assert (again.log_id, again.last_seq) == (log.log_id, 1)  # it is there already
    database.close()


def test_log__synchronises_fully_and_uses_a_rollback_journal(tmp_path: Path) -> None:
    with Opened(tmp_path) as opened, opened.log.writing() as transaction:
        pragma = transaction.connection.exec_driver_sql
        assert pragma("PRAGMA journal_mode").scalar() == "delete"
        assert pragma("PRAGMA synchronous").scalar() == 3  # EXTRA


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE operations SET vector = x'000000000000000000000000' WHERE seq = 2", "seq 2"),
        ("UPDATE operations SET id = 'c' WHERE seq = 2", "seq 2"),
        ("UPDATE operations SET id = CAST(x'ff' AS TEXT) WHERE seq = 2", "operations, seq 2: "),
        ("UPDATE operations SET kind = 'delete' WHERE seq = 1", "seq 1"),
        ("UPDATE operations SET metadata = x'7b7d' WHERE seq = 1", "seq 1"),
        ("UPDATE operations SET metadata = NULL WHERE seq = 1", "seq 1"),
        ("UPDATE operations SET vector = 'text' WHERE seq = 1", "seq 1"),
        ("UPDATE operations SET thumbnail = x'00' WHERE seq = 3", "seq 3"),
        ("UPDATE operations SET crc32 = crc32 + 1 WHERE seq = 3", "seq 3"),
        ("DELETE FROM operations WHERE seq = 2", "seq 2: it is missing, 3 comes next"),
        ("DELETE FROM operations WHERE seq = 3", "seq 3: the gallery's row counts 3"),
        ("UPDATE operations SET seq = 4 WHERE seq = 3", "seq 4: the gallery's row counts 3"),
        ("DELETE FROM database", "table database"),
        ("UPDATE database SET schema = 'else'", "schema 'else'"),
        ("UPDATE galleries SET model_id = 'else'", "table galleries, id 1"),
        ("UPDATE galleries SET state = 'retired'", "table galleries, id 1"),
        ("UPDATE galleries SET last_seq = 2", "table galleries, id 1"),
        ("UPDATE idempotency SET answer = x'00'", "table idempotency, key 'key'"),
    ],
)
def test_log__names_its_damage(directory: Path, statement: str, named: str) -> None:
    change(directory, statement)
    with pytest.raises(GalleryError, match=named):
        replayed(directory)


def test_log__of_another_gallery_is_damage(directory: Path, tmp_path: Path) -> None:
    with Opened(tmp_path / "other") as other:
        other.append([FIRST])
    connection = sqlite3.connect(directory / FILE_NAME)
    connection.execute("ATTACH ? AS other", (str(tmp_path / "other" / FILE_NAME),))
    with connection:
        connection.execute("DELETE FROM operations WHERE seq = 1")
        connection.execute("INSERT INTO operations SELECT * FROM other.operations")
    connection.close()
    with pytest.raises(GalleryError, match="seq 1: it does not match its checksum"):
        replayed(directory)


def test_log__is_refused_when_it_is_no_database(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"no database at all" * 100)
    with pytest.raises(GalleryError, match="cannot be opened as a log"):
        Opened(tmp_path)


@pytest.mark.parametrize("changes", [{"model_id": "n" * 64}, {"dim": 4}])
def test_log__of_another_model_is_refused(directory: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(GalleryError, match=r"m{16}.*give --state an empty directory"):
        Opened(directory, **changes)


def test_append__changes_nothing_when_the_disk_refuses(directory: Path) -> None:
    huge = Operation("upsert", "c", b"\0" * 12, b" " * 100_000)
    with Opened(directory) as opened:
        with opened.log.writing() as transaction:
            # No page more than there are; the pragma holds for the one connection of the pool.
            transaction.connection.exec_driver_sql("PRAGMA max_page_count = 1")
        with pytest.raises(StorageError) as error:
            opened.append([huge])
        assert error.value.full
        assert opened.log.last_seq == 3
        with opened.log.writing() as transaction:
            transaction.connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
        assert opened.append([THIRD]) == 4  # goes on without being opened again
    assert len(replayed(directory)) == 4


def test_append__forgets_old_answers(directory: Path) -> None:
    with Opened(directory) as opened:
        opened.append([], forget_before=100.5)
        assert opened.log.remembered() == []


def test_append__is_refused_by_a_retired_gallery(directory: Path) -> None:
    with Opened(directory) as opened:
        with opened.database.writing() as connection:
            update_gallery(connection, opened.log.gallery, state="retired")
        with pytest.raises(GalleryRetired, match=r"m{16}"):
            opened.append([FIRST])
        assert opened.log.gallery.state == "retired"
        assert opened.log.last_seq == 3


def test_galleries__are_never_two_active_ones(directory: Path) -> None:
    with Opened(directory) as opened:
        with opened.database.writing() as connection:
            beside = add_gallery(connection, model_id="n" * 64, dim=4, follows=1)
        with pytest.raises(StorageError), opened.database.writing() as connection:
            update_gallery(connection, beside, state="active")
        with opened.database.reading() as connection:
            assert [r.state for r in galleries_of(connection)] == ["active", "building"]
