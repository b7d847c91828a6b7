"""Vectors of bulk embedding into the gallery of a database, by the log's own writer.

In: a directory that service.embed wrote, a database. Out: one transaction a part. An item that has
the same vector already is left as it is, with its metadata and pictures: what was stopped goes on
by being run again, and a second run changes nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.bulk.parts import Manifest, OutputError, Part
from service.gallery.oplog import OperationsLog, Writing
from service.gallery.protocol import Vectors
from service.gallery.rows import Operation, encode_metadata
from service.gallery.tables import operations
from trainer.representation.bundle import MAX_ID_LENGTH

UNIT_TOLERANCE = 1e-3  # what the gallery's check asks of a stored vector
_READ_ROWS = 50_000
_IN_ROWS = 500  # parameters of one statement


class Loaded(NamedTuple):
    """What a load did."""

    added: int = 0
    updated: int = 0
    unchanged: int = 0

    def plus(self, other: "Loaded") -> "Loaded":
        """Both together."""
        return Loaded(*(a + b for a, b in zip(self, other, strict=True)))


def check_loadable(manifest: Manifest, log: OperationsLog, name: str) -> None:
    """Refuse what does not belong into this gallery.

    Raises:
        OutputError: vectors of another model, features, or a run that has not ended.
    """
    plan = manifest.plan
    if plan.model_id != log.gallery.model_id:
        raise OutputError(
            f"{name} holds vectors of model {plan.model_id[:16]}..., the gallery those of model "
            f"{log.gallery.model_id[:16]}...: vectors of two models cannot be compared. Embed the "
            "images again with the bundle of this gallery"
        )
    if plan.vectors != "embedding":
        raise OutputError(
            f"{name} holds {plan.vectors}, a gallery takes embeddings: run service.embed with "
            "--vectors embedding"
        )
    if not manifest.complete:
        raise OutputError(
            f"{name} holds {len(manifest.parts)} of {len(plan.fingerprints)} parts: run "
            "service.embed again, it goes on where it was stopped"
        )


class Loader:
    """Loads parts into one log.

    Args:
        log: of the active gallery.
        advance: told how many more vectors are done.
    """

    def __init__(
        self, log: OperationsLog, advance: Callable[[int], object] = lambda count: None
    ) -> None:
        self._log = log
        self._advance = advance
        self._live: dict[str, int] = {}  # id -> seq of the items that are there
        self._seen = 0  # up to which operation that is so

    def load(self, part: Part) -> Loaded:
        """Write what is new of a part; when it returns, it is on disk.

        Raises:
            OutputError: a vector is not of unit length, or an id cannot be one.
            StorageError, GalleryError: nothing of the part was written.
        """
        _check(part)
        with self._log.writing() as transaction:
            self._look(transaction)
            wanted = dict(zip(part.ids, part.vectors, strict=True))  # of an id twice the last
            there = {i: seq for i in wanted if (seq := self._live.get(i)) is not None}
            same = self._same(transaction.connection, there, wanted)
            fresh = [i for i in wanted if i not in same]
            gone = [there[i] for i in fresh if i in there]
            if fresh:
                first = transaction.gallery.last_seq + 1
                empty = encode_metadata({})
                transaction.append(
                    [
                        Operation("upsert", i, wanted[i].astype("<f4").tobytes(), empty)
                        for i in fresh
                    ],
                    gone=gone,
                )
        if fresh:
            self._live.update(zip(fresh, range(first, first + len(fresh)), strict=True))
            self._seen = first + len(fresh) - 1
        self._advance(len(part.ids))
        return Loaded(len(fresh) - len(gone), len(gone), len(part.ids) - len(fresh))

    def _look(self, transaction: Writing) -> None:
        """Learn which items there are, also those that other processes wrote meanwhile."""
        gallery = transaction.gallery
        while self._seen < gallery.last_seq:
            statement = (
                sa.select(operations.c.seq, operations.c.kind, operations.c.id)
                .where(operations.c.gallery == gallery.id, operations.c.seq > self._seen)
                .order_by(operations.c.seq)
                .limit(_READ_ROWS)
            )
            rows = transaction.connection.execute(statement).all()
            if not rows:
                raise self._log.miscounted(self._seen)
            for seq, kind, item_id in rows:
                if kind == "upsert":
                    self._live[item_id] = seq
                else:
                    self._live.pop(item_id, None)
                self._seen = seq

    def _same(
        self, connection: Connection, there: dict[str, int], wanted: dict[str, Vectors]
    ) -> set[str]:
        """The ids whose items have this very vector."""
        seqs = list(there.values())
        mine = operations.c.gallery == self._log.gallery.id
        same: set[str] = set()
        for start in range(0, len(seqs), _IN_ROWS):
            among = operations.c.seq.in_(seqs[start : start + _IN_ROWS])
            found = connection.execute(
                sa.select(operations.c.id, operations.c.vector).where(mine, among)
            )
            same |= {i for i, vector in found if vector == wanted[i].astype("<f4").tobytes()}
        return same


def _check(part: Part) -> None:
    lengths = np.linalg.norm(part.vectors.astype(np.float64), axis=1)
    bad = np.flatnonzero(~(np.abs(lengths - 1) <= UNIT_TOLERANCE))  # also what is not a number
    if len(bad):
        raise OutputError(
            f"{part.name}: the vector of {part.ids[bad[0]]!r} has the length "
            f"{lengths[bad[0]]:g}, wanted 1; and {len(bad) - 1} more: it was changed or damaged"
        )
    strange = [i for i in part.ids if not i or len(i) > MAX_ID_LENGTH]
    if strange:
        raise OutputError(
            f"{part.name}: {strange[0]!r} is no id: wanted 1..{MAX_ID_LENGTH} characters"
        )
