"""Move a gallery into Milvus, or back: python -m service.migrate --from WHERE --to WHERE

WHERE is a state directory, a postgresql:// URL or a milvus:// URL; one of the two is in Milvus. In:
a gallery that nobody writes to meanwhile. Out: the same items in the same order, served only once
their number, and a sample of items and of their neighbours, agree. Broken off, it goes on where it
stopped when it is started again. Into Milvus versions stay what they were; back, they count from 1.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import sqlalchemy as sa

from service.gallery.changes import replay
from service.gallery.database import Database
from service.gallery.faiss_index import FaissSnapshot
from service.gallery.milvus_facts import (
    State,
    check_bound,
    describe,
    read_state,
    row_of,
    write_state,
)
from service.gallery.milvus_gallery import open_store
from service.gallery.milvus_language import Index
from service.gallery.milvus_lease import KEEP_S, LEASE_S, Lease
from service.gallery.milvus_snapshot import MilvusSnapshot
from service.gallery.oplog import OperationsLog
from service.gallery.protocol import GalleryError, Item, Snapshot, StorageError
from service.gallery.rows import (
    GalleryRow,
    Operation,
    active_of,
    add_gallery,
    encode_metadata,
    galleries_of,
    insert_operations,
    update_gallery,
)
from service.gallery.tables import held

if TYPE_CHECKING:
    from service.gallery.milvus import Store

BLOCK = 2000  # items written before it is noted how far it came
SAMPLE, K = 100, 10  # items that are compared, with so many neighbours of each
# Of what a graph in Milvus finds, this share has to be among the nearest: its recall is 0.95.
LEAST_OVERLAP = 0.9
SIMILARITY_ERROR = 1e-5  # of float32 products of unit vectors, with room


class MigrationError(Exception):
    """The gallery was not moved; the message says why and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Move a gallery; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m service.migrate", description="Move a gallery into Milvus, or back."
    )
    where = "a state directory, postgresql://... or milvus://..."
    parser.add_argument("--from", required=True, dest="source", help=where)
    parser.add_argument("--to", required=True, dest="target", help=where)
    parser.add_argument(
        "--index", choices=get_args(Index), default="flat", help="milvus_index of the new one"
    )
    parser.add_argument(
        "--without-pictures", action="store_true", help="leave thumbnails and originals behind"
    )
    given = parser.parse_args(arguments)
    try:
        if _in_milvus(given.source) == _in_milvus(given.target):
            raise MigrationError(
                "one of --from and --to is in Milvus, and the other is not; logs are moved with "
                "service.backup and service.restore"
            )
        if _in_milvus(given.target):
            items = to_milvus(
                given.source,
                given.target,
                index=given.index,
                without_pictures=given.without_pictures,
                say=_say,
            )
        else:
            items = from_milvus(given.source, given.target, say=_say)
    except (MigrationError, GalleryError, StorageError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"moved: {items:,} items, compared by number and by sample\n")
    return 0


