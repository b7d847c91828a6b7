"""Bring a backup back: python -m service.restore --from DIR --state DIR | --database URL

In: a directory that `service.backup` made, from SQLite or PostgreSQL. Out: a state directory, or
the tables of an empty PostgreSQL database, with the same galleries under the same versions. The
backup is verified before anything is written, what was written is verified before it counts: a
restore that fails leaves nothing behind.
"""

import argparse
import os
import shutil
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import sqlalchemy as sa

from service.backup import SCHEMA, CopyError, insert_all
from service.check import Report, check, check_rows
from service.gallery.database import FILE_NAME, Database
from service.gallery.protocol import GalleryError, StorageError
from service.gallery.tables import metadata
from trainer.representation.artifact import MANIFEST, ArtifactError, open_artifact


def main(arguments: Sequence[str] | None = None) -> int:
    """Restore and say what is there; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m service.restore", description="Bring a backup back."
    )
    parser.add_argument("--from", type=Path, required=True, dest="source", help="The backup.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--state", type=Path, help="State directory to make; empty if it exists.")
    where.add_argument("--database", help="postgresql:// URL of a database without a gallery.")
    given = parser.parse_args(arguments)
    try:
        report = restore(given.source, given.state, given.database)
    except (CopyError, GalleryError, StorageError, ArtifactError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"restored:\n{report.text()}")
    return 0


def restore(source: Path, state: Path | None, url: str | None) -> Report:
    """Write the galleries of a backup to a state directory or a database; returns what is there.

    Raises:
        ArtifactError, CopyError: the backup is damaged or none, or the target is not empty.
        StorageError, GalleryError, OSError: the target cannot be written; nothing of it is left.
    """
    manifest = open_artifact(source)
    if manifest.get("schema") != SCHEMA:
        raise CopyError(
            f"{source} is no backup that this version reads: its manifest says schema "
            f"{manifest.get('schema')!r}, wanted {SCHEMA!r}"
        )
    # A journal that somebody left beside the file would be played back into it.
    if strange := {path.name for path in source.iterdir()} - {FILE_NAME, MANIFEST}:
        raise CopyError(f"{source} holds {', '.join(sorted(strange))}, which is no part of it")
    backup = Database(source, make=False)
    try:
        _verified(check(backup), f"{source} is damaged, nothing was restored")
        if state is not None:
            return _to_directory(source, state)
        assert url is not None
        return _to_server(backup, url)
    finally:
        backup.close()


def _to_directory(source: Path, state: Path) -> Report:
    if state.exists() and (not state.is_dir() or any(state.iterdir())):
        raise CopyError(f"{state} is not empty: give --state a directory that is, or a new one")
    state.parent.mkdir(parents=True, exist_ok=True)
    fresh = state.parent / f".{state.name}.new-{uuid.uuid4().hex[:12]}"
    placed = fresh
    fresh.mkdir()
    try:
        shutil.copyfile(source / FILE_NAME, fresh / FILE_NAME)
        written = Database(fresh, make=False)
        try:
            report = _verified(check(written), f"what was written to {fresh} is damaged")
        finally:
            written.close()
        for path in (fresh / FILE_NAME, fresh):
            _synchronise(path)
        placed = fresh.rename(state)  # onto nothing, or an empty directory
        _synchronise(state.parent)
    except BaseException:
        shutil.rmtree(placed, ignore_errors=True)
        raise
    report.name = str(state / FILE_NAME)
    return report


def _to_server(backup: Database, url: str) -> Report:
    """All tables in one transaction, which ends only when they have been read again."""
    target = Database(None, url)
    try:
        with target.writing() as new, backup.reading() as old:
            for table in metadata.sorted_tables:
                count = new.scalar(sa.select(sa.func.count()).select_from(table))
                if count and table.name != "database":  # whose one row names the schema
                    raise CopyError(
                        f"{target.name} holds a gallery already ({count:,} rows in table "
                        f"{table.name}): give --database an empty one"
                    )
                new.execute(sa.delete(table))
            insert_all(old, new)
            report = Report(target.name)
            check_rows(new, report)
            return _verified(report, f"what was written to {target.name} is damaged")
    finally:
        target.close()


def _verified(report: Report, otherwise: str) -> Report:
    if not report.is_sound:
        raise CopyError(f"{otherwise}: {'; '.join(report.problems[:3])}")
    if not report.galleries:
        raise CopyError(f"{otherwise}: there is no gallery in it")
    return report


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
