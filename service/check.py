"""Verify a gallery: python -m service.check --state DIR | --database URL [--bundle DIR] [--json]

In: the state directory of a service that is stopped, or a PostgreSQL database. Out: what there is
and everything that is wrong with it: rows against their checksums and counts, pictures against
their hashes and the items that hold them, snapshots on disk against the log. Nothing is changed,
but for what SQLite itself takes back of a change that a kill cut short. Exit code 0: sound, 1:
damaged, 2: it could not be looked at. Also what backups and restored copies are verified with.
"""

import argparse
import contextlib
import fcntl
import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import orjson
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.gallery.database import LOCK_NAME, Database
from service.gallery.protocol import GalleryError, StorageError
from service.gallery.rows import GalleryRow, Operation, Remembered, galleries_of
from service.gallery.tables import (
    SCHEMA,
    held,
    idempotency,
    metadata,
    operations,
    pictures,
    schema_table,
)
from trainer.representation.artifact import ArtifactError, open_artifact
from trainer.representation.bundle import BundleError, open_bundle

GENERATIONS = "generations"  # one directory for each log, in it one for each snapshot
UNIT = 1e-3  # how far a stored vector may be from unit length
_READ_ROWS = 1024
_TOLD = 20  # problems of one kind that are told one by one

Pictured = dict[int, tuple[bytes | None, bytes | None]]  # seq -> hashes that its item holds


@dataclass(frozen=True)
class GallerySummary:
    """What one gallery of a database holds."""

    id: int
    log_id: str
    model_id: str
    dim: int
    state: str
    operations: int
    items: int
    answers: int  # kept under an Idempotency-Key
    pictured: int  # items with a picture


