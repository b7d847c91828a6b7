"""service.gallery.oplog: what was appended comes back, or its damage is named."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from service.gallery.oplog import FILE_NAME, Operation, OperationsLog, Remembered
from service.gallery.protocol import GalleryError, StorageError

MODEL, DIM = "m" * 64, 3
FIRST = Operation("upsert", "a/ü.png", np.float32([1, 0, 0]).tobytes(), b'{"n":1}')
SECOND = Operation("upsert", "b", np.float32([0, 1, 0]).tobytes(), b"{}")
THIRD = Operation("delete", "b")
KEPT = Remembered("key", "digest", b'{"added":1}', 100.0)


def open_log(directory: Path, **changes: object) -> OperationsLog:
    return OperationsLog(directory, **({"model_id": MODEL, "dim": DIM} | changes))  # type: ignore[arg-type]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A state with three operations and an answer."""
    log = open_log(tmp_path)
    assert log.append([FIRST, SECOND]) == 2
    assert log.append([THIRD], remember=[KEPT]) == 3
    log.close()
    return tmp_path


def change(directory: Path, statement: str, *values: object) -> None:
    """Damage the file as no program of ours would."""
    connection = sqlite3.connect(directory / FILE_NAME)
    with connection:
        connection.execute(statement, values)
    connection.close()


def replayed(directory: Path) -> list[tuple[int, Operation]]:
    log = open_log(directory)
    try:
        log.remembered()
        return list(log.replay())
    finally:
        log.close()


def test_log__gives_back_what_was_appended(directory: Path) -> None:
    assert replayed(directory) == [(1, FIRST), (2, SECOND), (3, THIRD)]
    log = open_log(directory)
    assert (log.last_seq, log.is_new, log.remembered()) == (3, False, [KEPT])
    log.close()


def test_log__is_new_until_something_was_appended(tmp_path: Path) -> None:
    for _ in range(2):  # opening alone does not make it an old one
        log = open_log(tmp_path)
        assert (log.is_new, log.last_seq) == (True, 0)
        log.close()
    log = open_log(tmp_path)
    log.append([])  # an empty gallery was imported
    log.close()
    log = open_log(tmp_path)
    assert (log.is_new, log.last_seq) == (False, 0)
    log.close()


def test_log__synchronises_fully_and_uses_a_rollback_journal(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    pragma = log._connection.exec_driver_sql
    assert pragma("PRAGMA journal_mode").scalar() == "delete"
    assert pragma("PRAGMA synchronous").scalar() == 3  # EXTRA
    log.close()


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE operations SET vector = x'000000000000000000000000' WHERE seq = 2", "seq 2"),
        ("UPDATE operations SET id = 'c' WHERE seq = 2", "seq 2"),
        ("UPDATE operations SET kind = 'delete' WHERE seq = 1", "seq 1"),
        ("UPDATE operations SET metadata = x'7b7d' WHERE seq = 1", "seq 1"),
        ("UPDATE operations SET metadata = NULL WHERE seq = 1", "seq 1"),
        ("UPDATE operations SET vector = 'text' WHERE seq = 1", "seq 1"),
        ("UPDATE operations SET model_id = 'other' WHERE seq = 3", "seq 3"),
        ("UPDATE operations SET crc32 = crc32 + 1 WHERE seq = 3", "seq 3"),
        ("DELETE FROM operations WHERE seq = 2", "seq 2: it is missing, 3 comes next"),
        ("DELETE FROM operations WHERE seq = 3", "seq 3: the header counts 3"),
        ("DELETE FROM header", "table header"),
        ("UPDATE header SET schema = 'else'", "schema 'else'"),
        ("UPDATE idempotency SET answer = x'00'", "table idempotency, key 'key'"),
    ],
)
def test_log__names_its_damage(directory: Path, statement: str, named: str) -> None:
    change(directory, statement)
    with pytest.raises(GalleryError, match=named):
        replayed(directory)


def test_log__is_refused_when_it_is_no_database(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"no database at all" * 100)
    with pytest.raises(GalleryError, match="cannot be opened as a log"):
        open_log(tmp_path)


@pytest.mark.parametrize("changes", [{"model_id": "n" * 64}, {"dim": 4}])
def test_log__of_another_model_is_refused(directory: Path, changes: dict[str, object]) -> None:
    with pytest.raises(GalleryError, match="give --state an empty directory"):
        open_log(directory, **changes)


def test_append__changes_nothing_when_the_disk_refuses(directory: Path) -> None:
    log = open_log(directory)
    log._connection.exec_driver_sql("PRAGMA max_page_count = 1")  # no page more than there are
    log._connection.rollback()
    huge = Operation("upsert", "c", b"\0" * 12, b" " * 100_000)
    with pytest.raises(StorageError) as error:
        log.append([huge])
    assert error.value.full
    assert log.last_seq == 3
    log._connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    log._connection.rollback()
    assert log.append([THIRD]) == 4  # goes on without being opened again
    log.close()
    assert len(replayed(directory)) == 4


def test_append__forgets_old_answers(directory: Path) -> None:
    log = open_log(directory)
    log.append([], forget_before=100.5)
    assert log.remembered() == []
    log.close()
