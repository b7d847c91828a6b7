"""A state that an earlier version wrote becomes one of this version, in one transaction.

In: a connection to a SQLite file with the tables of schema invprop.gallery/1, which held one
gallery. Out: the same operations under the same sequence numbers in the tables of today; every row
is compared with its old checksum first. A start that is cut short leaves the old tables.
"""

import json
import zlib

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.gallery.protocol import GalleryError
from service.gallery.rows import (
    Operation,
    Remembered,
    add_gallery,
    insert_answers,
    insert_operations,
)
from service.gallery.tables import SCHEMA, metadata, schema_table

_OLD_SCHEMA = "invprop.gallery/1"
_OLD_TABLES = ("header", "operations", "idempotency")
_READ_ROWS = 4096


def is_of_version_1(connection: Connection) -> bool:
    """Whether the tables are those of the first version."""
    return sa.inspect(connection).has_table("header")


def migrate_from_1(connection: Connection, name: str) -> int:
    """Move everything over; returns the number of operations.

    Raises:
        GalleryError: the old state is damaged; it is left as it was.
    """
    headers = connection.exec_driver_sql("SELECT schema, model_id, dim, last_seq FROM header").all()
    for table in _OLD_TABLES:
        connection.exec_driver_sql(f"ALTER TABLE {table} RENAME TO old_{table}")
    metadata.create_all(connection)
    connection.execute(sa.insert(schema_table), {"schema": SCHEMA})
    counted = connection.exec_driver_sql("SELECT count(*) FROM old_operations").scalar()
    if len(headers) > 1 or (not headers and counted):
        raise _damage(name, "table header", "has not one row")
    moved = 0
    if headers:
        schema, model_id, dim, last_seq = headers[0]
        if schema != _OLD_SCHEMA:
            raise GalleryError(f"{name} has schema {schema!r}, wanted {_OLD_SCHEMA!r}")
        row = add_gallery(connection, model_id=model_id, dim=dim)

        def old() -> list[Operation]:
            found: list[Operation] = []
            for seq, kind, item_id, model, vector, extra, crc32 in connection.exec_driver_sql(
                "SELECT seq, kind, id, model_id, vector, metadata, crc32 FROM old_operations "
                f"WHERE seq > {moved} ORDER BY seq LIMIT {_READ_ROWS}"
            ):
                where = f"table operations, seq {moved + len(found) + 1}"
                if seq != moved + len(found) + 1:
                    raise _damage(name, where, f"is missing, {seq} comes next")
                if crc32 != _old_checksum(seq, kind, item_id, model, vector, extra):
                    raise _damage(name, where, "does not match its checksum")
                if model != model_id:
                    raise _damage(name, where, f"belongs to model {model!r}")
                found.append(Operation(kind, item_id, vector, extra))
            return found

        while batch := old():
            row = insert_operations(connection, row, batch)
            moved += len(batch)
        if moved != last_seq:
            raise _damage(name, "table header", f"counts {last_seq} operations, found {moved}")
        answers = []
        for *fields, crc32 in connection.exec_driver_sql(
            "SELECT key, digest, answer, created_at, crc32 FROM old_idempotency"
        ):
            entry = Remembered(*fields)
            if crc32 != entry.checksum():
                raise _damage(name, f"table idempotency, key {entry.key!r}", "is damaged")
            answers.append(entry)
        insert_answers(connection, row, answers)
    for table in _OLD_TABLES:
        connection.exec_driver_sql(f"DROP TABLE old_{table}")
    return moved


def _old_checksum(
    seq: int, kind: str, item_id: str, model: str, vector: bytes | None, extra: bytes | None
) -> int:
    crc = zlib.crc32(json.dumps([seq, kind, item_id, model]).encode())
    for part in (vector, extra):
        crc = zlib.crc32(b"-" if part is None else b"%d:" % len(part) + part, crc)
    return crc


def _damage(name: str, where: str, what: str) -> GalleryError:
    return GalleryError(
        f"{name} is of an earlier version and cannot be taken over: {where} {what}. It was left as "
        "it was; restore it from a copy"
    )