@dataclass
class Report:
    """What there is, and what is wrong with it."""

    name: str
    galleries: list[GallerySummary] = field(default_factory=list)
    pictures: int = 0
    generations: int = 0
    problems: list[str] = field(default_factory=list)
    _kinds: Counter[str] = field(default_factory=Counter)

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def add(self, kind: str, problem: str) -> None:
        """Note a problem; of many of a kind the first ones and their number."""
        self._kinds[kind] += 1
        if self._kinds[kind] <= _TOLD:
            self.problems.append(problem)
        elif self._kinds[kind] == _TOLD + 1:
            self.problems.append(f"more like the {_TOLD} before: {kind}")

    def text(self) -> str:
        """For people."""
        lines = [self.name]
        for one in self.galleries:
            lines.append(
                f"  gallery {one.id}, {one.state}: {one.items:,} items after {one.operations:,} "
                f"operations, {one.pictured:,} with a picture, {one.answers:,} kept answers; model "
                f"{one.model_id[:12]}, dim {one.dim}"
            )
        lines.append(f"  {self.pictures:,} pictures, {self.generations:,} snapshots on disk")
        lines += [f"DAMAGED: {problem}" for problem in self.problems]
        lines.append("sound" if self.is_sound else f"{sum(self._kinds.values()):,} problems")
        return "\n".join(lines) + "\n"

    def json(self) -> bytes:
        """For programs."""
        facts = {name: value for name, value in asdict(self).items() if not name.startswith("_")}
        return orjson.dumps({"sound": self.is_sound, **facts}, option=orjson.OPT_APPEND_NEWLINE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and report; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m service.check", description="Verify a gallery; nothing is changed."
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--state", type=Path, help="State directory of a service that is stopped.")
    where.add_argument("--database", help="postgresql:// URL; services may go on writing to it.")
    parser.add_argument("--bundle", type=Path, help="Verify this bundle too: it must be the one.")
    parser.add_argument("--json", action="store_true", help="The report as one JSON object.")
    given = parser.parse_args(arguments)
    try:
        with _unused(given.state):
            database = Database(given.state, given.database, make=False)
            try:
                report = check(database, bundle=given.bundle)
            finally:
                database.close()
    except (GalleryError, StorageError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if given.json:
        sys.stdout.buffer.write(report.json())
    else:
        sys.stdout.write(report.text())
    sys.stdout.flush()
    return 0 if report.is_sound else 1


def check(database: Database, *, bundle: Path | None = None) -> Report:
    """Read everything that a database and its directory hold, in one transaction.

    Args:
        database: opened with make=False; its directory may be None.
        bundle: a bundle that the active gallery must belong to.

    Raises:
        StorageError: a database server cannot be reached. What is wrong with a file is a problem of
            the report.
    """
    report = Report(database.name)
    found: list[GalleryRow] = []
    try:
        with database.reading() as connection:
            _begin(connection)
            if _has_tables(connection, report):
                found = check_rows(connection, report)
    except StorageError as error:
        if database.is_shared:
            raise
        report.add("database", f"{report.name}: {error}")
    if database.directory is not None:
        _check_generations(database, found, report)
    if bundle is not None:
        _check_bundle(bundle, found, report)
    return report


@contextlib.contextmanager
def _unused(state: Path | None) -> Iterator[None]:
    """A block during which no service takes the state directory."""
    if state is None or not (state / LOCK_NAME).exists():
        yield
        return
    with (state / LOCK_NAME).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GalleryError(
                f"the state directory {state} is in use by process {file.read().strip()}: stop "
                "that service first, or check a backup of it (python -m service.backup)"
            ) from None
        yield


def _begin(connection: Connection) -> None:
    """Make everything that follows look at one moment."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")


def _has_tables(connection: Connection, report: Report) -> bool:
    """Look at the file itself and for the tables that this version reads."""
    if connection.dialect.name == "sqlite":
        for (line,) in connection.exec_driver_sql("PRAGMA integrity_check(100)"):
            if line != "ok":
                report.add("file", f"{report.name}: {line}")
    there = set(sa.inspect(connection).get_table_names())
    missing = {table.name for table in metadata.sorted_tables} - there
    if "header" in there:
        report.add("schema", "it was written by an earlier version: start the service on it once")
    elif missing:
        report.add("schema", f"there is no table {', '.join(sorted(missing))}")
    if missing:
        return False
    schemas = list(connection.scalars(sa.select(schema_table.c.schema)))
    if schemas != [SCHEMA]:
        report.add("schema", f"table database: wanted the one row {SCHEMA!r}, got {schemas}")
    return True


def check_rows(connection: Connection, report: Report) -> list[GalleryRow]:
    """Read every row of every table; returns the galleries there are."""
    try:
        rows = galleries_of(connection)
    except GalleryError as error:
        report.add("galleries", str(error))
        return []
    active = [row.id for row in rows if row.state == "active"]
    if rows and len(active) != 1:
        report.add("galleries", f"table galleries: wanted one active gallery, got {len(active)}")
    pictured: dict[int, Pictured] = {}
    for row in rows:
        items, pictured[row.id] = _check_operations(connection, row, report)
        answers = _check_answers(connection, row, report)
        report.galleries.append(
            GallerySummary(
                id=row.id,
                log_id=row.log_id,
                model_id=row.model_id,
                dim=row.dim,
                state=row.state,
                operations=row.last_seq,
                items=items,
                answers=answers,
                pictured=len(pictured[row.id]),
            )
        )
    known = [row.id for row in rows]
    for table in (operations, idempotency, held):
        strange = sa.select(sa.func.count()).where(table.c.gallery.not_in(known))
        if count := connection.scalar(strange):
            report.add("orphans", f"table {table.name}: {count:,} rows of no gallery")
    _check_pictures(connection, pictured, report)
    return rows


def _check_operations(
    connection: Connection, gallery: GalleryRow, report: Report
) -> tuple[int, Pictured]:
    """Every row of a log; returns the number of items and what they hold."""
    statement = (
        sa.select(operations)
        .where(operations.c.gallery == gallery.id)
        .order_by(operations.c.seq)
        .execution_options(yield_per=_READ_ROWS)
    )
    live: dict[str, int] = {}
    pictured: Pictured = {}
    expected = 1
    where = f"gallery {gallery.id}, table operations"
    try:
        for _, seq, *fields, crc32 in connection.execute(statement):
            if not isinstance(seq, int):
                report.add("operations", f"{where}, seq {expected}: its number reads {seq!r}")
                expected += 1
                continue
            if seq != expected:
                report.add("operations", f"{where}, seq {expected}: it is missing, {seq} is next")
            expected = seq + 1
            operation = Operation(*fields)
            problem = _problem_of(operation, gallery, seq, crc32)
            if problem is not None:
                report.add("operations", f"{where}, seq {seq}: {problem}")
                continue
            gone = live.pop(operation.id, None)
            if gone is not None:
                pictured.pop(gone, None)
            if operation.kind == "upsert":
                live[operation.id] = seq
                hashes = (operation.thumbnail, operation.original)
                if hashes != (None, None):
                    pictured[seq] = hashes
    except (sa.exc.DBAPIError, UnicodeError) as error:
        report.add("operations", f"{where}, seq {expected}: {getattr(error, 'orig', error)}")
        return len(live), pictured
    if expected - 1 != gallery.last_seq:
        report.add(
            "operations",
            f"{where}: the gallery's row counts {gallery.last_seq:,} operations, the last is "
            f"{expected - 1:,}",
        )
    return len(live), pictured


def _problem_of(operation: Operation, gallery: GalleryRow, seq: int, crc32: object) -> str | None:
    """What is wrong with a row, None when nothing is."""
    try:
        if crc32 != operation.checksum(gallery, seq):
            return "it does not match its checksum"
    except (TypeError, AttributeError) as error:  # a column of another type
        return str(error)
    if operation.kind == "delete":
        return None
    if operation.vector is None or len(operation.vector) != 4 * gallery.dim:
        return f"its vector has {len(operation.vector or b'')} bytes, wanted {4 * gallery.dim}"
    length = float(np.linalg.norm(np.frombuffer(operation.vector, "<f4").astype(np.float64)))
    if not abs(length - 1) <= UNIT:
        return f"its vector has the length {length:g}, wanted 1"
    try:
        is_object = isinstance(orjson.loads(operation.metadata or b""), dict)
    except orjson.JSONDecodeError as error:
        return f"its metadata are no JSON: {error}"
    return None if is_object else "its metadata are no JSON object"


def _check_answers(connection: Connection, gallery: GalleryRow, report: Report) -> int:
    """Every answer kept under a key; returns their number."""
    count = 0
    where = f"gallery {gallery.id}, table idempotency"
    try:
        statement = sa.select(idempotency).where(idempotency.c.gallery == gallery.id)
        for _, *fields, crc32 in connection.execute(statement):
            count += 1
            entry = Remembered(*fields)
            try:
                matches = crc32 == entry.checksum()
            except (TypeError, AttributeError):  # a column of another type
                matches = False
            if not matches:
                report.add("answers", f"{where}, key {entry.key!r}: not as its checksum says")
    except (sa.exc.DBAPIError, UnicodeError) as error:
        report.add("answers", f"{where}: {getattr(error, 'orig', error)}")
    return count


def _check_pictures(connection: Connection, pictured: dict[int, Pictured], report: Report) -> None:
    """Pictures against their hashes; who holds them against the items that are there."""
    holders: dict[int, Pictured] = {gallery: {} for gallery in pictured}
    wanted: set[bytes] = set()
    try:
        for gallery, seq, *hashes in connection.execute(sa.select(held)):
            holders.setdefault(gallery, {})[seq] = (hashes[0], hashes[1])
            wanted.update(sha256 for sha256 in hashes if sha256 is not None)
        there: set[bytes] = set()
        statement = sa.select(pictures).execution_options(yield_per=16)
        for sha256, content in connection.execute(statement):
            there.add(sha256)
            if hashlib.sha256(content).digest() != sha256:
                report.add("pictures", f"picture {_hex(sha256)}: it does not match its hash")
    except (sa.exc.DBAPIError, TypeError) as error:  # or a column of another type
        report.add("pictures", f"tables held and pictures: {getattr(error, 'orig', error)}")
        return
    report.pictures = len(there)
    for gallery, items in pictured.items():
        for seq in sorted(items.keys() | holders[gallery].keys()):
            if items.get(seq) != holders[gallery].get(seq):
                report.add(
                    "held",
                    f"gallery {gallery}, table held, seq {seq}: not the pictures that the "
                    "operation names",
                )
    for sha256 in sorted(wanted - there):
        report.add("pictures", f"picture {_hex(sha256)}: it is missing")
    for sha256 in sorted(there - wanted):
        report.add("pictures", f"picture {_hex(sha256)}: no item holds it")


def _check_generations(database: Database, rows: Sequence[GalleryRow], report: Report) -> None:
    """Snapshots on disk: whole, and of an operation that the log has."""
    assert database.directory is not None
    logs = {row.log_id: row for row in rows}
    for path in sorted((database.directory / GENERATIONS).glob("*/gen-*")):
        report.generations += 1
        where = str(path.relative_to(database.directory))
        try:
            open_artifact(path)
            facts = orjson.loads((path / "facts.json").read_bytes())
            origin = facts["origin"]
            log = logs.get(origin["log_id"])
            if log is None or path.parent.name != log.log_id:
                problem: str | None = "it is of a log that is not there"
            else:
                problem = _origin_problem(database, log, origin["seq"], origin["operation"])
        except (ArtifactError, OSError, orjson.JSONDecodeError, KeyError, TypeError) as error:
            problem = str(error)
        if problem is not None:
            report.add("generations", f"{where}: {problem}. The service makes it anew")


def _origin_problem(database: Database, log: GalleryRow, seq: int, crc32: int) -> str | None:
    statement = sa.select(operations.c.crc32).where(
        operations.c.gallery == log.id, operations.c.seq == seq
    )
    try:
        with database.reading() as connection:
            there = connection.scalar(statement)
    except StorageError as error:
        return str(error)
    if seq and there != crc32:
        return f"operation {seq} of the log is another one"
    return None


def _check_bundle(directory: Path, rows: Sequence[GalleryRow], report: Report) -> None:
    try:
        bundle = open_bundle(directory)
    except BundleError as error:
        report.add("bundle", str(error))
        return
    for row in rows:
        if row.state == "active" and (row.model_id, row.dim) != (
            bundle.model_id,
            bundle.embedding_dim,
        ):
            report.add(
                "bundle",
                f"{directory} is model {bundle.model_id[:12]} (dim {bundle.embedding_dim}), the "
                f"active gallery belongs to model {row.model_id[:12]} (dim {row.dim})",
            )


def _hex(sha256: object) -> str:
    return sha256.hex()[:16] if isinstance(sha256, bytes) else repr(sha256)


if __name__ == "__main__":
    sys.exit(main())