def to_milvus(
    source: str,
    target: str,
    *,
    index: Index,
    without_pictures: bool,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Move the active gallery of a log to a Milvus collection; returns the number of items.

    Raises:
        MigrationError: there are pictures, or the target is something else, or differs at the end.
        GalleryError, StorageError: one of the two is damaged or away.
    """
    database = _database(source, make=False)
    try:
        with database.reading() as connection:
            row = active_of(galleries_of(connection))
            if row is None:
                raise MigrationError(f"{database.name} holds no gallery")
            mine = held.c.gallery == row.id
            pictures = connection.scalar(sa.select(sa.func.count()).select_from(held).where(mine))
        if pictures and not without_pictures:
            raise MigrationError(
                f"{pictures:,} items have pictures, and Milvus keeps none: give "
                "--without-pictures to leave them behind"
            )
        log = OperationsLog(database, row)
        ours = FaissSnapshot.of(replay(log.replay(), row.dim), row.last_seq)
        store = open_store(target)
        try:
            store.make_facts()
            with _holding(store) as hold:
                state = _filled(store, _filling(store, row, index), ours, hold=hold, say=say)
                store.seal()
                count = store.count()
                compare(ours, _snapshot(store, replace(state, version=row.last_seq, items=count)))
                if log.refresh().last_seq != row.last_seq:
                    raise MigrationError(
                        f"{database.name} was written to meanwhile: stop the services on it, and "
                        "give another collection"
                    )
                done = replace(state, version=row.last_seq, reserved=row.last_seq, items=count)
                write_state(store, replace(done, ready=True, source=""))
        finally:
            store.close()
    finally:
        database.close()
    return len(ours)


def from_milvus(
    source: str, target: str, *, say: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Move the gallery of a Milvus collection to a log without one; returns the number of items.

    Raises:
        MigrationError: the target is something else, or differs at the end.
        GalleryError, StorageError: one of the two is damaged or away.
    """
    store = open_store(source)
    try:
        state = read_state(store) if store.has_items() else None
        if state is None or not state.ready:
            raise MigrationError(f"{store.place.name} holds no gallery that is whole")
        store.load()
        with _holding(store) as hold:
            theirs = _snapshot(store, state)
            database = _database(target, make=True)
            try:
                row = _building(database, state)
                for operations, last_seq in _operations(store, state, row.followed_seq):
                    with database.writing() as connection:
                        row = insert_operations(connection, row, operations)
                        row = update_gallery(connection, row, followed_seq=last_seq)
                    hold()
                    say(row.last_seq, state.items)
                log = OperationsLog(database, row)
                ours = FaissSnapshot.of(replay(log.replay(), row.dim), row.last_seq)
                compare(ours, theirs)
                with database.writing() as connection:
                    update_gallery(connection, row, state="active", follows=None, followed_seq=0)
                database.mark_begun()
            finally:
                database.close()
    finally:
        store.close()
    return len(ours)


def compare(ours: FaissSnapshot, theirs: Snapshot) -> None:
    """Compare two galleries by number, and by a sample of items and of their neighbours.

    Raises:
        MigrationError: they differ; says in what.
    """
    if len(ours) != len(theirs):
        raise MigrationError(
            f"the log holds {len(ours):,} items and Milvus {len(theirs):,}: one of them was "
            "written to meanwhile. Stop the services on both, and move it to an empty place"
        )
    if not len(ours):
        return
    rows = np.random.default_rng(0).permutation(ours.rows())[:SAMPLE]
    items = ours.items(rows)
    places = theirs.rows_of([item.id for item in items])
    if (places < 0).any():
        raise MigrationError(f"{int((places < 0).sum())} of {len(rows)} sampled items are missing")
    for item, other in zip(items, theirs.items(places), strict=True):
        same_vector = np.array_equal(item.vector, other.vector)
        if not same_vector or dict(item.metadata) != dict(other.metadata):
            raise MigrationError(f"item {item.id!r} is not the same in both")
    queries = ours.vectors(rows)
    k = min(K, len(ours))
    is_exact = bool(theirs.index()["exact"])
    here, there = ours.search(queries, k), theirs.search(queries, k, exact=is_exact)
    if is_exact:
        # Equal similarities may be given in another choice: what has to agree is how near they are.
        error = float(np.abs(here.similarities - there.similarities).max())
        if error > SIMILARITY_ERROR:
            raise MigrationError(f"neighbours of sampled items differ by {error:.2g} in similarity")
        return
    found = [
        len(set(ours.ids(a)) & set(theirs.ids(b[b >= 0]))) / k
        for a, b in zip(here.rows, there.rows, strict=True)
    ]
    if float(np.mean(found)) < LEAST_OVERLAP:
        raise MigrationError(
            f"the index in Milvus finds {float(np.mean(found)):.2f} of the neighbours of sampled "
            f"items, wanted {LEAST_OVERLAP}"
        )


def _filling(store: "Store", row: GalleryRow, index: Index) -> State:
    """What the target says of itself; begun where it says nothing yet."""
    name = f"log {row.log_id} at version {row.last_seq}"
    state = read_state(store)
    if state is None:
        if store.has_items():
            raise MigrationError(
                f"{store.place.name} is there already and no gallery of this service; give "
                "another collection"
            )
        state = State(row.model_id, row.dim, index, source=name)
        write_state(store, state)
    check_bound(store, state, row.model_id, row.dim, index)
    if state.source != name:
        what = f"is being filled from {state.source}" if state.source else "is in use"
        raise MigrationError(
            f"{store.place.name} {what}, and not from {name}: give another collection"
        )
    store.make_items(row.dim, index, describe(row.model_id))
    return state


def _filled(
    store: "Store",
    state: State,
    ours: FaissSnapshot,
    *,
    hold: Callable[[], None],
    say: Callable[[int, int], None],
) -> State:
    """Write what is not there yet; returns the state after the last block, as it was noted."""
    rows = ours.rows()
    seqs = ours.seqs(rows)
    first = int(np.searchsorted(seqs, state.reserved, side="right"))
    for start in range(first, len(rows), BLOCK):
        block = slice(start, start + BLOCK)
        written = zip(ours.items(rows[block]), seqs[block].tolist(), strict=True)
        store.upsert(store.items, [row_of(item, seq) for item, seq in written])
        state = replace(state, reserved=int(seqs[block][-1]))
        write_state(store, state)
        hold()
        say(start + len(rows[block]), len(rows))
    return state


def _snapshot(store: "Store", state: State) -> MilvusSnapshot:
    exact = state.index == "flat"
    return MilvusSnapshot(
        store, state.version, state.items, dim=state.dim, exact=exact, whole_items=0
    )


def _building(database: Database, state: State) -> GalleryRow:
    """The gallery of the target that is being filled; begun where there is none."""
    with database.writing() as connection:
        rows = galleries_of(connection)
        if not rows:
            # `follows` keeps the version of the source until the gallery is active.
            return add_gallery(
                connection, model_id=state.model_id, dim=state.dim, follows=state.version
            )
    (row, *others) = rows
    wanted = (state.model_id, state.dim, "building", state.version)
    if others or (row.model_id, row.dim, row.state, row.follows) != wanted:
        raise MigrationError(
            f"{database.name} holds a gallery already, or part of one from another source or "
            "version: give an empty place"
        )
    return row


def _operations(store: "Store", state: State, after: int) -> Iterator[tuple[list[Operation], int]]:
    """Blocks of the operations that write a collection's items, in their order, behind a seq."""
    cursor: int | None = after
    while cursor is not None:
        # A snapshot of its own for each block: what it was told is dropped with it.
        part = _snapshot(store, state)
        page = part.page(after=cursor, limit=BLOCK)
        if len(page.rows):
            yield [_operation(item) for item in part.items(page.rows)], int(page.rows[-1])
        cursor = page.next


def _operation(item: Item) -> Operation:
    vector = item.vector.astype("<f4").tobytes()
    return Operation("upsert", item.id, vector, encode_metadata(dict(item.metadata)))


@contextlib.contextmanager
def _holding(store: "Store") -> Iterator[Callable[[], None]]:
    """A block in which nobody else writes to a collection; call what it gives now and then."""
    lease = Lease(store)

    def hold() -> None:
        until = time.monotonic() + LEASE_S + 1  # by then one that was killed has lost it
        while not lease.take():
            if time.monotonic() > until:
                raise MigrationError(
                    f"{store.place.name} is held by another process ({lease.holder}): stop what "
                    "writes to it"
                )
            time.sleep(KEEP_S / 10)

    hold()
    try:
        yield hold
    finally:
        with contextlib.suppress(StorageError):  # it ends by itself where Milvus is away
            lease.release()


def _in_milvus(where: str) -> bool:
    return where.startswith(("milvus://", "milvus+tls://"))


def _database(where: str, *, make: bool) -> Database:
    if where.startswith(("postgresql://", "postgres://")):
        return Database(None, where, make=make)
    return Database(Path(where), make=make)


def _say(done: int, total: int) -> None:
    sys.stdout.write(f"{done:,} of {total:,} items\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
