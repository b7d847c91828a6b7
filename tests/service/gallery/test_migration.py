"""service.gallery.migration: states of the first version are taken over whole or not at all."""

import json
import sqlite3
import zlib
from pathlib import Path

import numpy as np
import pytest

from service.gallery.database import FILE_NAME, Database
from service.gallery.oplog import Operation, Remembered, open_active
from service.gallery.protocol import GalleryError

MODEL = "m" * 64
VECTOR = np.float32([0, 1, 0]).tobytes()


def crc(head: list[object], *parts: bytes | None) -> int:
    total = zlib.crc32(json.dumps(head).encode())
    for part in parts:
        total = zlib.crc32(b"-" if part is None else b"%d:" % len(part) + part, total)
    return total


def write_version_1(directory: Path) -> Path:
    """What the first version wrote: two items, one deleted, one answer."""
    path = directory / FILE_NAME
    connection = sqlite3.connect(path)
    with connection:
        for table in (
            "header (schema TEXT PRIMARY KEY, model_id TEXT NOT NULL, dim INTEGER NOT NULL, "
            "last_seq INTEGER NOT NULL)",
            "operations (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, id TEXT NOT NULL, "
            "model_id TEXT NOT NULL, vector BLOB, metadata BLOB, crc32 INTEGER NOT NULL)",
            "idempotency (key TEXT PRIMARY KEY, digest TEXT NOT NULL, answer BLOB NOT NULL, "
            "created_at FLOAT NOT NULL, crc32 INTEGER NOT NULL)",
        ):
            connection.execute(f"CREATE TABLE {table}")
        connection.execute("INSERT INTO header VALUES ('invprop.gallery/1', ?, 3, 3)", (MODEL,))
        rows: list[tuple[int, str, str, bytes | None, bytes | None]] = [
            (1, "upsert", "ä", VECTOR, b'{"a":1}'),
            (2, "upsert", "b", VECTOR, b"{}"),
            (3, "delete", "b", None, None),
        ]
        for seq, kind, item_id, vector, metadata in rows:
            check = crc([seq, kind, item_id, MODEL], vector, metadata)
            values = (seq, kind, item_id, MODEL, vector, metadata, check)
            connection.execute("INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        check = zlib.crc32(b"{}", zlib.crc32(json.dumps(["k", "d", 5.0]).encode()))
        connection.execute("INSERT INTO idempotency VALUES ('k', 'd', ?, 5.0, ?)", (b"{}", check))
    connection.close()
    return path


def test_migration__keeps_every_operation_and_answer(tmp_path: Path) -> None:
    write_version_1(tmp_path)
    for _ in range(2):  # the second time there is nothing left to do
        database = Database(tmp_path)
        log = open_active(database, model_id=MODEL, dim=3, first=lambda: ())
        log.check_end()
        assert list(log.replay()) == [
            (1, Operation("upsert", "ä", VECTOR, b'{"a":1}')),
            (2, Operation("upsert", "b", VECTOR, b"{}")),
            (3, Operation("delete", "b")),
        ]
        assert log.remembered() == [Remembered("k", "d", b"{}", 5.0)]
        database.close()


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE operations SET id = 'c' WHERE seq = 2", "seq 2 does not match its checksum"),
        ("DELETE FROM operations WHERE seq = 1", "seq 1 is missing, 2 comes next"),
        ("DELETE FROM operations WHERE seq = 3", "table header counts 3 operations, found 2"),
        ("DELETE FROM header", "table header has not one row"),
        ("UPDATE idempotency SET digest = 'e'", "key 'k' is damaged"),
    ],
)
def test_migration__leaves_a_damaged_state_as_it_was(
    tmp_path: Path, statement: str, named: str
) -> None:
    connection = sqlite3.connect(write_version_1(tmp_path))
    with connection:
        connection.execute(statement)
    before = list(connection.iterdump())
    with pytest.raises(GalleryError, match=named):
        Database(tmp_path)
    assert list(connection.iterdump()) == before
    connection.close()
