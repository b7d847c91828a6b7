"""The gallery of one machine: an operations log on disk and a faiss snapshot in memory.

In: changes from many requests. Out: snapshots. One writer thread owns the log: it takes what is
waiting, writes it in one transaction (fully synchronised), makes the next snapshot, swaps it in by
reference, and only then answers. Readers take the reference and never wait.
"""

import fcntl
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import faiss
import numpy as np
import orjson
import structlog

from service.gallery.changes import Plan, columns, import_gallery, replay
from service.gallery.faiss_index import FaissSnapshot
from service.gallery.levels import advance
from service.gallery.oplog import OperationsLog, Remembered
from service.gallery.protocol import (
    Applied,
    Change,
    GalleryError,
    Idempotency,
    IdempotencyConflict,
    Snapshot,
    StorageError,
)
from trainer.representation.bundle import Bundle

LOCK_NAME = "lock"
# Requests written in one transaction: one synchronisation (about 7 ms) is shared by so many.
GROUP_REQUESTS = 64

_log = structlog.get_logger("service.gallery")


class LoggedGallery:
    """A gallery whose acknowledged changes survive the process.

    Args:
        directory: the state directory; made when missing; locked for this process.
        bundle: whose vectors these are; its gallery is imported into an empty state.
        max_pending: changes that may wait.
        idempotency_ttl_s: how long a key is remembered.
        clock: seconds since 1970.

    Raises:
        GalleryError: the state is in use, damaged, of another model, or cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        bundle: Bundle,
        *,
        max_pending: int = 256,
        idempotency_ttl_s: float = 86_400.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.model_id = bundle.model_id
        self._bundle = bundle
        self._clock = clock
        self._ttl_s = idempotency_ttl_s
        self._listeners: list[Callable[[Snapshot], None]] = []
        self._remembered: dict[str, Remembered] = {}
        self._queue: queue.Queue[tuple[Change, Future[Applied]] | None] = queue.Queue(max_pending)
        self._failure: Exception | None = None
        self._gpu = faiss.StandardGpuResources() if faiss.get_num_gpus() > 0 else None
        self._lock = _own(directory)
        opened: Future[FaissSnapshot] = Future()
        self._writer = threading.Thread(
            target=self._write, args=(directory, opened), name="gallery-writer", daemon=True
        )
        self._writer.start()
        try:
            self._snapshot = opened.result()
        except GalleryError:
            self._lock.close()
            raise

    def snapshot(self) -> FaissSnapshot:
        """The newest acknowledged state."""
        return self._snapshot

    def recall(self, idempotency: Idempotency) -> Applied | None:
        """What the request of this key did, None when the key is new; see protocol.Gallery."""
        kept = self._remembered.get(idempotency.key)
        if kept is None or kept.created_at < self._clock() - self._ttl_s:
            return None
        if kept.digest != idempotency.digest:
            raise IdempotencyConflict(idempotency.key)
        answer: dict[str, Any] = orjson.loads(kept.answer)
        missing, rejected = tuple(answer.pop("missing")), tuple(answer.pop("rejected"))
        return Applied(**answer, missing=missing, rejected=rejected)

    def apply(self, change: Change) -> "Future[Applied]":
        """Queue a change; see protocol.Gallery."""
        future: Future[Applied] = Future()
        self._queue.put_nowait((change, future))
        return future

    def on_change(self, listener: Callable[[Snapshot], None]) -> None:
        """Call `listener` with every new snapshot; see protocol.Gallery."""
        self._listeners.append(listener)

    def close(self) -> None:
        """Finish what is queued and release the log and the lock."""
        self._queue.put(None)
        self._writer.join()
        self._lock.close()

    # What follows runs in the writer thread.

    def _write(self, directory: Path, opened: "Future[FaissSnapshot]") -> None:
        try:
            log = OperationsLog(directory, model_id=self.model_id, dim=self._bundle.embedding_dim)
            first = self._load(log)
        except (GalleryError, StorageError) as error:
            opened.set_exception(GalleryError(str(error)))
            return
        except Exception as error:  # noqa: BLE001 - the thread's door: whoever opens gets it
            opened.set_exception(error)
            return
        self._snapshot = first
        opened.set_result(first)
        try:
            while (group := self._next_group()) is not None:
                self._commit(log, group)
        finally:
            log.close()

    def _load(self, log: OperationsLog) -> FaissSnapshot:
        started = time.perf_counter()
        dim = self._bundle.embedding_dim
        if log.is_new:
            records = import_gallery(log, self._bundle.gallery())
        else:
            self._remembered = {entry.key: entry for entry in log.remembered()}
            records = replay(log, dim)
        _log.info(
            "gallery_loaded",
            items=len(records),
            gallery_version=log.last_seq,
            duration_s=round(time.perf_counter() - started, 3),
        )
        return FaissSnapshot.of(records, log.last_seq, gpu=self._gpu)

    def _next_group(self) -> list[tuple[Change, "Future[Applied]"]] | None:
        first = self._queue.get()
        if first is None:
            return None
        group = [first]
        while len(group) < GROUP_REQUESTS:
            try:
                entry = self._queue.get_nowait()
            except queue.Empty:
                break
            if entry is None:
                self._queue.put(None)  # seen again after this group
                break
            group.append(entry)
        return [entry for entry in group if entry[1].set_running_or_notify_cancel()]

    def _commit(self, log: OperationsLog, group: list[tuple[Change, "Future[Applied]"]]) -> None:
        try:
            if self._failure is not None:
                raise StorageError(
                    "an earlier change failed half-way in memory; restart the service "
                    f"(cause: {self._failure})",
                    full=False,
                )
            outcomes = self._apply_all(log, [change for change, _ in group])
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

    def _apply_all(
        self, log: OperationsLog, changes: Sequence[Change]
    ) -> list[Applied | Exception]:
        """Work out what each change does, write all of it, make the next snapshot."""
        snapshot = self._snapshot
        planned = Plan(snapshot, log.last_seq)
        outcomes: list[Applied | Exception] = []
        fresh: dict[str, Remembered] = {}
        for change in changes:
            key = change.idempotency
            try:
                done = self.recall(key) if key else None
            except IdempotencyConflict as conflict:
                outcomes.append(conflict)
                continue
            if done is None:
                done = planned.add(change)
                if key:
                    entry = Remembered(
                        key.key, key.digest, orjson.dumps(asdict(done)), self._clock()
                    )
                    # Known at once, so that its repetition within this group is answered alike.
                    fresh[key.key] = self._remembered[key.key] = entry
            outcomes.append(done)
        horizon = self._clock() - self._ttl_s
        if planned.operations or fresh:
            try:
                log.append(planned.operations, remember=list(fresh.values()), forget_before=horizon)
            except StorageError:
                for key_text in fresh:
                    del self._remembered[key_text]
                raise
            self._remembered = {
                k: entry for k, entry in self._remembered.items() if entry.created_at >= horizon
            }
        if planned.operations:
            self._snapshot = advance(
                snapshot,
                gone=np.asarray(sorted(planned.gone), np.int64),
                fresh=columns(list(planned.upserts.values()), self._bundle.embedding_dim),
                version=log.last_seq,
            )
            for listener in self._listeners:
                listener(self._snapshot)
        return outcomes


def _own(directory: Path) -> IO[str]:
    """Take the state directory for this process, or say who has it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK_NAME).open("a+")
    except OSError as error:
        raise GalleryError(
            f"the state directory {directory} cannot be used: {error.strerror}; give --state a "
            "directory that can be written"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise GalleryError(
            f"the state directory {directory} is in use by process {owner}: one service owns a "
            "state. Stop that one, or give --state another directory"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
