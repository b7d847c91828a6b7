"""What a gallery does beside its work: indexes, generations on disk, and reading the log again.

In: every new snapshot. Out: snapshots in which the rows lie under the index that their number asks
for, and generations. One thread of low priority; neither readers nor the writer wait for it.
"""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import faiss
import structlog

from service.gallery.approximate import Stopped
from service.gallery.choice import Choice, Policy
from service.gallery.faiss_index import FaissSnapshot
from service.gallery.generations import Generations, Origin
from service.gallery.levels import DEAD_SHARE, MERGED_ROWS, adopt
from service.gallery.segment import Segment

# Rows that lie outside the index before it is built anew ...
OUTSIDE_ROWS = 16_384
OUTSIDE_SHARE = 8  # ... or its rows / this, where that is more
RETRY_S = 60.0  # after a failure
_NICENESS = 10  # requests come first

Grown = Callable[[FaissSnapshot], FaissSnapshot]
_log = structlog.get_logger("service.gallery")


class Upkeep:
    """The thread; made before the first snapshot, started with it.

    Args:
        generations: where they are kept.
        policy: which index a gallery gets.
        every: operations between two generations.
        replace: has the writer apply a function to its snapshot; done when it is published.
        origin_of: what the generation of a version belongs to; reads the log.
        scrub: reads what a start from a generation did not; None when it read everything.
    """

    def __init__(
        self,
        generations: Generations,
        policy: Policy,
        *,
        every: int,
        replace: Callable[[Grown], "Future[None]"],
        origin_of: Callable[[int], Origin],
        scrub: Callable[[Callable[[], bool]], None] | None,
    ) -> None:
        self._generations = generations
        self._policy = policy
        self._every = every
        self._replace = replace
        self._origin_of = origin_of
        self._scrub = scrub
        self._written = 0  # the version of the newest generation
        self._newest: FaissSnapshot | None = None
        self._stopping = False
        self._wait_until = 0.0  # after a failure
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="gallery-upkeep", daemon=True)

    @property
    def generation_seq(self) -> int:
        """The last operation in the newest generation, 0 when there is none."""
        return self._written

    def start(self, snapshot: FaissSnapshot, *, written: int) -> None:
        """Begin; `written` is the version of the generation that was read, 0 for none."""
        self._written = written
        self._newest = snapshot
        self._thread.start()

    def notice(self, snapshot: FaissSnapshot) -> None:
        """There is a new snapshot."""
        with self._changed:
            self._newest = snapshot
            self._changed.notify()

    def close(self, snapshot: FaissSnapshot) -> None:
        """Stop, and write what no generation holds yet; `snapshot` is the last one."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()
        if snapshot.version > self._written:
            self._write(snapshot)

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
        if self._scrub is not None:
            self._scrub(self._stops)
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
        if snapshot.version - self._written >= self._every:
            return lambda: self._write(snapshot)
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
        self._generations.directory.mkdir(parents=True, exist_ok=True)
        built = Segment.indexed(
            records,
            choice,
            gpu=snapshot.gpu,
            directory=self._generations.directory,
            stopping=self._stops,
        )
        if snapshot.segments:  # what was filtered by will be filtered by
            built.postings.prepare(snapshot.segments[0].postings.fields())
        done = self._replace(lambda current: adopt(current, built, snapshot.version))
        while not self._stopping and not _is_done(done):
            pass
        _log.info(
            "index_built",
            index=choice.kind,
            effort=choice.effort,
            items=len(records),
            index_bytes=built.num_bytes,
            duration_s=round(time.perf_counter() - started, 3),
        )

    def _write(self, snapshot: FaissSnapshot) -> None:
        started = time.perf_counter()
        try:
            self._generations.write(snapshot, self._origin_of(snapshot.version))
        except OSError as error:  # a full disk, mostly: the log has everything
            _log.error("generation_not_written", seq=snapshot.version, reason=error.strerror)
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
