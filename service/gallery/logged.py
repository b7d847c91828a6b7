"""The gallery: an operations log in a database and a faiss snapshot in memory.

In: changes from many requests, and what other processes write to the same log. Out: snapshots. One
writer thread owns the log: it takes what is waiting, writes it in one transaction (fully
synchronised), makes the next snapshot, swaps it in by reference, and only then answers. When
nothing waits it looks what others have written. Readers take the reference and never wait.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import faiss
import numpy as np
import structlog

from service.gallery.changes import Plan, columns, imported, replay
from service.gallery.choice import SearchOptions
from service.gallery.database import Database
from service.gallery.faiss_index import FaissSnapshot
from service.gallery.generations import DIRECTORY, remove_others
from service.gallery.kept_answers import KeptAnswers, recalled
from service.gallery.levels import advance
from service.gallery.oplog import OperationsLog, Writing, open_active
from service.gallery.protocol import (
    Applied,
    Change,
    GalleryError,
    Idempotency,
    IdempotencyConflict,
    PictureGone,
    PictureKind,
    Snapshot,
    StorageError,
    TooManyMatches,
)
from service.gallery.rows import Operation, Remembered, galleries_of
from service.gallery.upkeep import Grown, Upkeep
from service.gallery.writer_queue import Waiting, WriterQueue
from trainer.representation.bundle import Bundle

_DAMAGE_NOTE = "restart the service when the log is mended"

_log = structlog.get_logger("service.gallery")


class LoggedGallery:
    """A gallery whose acknowledged changes survive the process.

    Args:
        state: the state directory, made when missing, locked for this process; or a database that
            is open already and stays so.
        bundle: whose vectors these are; its gallery is imported into an empty database.
        url: of a database that holds the log in place of a file of the directory.
        log: a log of that database other than the active gallery's.
        search: which index the items get, and how often it is kept on disk.
        max_pending: changes that may wait.
        idempotency_ttl_s: how long a key is remembered.
        follow_interval_s: how often a database that others write to is looked at.
        max_staleness_s: after so long without having seen it there is trouble.
        clock: seconds since 1970.

    Raises:
        GalleryError: the state is in use, damaged, of another model, or cannot be written.
    """

    def __init__(
        self,
        state: Path | Database,
        bundle: Bundle,
        *,
        url: str | None = None,
        log: OperationsLog | None = None,
        search: SearchOptions | None = None,
        max_pending: int = 256,
        idempotency_ttl_s: float = 86_400.0,
        follow_interval_s: float = 0.2,
        max_staleness_s: float = 10.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.model_id = bundle.model_id
        self._bundle = bundle
        self._follow_interval_s = follow_interval_s
        self._max_staleness_s = max_staleness_s
        self._listeners: list[Callable[[Snapshot], None]] = []
        self._answers = KeptAnswers(ttl_s=idempotency_ttl_s, clock=clock)
        self._search = search or SearchOptions()
        self._queue = WriterQueue(max_pending)
        self._failure: Exception | None = None
        self._unreachable: str | None = None  # why the database is, while it is
        self._in_step_at = time.monotonic()
        self._gpu = faiss.StandardGpuResources() if faiss.get_num_gpus() > 0 else None
        self._owns_database = not isinstance(state, Database)
        self.database = state if isinstance(state, Database) else Database(state, url)
        opened: Future[FaissSnapshot] = Future()
        self._writer = threading.Thread(
            target=self._write, args=(log, opened), name="gallery-writer", daemon=True
        )
        self._writer.start()
        try:
            self._snapshot = opened.result()
        except BaseException:
            self._release()
            raise
        self._upkeep.start(self._snapshot)

    def snapshot(self) -> FaissSnapshot:
        """The newest acknowledged state."""
        return self._snapshot

    @property
    def log_id(self) -> str:
        """Names the log; see OperationsLog."""
        return self._log.log_id

    @property
    def is_retired(self) -> bool:
        """Whether another gallery has taken this one's place."""
        return self._log.gallery.state == "retired"

    def recall(self, idempotency: Idempotency) -> Applied | None:
        """What the request of this key did, None when the key is new; see protocol.Gallery.

        What another process has answered is found when the change is written.
        """
        return self._answers.recall(idempotency)

    def apply(self, change: Change) -> "Future[Applied]":
        """Queue a change; see protocol.Gallery."""
        return self._queue.put(change)

    def picture(self, item_id: str, kind: PictureKind) -> bytes | None:
        """A picture of an item; see protocol.Gallery."""
        while (seq := self._seq_of(item_id)) is not None:
            try:
                return self._log.picture(seq, kind)
            except PictureGone as gone:
                if self._seq_of(item_id) == seq:  # not replaced between the two looks
                    raise GalleryError(str(gone)) from None
        return None

    def staleness_s(self) -> float:
        """How long ago the snapshot was last seen to be the newest state of the log."""
        return time.monotonic() - self._in_step_at if self.database.is_shared else 0.0

    def lag(self) -> int:
        """Operations of the log, when it was last looked at, that are not in the snapshot."""
        return max(0, self._log.last_seq - self._snapshot.version)

    def trouble(self) -> str | None:
        """What keeps the gallery from being used as it should be; see protocol.Gallery."""
        if self._failure is not None:
            return f"failed: {self._failure}"
        if self._unreachable is not None:
            return f"searches go on, changes are refused: {self._unreachable}"
        if (stale_s := self.staleness_s()) > self._max_staleness_s:
            return (
                f"{stale_s:.1f} s behind the database, at most {self._max_staleness_s:g} "
                "(max_staleness_s) are allowed"
            )
        return None

    @property
    def generation_seq(self) -> int:
        """The last operation in the newest generation on disk, 0 when there is none."""
        return self._upkeep.generation_seq

    @property
    def is_damaged(self) -> bool:
        """Whether the log was found to be damaged; searches go on."""
        return isinstance(self._failure, GalleryError)

    def on_change(self, listener: Callable[[Snapshot], None]) -> None:
        """Call `listener` with every new snapshot; see protocol.Gallery."""
        self._listeners.append(listener)

    def refresh(self) -> None:
        """Look soon for what others have written; see protocol.Gallery."""
        if self.database.is_shared:
            self._queue.look()

    def close(self) -> None:
        """Finish what is queued and release the log and the lock."""
        self._upkeep.stop()
        self._queue.end()
        self._writer.join()
        self._upkeep.close(self._snapshot)
        self._release()

    def _release(self) -> None:
        if self._owns_database:
            self.database.close()

    def _seq_of(self, item_id: str) -> int | None:
        snapshot = self._snapshot
        row = snapshot.row(item_id)
        return None if row is None else int(snapshot.seqs(np.asarray([row]))[0])

    def _replaced(self, grown: Grown) -> "Future[None]":
        """Have the writer apply a function to its snapshot."""
        return self._queue.replace(grown, is_stopping=lambda: self._upkeep.is_stopping)

    def _damaged(self, error: Exception) -> None:
        """The log was read again and is not what it was: nothing is added to it any more."""
        _log.error("log_damaged", cause=str(error))
        self._failure = error

    # What follows runs in the writer thread.

    def _write(self, log: OperationsLog | None, opened: "Future[FaissSnapshot]") -> None:
        try:
            self._log = log or open_active(
                self.database,
                model_id=self.model_id,
                dim=self._bundle.embedding_dim,
                first=lambda: imported(self._bundle.gallery()),
            )
            if log is None:
                self._forget_others()
            first = self._load(self._log)
        except (StorageError, GalleryError) as error:
            # Whoever reads it wants to know which file or database.
            name = self.database.name
            told = str(error) if name in str(error) else f"{name}: {error}"
            opened.set_exception(GalleryError(told))
            return
        except Exception as error:  # noqa: BLE001 - the thread's door: whoever opens gets it
            opened.set_exception(error)
            return
        self._snapshot = first
        opened.set_result(first)
        look_after_s = self._follow_interval_s if self.database.is_shared else None
        while (group := self._queue.next_group(self._grow, timeout_s=look_after_s)) is not None:
            if group:
                self._commit(group)
            else:
                self._follow()

    def _forget_others(self) -> None:
        """Remove the generations of galleries that are no more."""
        if self.database.directory is not None:
            with self.database.reading() as connection:
                rows = galleries_of(connection)
            alive = {row.log_id for row in rows if row.state != "retired"}
            remove_others(self.database.directory / DIRECTORY, alive)

    def _load(self, log: OperationsLog) -> FaissSnapshot:
        started = time.perf_counter()
        log.check_end()
        self._answers.load(log.remembered())
        self._upkeep = Upkeep(
            log, self._search, gpu=self._gpu, replaced=self._replaced, on_damage=self._damaged
        )
        snapshot = self._upkeep.newest()
        if snapshot is None:
            records = replay(log.replay(), self._bundle.embedding_dim)
            snapshot = FaissSnapshot.of(records, log.last_seq, gpu=self._gpu)
        else:
            snapshot = self._advanced(list(log.replay(snapshot.version)), snapshot)
        _log.info(
            "gallery_loaded",
            items=len(snapshot),
            gallery_version=log.last_seq,
            generation=self._upkeep.generation_seq,
            database=self.database.version,
            duration_s=round(time.perf_counter() - started, 3),
        )
        return snapshot

    def _commit(self, group: list[Waiting]) -> None:
        outcomes: list[Applied | Exception]
        try:
            if self._failure is not None:
                raise StorageError(
                    f"an earlier failure stands in the way; {_DAMAGE_NOTE} "
                    f"(cause: {self._failure})",
                    full=False,
                )
            outcomes = self._apply_all([change for change, _ in group])
            self._unreachable = None
        except StorageError as error:
            outcomes = [error] * len(group)
        except Exception as error:  # noqa: BLE001 - handed to every waiting request
            self._failure = error
            outcomes = [error] * len(group)
        for (_, future), outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, Applied):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)

    def _apply_all(self, changes: Sequence[Change]) -> list[Applied | Exception]:
        """Work out what each change does, write all of it, make the next snapshot."""
        outcomes: list[Applied | Exception] = []
        fresh: dict[str, Remembered] = {}
        horizon = self._answers.horizon()
        seen_at = time.monotonic()
        with self._log.writing() as transaction:
            base = self._advanced(transaction.operations(self._snapshot.version))
            self._recall_from(transaction, changes)
            plans = [Plan(base, transaction.gallery.last_seq)]
            for change in changes:
                if change.delete_matching is not None and plans[-1].operations:
                    # A filter looks at a snapshot: at one with the changes before it.
                    base = self._advance(base, plans[-1])
                    plans.append(Plan(base, plans[-1].last_seq))
                outcomes.append(self._plan(change, plans[-1], fresh))
            operations = [o for plan in plans for o in plan.operations]
            if operations or fresh:
                transaction.append(
                    operations,
                    pictures={k: v for plan in plans for k, v in plan.pictures.items()},
                    gone=[seq for plan in plans for seq in plan.gone_seqs()],
                    remember=list(fresh.values()),
                    forget_before=horizon,
                )
        # On disk. What follows is in memory only.
        self._in_step_at = seen_at
        self._answers.keep(fresh, horizon)
        self._publish(self._advance(base, plans[-1]) if plans[-1].operations else base)
        return outcomes

    def _plan(
        self, change: Change, plan: Plan, fresh: dict[str, Remembered]
    ) -> Applied | Exception:
        key = change.idempotency
        try:
            if key is None:
                return plan.add(change)
            if key.key in fresh:  # repeated within this group
                return recalled(fresh[key.key], key)
            done = self._answers.recall(key)
            if done is None:
                done = plan.add(change)
                fresh[key.key] = self._answers.entry(key, done)
            return done
        except (IdempotencyConflict, TooManyMatches) as refusal:
            return refusal

    def _recall_from(self, transaction: Writing, changes: Sequence[Change]) -> None:
        """Learn what other processes answered under the keys of these changes."""
        if self.database.is_shared:
            keys = [c.idempotency.key for c in changes if c.idempotency is not None]
            self._answers.learn(transaction.answers(keys))

    def _follow(self) -> None:
        """Take over what others have written."""
        if self._failure is not None:
            return
        try:
            seen_at = time.monotonic()
            self._log.refresh()
            self._publish(self._advanced(list(self._log.replay(self._snapshot.version))))
            self._in_step_at = seen_at
            self._unreachable = None
        except StorageError as error:
            if self._unreachable is None:
                _log.warning("database_unreachable", cause=str(error))
            self._unreachable = str(error)
        except Exception as error:  # noqa: BLE001 - named by `trouble`; searches go on
            _log.error("gallery_failed", exc_info=error)
            self._failure = error

    def _advanced(
        self, operations: Sequence[tuple[int, Operation]], snapshot: FaissSnapshot | None = None
    ) -> FaissSnapshot:
        """The snapshot, ours by default, after operations that others have written."""
        snapshot = self._snapshot if snapshot is None else snapshot
        if not operations:
            return snapshot
        plan = Plan(snapshot, snapshot.version)
        for seq, operation in operations:
            plan.follow(seq, operation)
        return self._advance(snapshot, plan)

    def _grow(self, grown: Grown) -> None:
        self._publish(grown(self._snapshot))

    def _publish(self, snapshot: FaissSnapshot) -> None:
        if snapshot is not self._snapshot:
            self._snapshot = snapshot
            for listener in self._listeners:
                listener(snapshot)
            self._upkeep.notice(snapshot)

    def _advance(self, old: FaissSnapshot, plan: Plan) -> FaissSnapshot:
        """The snapshot after the plan."""
        return advance(
            old,
            gone=np.asarray(sorted(plan.gone), np.int64),
            fresh=columns(list(plan.upserts.values()), self._bundle.embedding_dim),
            version=plan.last_seq,
        )
