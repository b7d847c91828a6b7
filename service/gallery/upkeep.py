"""What a gallery does beside its work: indexes, generations on disk, and reading the log again.

In: every new snapshot. Out: snapshots in which the rows lie under the index that their number asks
for, and generations. One thread of low priority; neither readers nor the writer wait for it.
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import structlog

from service.gallery.approximate import Stopped
from service.gallery.choice import Choice, Policy, SearchOptions
from service.gallery.faiss_index import FaissSnapshot
from service.gallery.generations import DIRECTORY, Generations, Origin
from service.gallery.levels import DEAD_SHARE, MERGED_ROWS, adopt
from service.gallery.oplog import OperationsLog
from service.gallery.protocol import GalleryError, StorageError
from service.gallery.segment import Segment
from service.gallery.tuning import read_tuning

# Rows that lie outside the index before it is built anew ...
OUTSIDE_ROWS = 16_384
OUTSIDE_SHARE = 8  # ... or its rows / this, where that is more
RETRY_S = 60.0  # after a failure
_NICENESS = 10  # requests come first

Grown = Callable[[FaissSnapshot], FaissSnapshot]
_log = structlog.get_logger("service.gallery")


class Upkeep:
    """The thread; asked for the newest generation first, then started with the first snapshot.

    Args:
        log: what the generations are of.
        options: which index, how often a generation.
        gpu: faiss' resources, where there is a GPU.
        replaced: has the writer apply a function to its snapshot; done when it is published.
        on_damage: told that a part of the log that no start has read is damaged.
    """

    def __init__(
        self,
        log: OperationsLog,
        options: SearchOptions,
        *,
        gpu: Any,
        replaced: Callable[[Grown], "Future[None]"],
        on_damage: Callable[[Exception], None],
    ) -> None:
        self._operations = log
        self._gpu = gpu
        self._learned = False
        self._policy = Policy(
            options.allowed_bytes,
            options.exact_items,
            cagra=gpu is not None and hasattr(faiss, "GpuIndexCagra"),
        )
        self._state = state = log.database.directory
        self._every = options.snapshot_every
        # A tool that opens a database without a state directory keeps nothing.
        self._generations = Generations(state / DIRECTORY / log.log_id) if state else None
        self._have_replaced = replaced
        self._on_damage = on_damage
        self._written = 0  # the version of the newest generation
        self._read = 0  # ... and of the one that was read
        self._newest: FaissSnapshot | None = None
        self._stopping = False
        self._wait_until = 0.0  # after a failure
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="gallery-upkeep", daemon=True)

    @property
    def generation_seq(self) -> int:
        """The last operation in the newest generation, 0 when there is none."""
        return self._written

    @property
    def is_stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stopping

    def newest(self) -> FaissSnapshot | None:
        """The newest generation on disk that verifies and is of this log.

        Raises:
            GalleryError: the log is damaged at its last operation.
            StorageError: the database is gone.
        """
        if self._generations is None:
            return None
        found = self._generations.newest(self._strange, choose=self._choose, gpu=self._gpu)
        if found is not None:
            self._written = self._read = found.version
        return found

    def start(self, snapshot: FaissSnapshot) -> None:
        """Begin with the first snapshot."""
        self._learn(len(snapshot))
        self._newest = snapshot
        self._thread.start()

    def stop(self) -> None:
        """Begin nothing new."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def notice(self, snapshot: FaissSnapshot) -> None:
        """There is a new snapshot."""
        with self._changed:
            self._newest = snapshot
            self._changed.notify()

    def close(self, snapshot: FaissSnapshot) -> None:
        """Stop, and write what no generation holds yet; `snapshot` is the last one."""
        self.stop()
        if self._thread.ident is not None:
            self._thread.join()
        if self._generations is not None and snapshot.version > self._written:
            self._write(self._generations, snapshot)

    def _learn(self, items: int) -> None:
        """Take over what was measured, once the number of items is known."""
        if self._learned or self._state is None:
            return
        self._learned = True
        tuned = read_tuning(self._state, self._operations.gallery, items)
        self._policy = replace(self._policy, tuned=tuned)

    def _choose(self, items: int) -> Choice:
        self._learn(items)
        return self._policy.choose(items, self._dim)

    @property
    def _dim(self) -> int:
        return self._operations.gallery.dim

    def _origin(self, seq: int) -> Origin:
        gallery, checksum = self._operations.gallery, self._operations.checksum(seq)
        return Origin(gallery.log_id, gallery.model_id, gallery.dim, seq, checksum)

    def _strange(self, origin: Origin) -> str | None:
        """Why a generation is not of this log."""
        gallery = self._operations.gallery
        if (origin.log_id, origin.model_id, origin.dim) != (
            gallery.log_id,
            gallery.model_id,
            gallery.dim,
        ):
            return f"it is of log {origin.log_id}"
        if origin.seq > self._operations.last_seq:
            return f"the log ends at seq {self._operations.last_seq}: it was restored"
        if origin != self._origin(origin.seq):
            return f"the log has another operation at seq {origin.seq}: it was restored"
        return None

    def _scrub(self) -> None:
        """Read what the start did not: the log behind the generation."""
        started = time.perf_counter()
        while self._read and not self._stopping:
            try:
                for seq, _ in self._operations.replay():
                    if self._stopping or seq >= self._read:
                        break
            except GalleryError as error:
                self._on_damage(error)
                return
            except StorageError as error:
                if not self._operations.database.is_shared:
                    self._on_damage(error)
                    return
                with self._changed:  # the server is away
                    self._changed.wait_for(lambda: self._stopping, RETRY_S)
                continue
            _log.info(
                "log_verified",
                seq=self._read,
                duration_s=round(time.perf_counter() - started, 3),
            )
            return

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
        self._scrub()
        while True:
            with self._changed:
                while not self._stopping and (task := self._task()) is None:
                    self._changed.wait(self._pause())
                if self._stopping:
                    return
            assert task is not None
            try:
                task()
            except Stopped:
                return
            except Exception as error:  # noqa: BLE001 - the thread's door: searches go on without
                _log.error("upkeep_failed", exc_info=error)
                self._wait_until = time.monotonic() + RETRY_S

    def _stops(self) -> bool:
        return self._stopping

    def _pause(self) -> float | None:
        left = self._wait_until - time.monotonic()
        return left if left > 0 else None

    def _task(self) -> Callable[[], None] | None:
        snapshot = self._newest
        if snapshot is None or time.monotonic() < self._wait_until:
            return None
        choice = self._policy.choose(len(snapshot), snapshot.dim)
        if _wants_index(snapshot, choice):
            return lambda: self._index(snapshot, choice)
        store = self._generations
        if store is not None and snapshot.version - self._written >= self._every:
            return lambda: self._write(store, snapshot)
        return None

    def _index(self, snapshot: FaissSnapshot, choice: Choice) -> None:
        started = time.perf_counter()
        if not choice.fits:
            _log.warning(
                "search_memory_exceeded",
                items=len(snapshot),
                index=choice.kind,
                allowed_bytes=self._policy.allowed_bytes,
            )
        records = snapshot.take(snapshot.rows())
        directory = Path(tempfile.gettempdir())
        if self._generations is not None:
            directory = self._generations.directory
            directory.mkdir(parents=True, exist_ok=True)
        built = Segment.indexed(
            records,
            choice,
            gpu=snapshot.gpu,
            directory=directory,
            stopping=self._stops,
        )
        if snapshot.segments:  # what was filtered by will be filtered by
            built.postings.prepare(snapshot.segments[0].postings.fields())
        done = self._have_replaced(lambda current: adopt(current, built, snapshot.version))
        while not _is_done(done):
            if self._stopping:  # the writer may be gone; nothing was put in place
                return
        _log.info(
            "index_built",
            index=choice.kind,
            effort=choice.effort,
            items=len(records),
            index_bytes=built.num_bytes,
            duration_s=round(time.perf_counter() - started, 3),
        )

    def _write(self, store: Generations, snapshot: FaissSnapshot) -> None:
        started = time.perf_counter()
        try:
            store.write(snapshot, self._origin(snapshot.version))
        except (OSError, StorageError, GalleryError) as error:
            # A full disk, mostly. The log has everything.
            _log.error("generation_not_written", seq=snapshot.version, reason=str(error))
            self._wait_until = time.monotonic() + RETRY_S
            return
        self._written = snapshot.version
        _log.info(
            "generation_written",
            seq=snapshot.version,
            items=len(snapshot),
            duration_s=round(time.perf_counter() - started, 3),
        )


def _is_done(future: "Future[None]") -> bool:
    try:
        future.result(timeout=1)
    except TimeoutError:
        return False
    return True


def _wants_index(snapshot: FaissSnapshot, choice: Choice) -> bool:
    """Whether the items should lie in one segment under this index, and do not."""
    if not snapshot.segments:
        return False
    first = snapshot.segments[0]
    dead = int(snapshot.dead[: len(first)].sum())
    if choice.kind == "flat":
        if first.kind != "flat":
            return True
        # Larger segments are left alone by the writer.
        return len(first) > MERGED_ROWS and dead > len(first) // DEAD_SHARE
    outside = len(snapshot.dead) - len(first)
    return (
        first.kind != choice.kind
        or outside > max(OUTSIDE_ROWS, len(first) // OUTSIDE_SHARE)
        or dead > max(OUTSIDE_ROWS, len(first) // DEAD_SHARE)
    )
