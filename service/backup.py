"""Copy a gallery while it is served: python -m service.backup --state DIR | --database URL --to DIR

In: a state directory or a PostgreSQL database; services may go on writing. Out: a directory that
appears whole or not at all: one SQLite file with all galleries, answers and pictures as they stood
at one moment, and a manifest with its SHA-256. The copy is verified row by row before it gets its
name. Snapshots and other caches are left out; a service makes them again.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.check import Report, check
from service.gallery.database import FILE_NAME, Database
from service.gallery.protocol import GalleryError, StorageError
from service.gallery.tables import metadata
from service.settings import from_environment
from trainer.representation.artifact import ArtifactError, write_artifact

SCHEMA = "invprop.backup/1"
_COPY_ROWS = 1000
_PIECE_BYTES = 1 << 20
_BUSY_S = 60.0  # how long another transaction on the file is waited for


class CopyError(Exception):
    """A backup or a restore that was not made; the message says why and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a backup and say what is in it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m service.backup", description="Copy a gallery while it is served."
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--state", type=Path, help="State directory.")
    where.add_argument("--database", help="postgresql:// URL.")
    parser.add_argument("--to", type=Path, required=True, help="Directory to make; must not exist.")
    given = parser.parse_args(arguments)
    if from_environment("gallery") is not None:
        sys.stderr.write(
            "error: INVPROP_GALLERY is set: a gallery in Milvus is backed up with Milvus' own "
            "tools. For a log that was there before it moved, unset INVPROP_GALLERY\n"
        )
        return 1
    try:
        report = backup(given.state, given.database, given.to)
    except (CopyError, GalleryError, StorageError, ArtifactError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{given.to} is a backup of\n{report.text()}")
    return 0


def backup(state: Path | None, url: str | None, target: Path) -> Report:
    """Copy a gallery to a directory `target`; returns what is in the copy.

    Raises:
        CopyError: the target exists, or what was copied is damaged.
        GalleryError, StorageError: there is no gallery, or it cannot be read.
        OSError: the target cannot be written; nothing of it is left.
    """
    if target.exists():
        raise CopyError(f"{target} exists: a backup is never written over; give --to another name")
    source = Database(state, url, make=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".backup-", dir=target.parent) as folder:
            copy = Path(folder) / FILE_NAME
            if source.is_shared:
                _copy_rows(source, copy)
            else:
                assert state is not None
                _copy_file(state / FILE_NAME, copy)
            report = _checked(Path(folder), source.name)
            facts: dict[str, Any] = {
                "schema": SCHEMA,
                "source": source.name if url else "state directory",
                "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "version": importlib.metadata.version("invprop"),
                "galleries": [asdict(one) for one in report.galleries],
                "pictures": report.pictures,
            }
            write_artifact(target, {FILE_NAME: _pieces(copy)}, facts)
    finally:
        source.close()
    return report


def insert_all(source: Connection, target: Connection) -> None:
    """Copy every row of every table; the tables of the target are there and empty."""
    for table in metadata.sorted_tables:
        rows = source.execute(sa.select(table).execution_options(yield_per=_COPY_ROWS))
        for part in rows.mappings().partitions():
            target.execute(sa.insert(table), [dict(row) for row in part])


def _copy_file(source: Path, target: Path) -> None:
    """As SQLite copies a file that others write to: a writer waits until it is copied."""
    try:
        with (
            contextlib.closing(sqlite3.connect(source, timeout=_BUSY_S)) as old,
            contextlib.closing(sqlite3.connect(target)) as new,
        ):
            old.backup(new, pages=-1)
    except sqlite3.Error as error:
        raise CopyError(f"{source} cannot be copied: {error}") from error


def _copy_rows(source: Database, target: Path) -> None:
    """From a database server, at one moment of it."""
    engine = sa.create_engine(sa.URL.create("sqlite", database=str(target)))
    try:
        with source.reading() as old, engine.begin() as new:
            old.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            missing = set(metadata.tables) - set(sa.inspect(old).get_table_names())
            if missing:
                raise CopyError(f"there is no gallery in {source.name}: no tables of ours")
            metadata.create_all(new)
            insert_all(old, new)
    finally:
        engine.dispose()


def _checked(folder: Path, name: str) -> Report:
    copy = Database(folder, make=False)
    try:
        report = check(copy)
    finally:
        copy.close()
    report.name = name
    if not report.is_sound:
        shown = "; ".join(report.problems[:3])
        raise CopyError(
            f"{name} is damaged, no backup was made: {shown}. Stop the service and look at all of "
            "it with python -m service.check; older backups are what to restore"
        )
    return report


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


if __name__ == "__main__":
    sys.exit(main())
