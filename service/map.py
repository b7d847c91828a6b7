"""Two coordinates for each item of a sample of the gallery, to look at.

In: a snapshot, a method and the size of the sample. Out: ids and coordinates: by PCA at once, by
UMAP once a child process has computed them. Equal questions at one version have equal answers.
"""

import io
import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import structlog
from numpy.typing import NDArray

from service.batching import QueueFull
from service.gallery.protocol import Rows, Snapshot, Vectors

Method = Literal["pca", "umap"]
LEAST_ITEMS = {"pca": 1, "umap": 5}  # fewer have no neighbourhoods to keep
KEPT = 8  # maps in memory; some 100 bytes a point
CACHE = "umap-cache"  # below the state directory: what the child has compiled
_LOOK_S = 0.1  # how often a running child is looked at
_STDERR_BYTES = 2000

_log = structlog.get_logger("service.map")


class Key(NamedTuple):
    """What a map is of."""

    version: int
    method: Method
    sample: int  # items asked for, at most all


@dataclass(frozen=True)
class Map:
    """The points of a map."""

    ids: NDArray[np.object_]  # (n,) in the order of writing
    coordinates: NDArray[np.float32]  # (n, 2)
    items: int  # of the gallery


@dataclass(frozen=True)
class Failure:
    """Why there is no map."""

    reason: str
    setting: str | None = None  # the limit that was met
    limit: float | None = None


class Maps:
    """The maps of one gallery. `start`, then `ask`, then `close`.

    Args:
        state: the state directory.
        timeout_s: wall time of one UMAP.
        memory_bytes: address space of its process.
        max_pending: UMAPs that may wait or run.
        command: what is started for a UMAP, for tests.
    """

    def __init__(
        self,
        state: Path,
        *,
        timeout_s: float,
        memory_bytes: int,
        max_pending: int,
        command: Sequence[str] = (sys.executable, "-m", "service.map_process"),
    ) -> None:
        self._cache = state / CACHE
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._max_pending = max_pending
        self._command = [*command, json.dumps({"memory_bytes": memory_bytes})]
        self._changed = threading.Condition()
        # Guarded by the condition.
        self._done: OrderedDict[Key, Map | Failure] = OrderedDict()
        self._waiting: deque[tuple[Key, Snapshot]] = deque()
        self._pending: set[Key] = set()  # waiting or running
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="maps", daemon=True)

    def start(self) -> None:
        """Be ready for UMAPs."""
        self._thread.start()

    def ask(self, snapshot: Snapshot, method: Method, sample: int) -> Map | Failure | Key:
        """The map, or why there is none (the next question tries again), or while it is computed
        its key, to `look` for.

        Raises:
            QueueFull: too many UMAPs are waiting.
        """
        key = Key(snapshot.version, method, min(sample, len(snapshot)))
        known = self.look(key)
        if known is not None:
            return known
        if method == "pca":
            points = _points(snapshot, key.sample, pca)
            with self._changed:
                self._keep(key, points)
            return points
        with self._changed:
            if key not in self._pending:
                if len(self._pending) >= self._max_pending:
                    raise QueueFull(self._max_pending)
                self._pending.add(key)
                self._waiting.append((key, snapshot))
                self._changed.notify_all()
        return key

    def look(self, key: Key) -> Map | Failure | Key | None:
        """The map of a key, why there is none, the key while it is computed, or None: not known."""
        with self._changed:
            if key in self._pending:
                return key
            known = self._done.get(key)
            if isinstance(known, Failure):
                del self._done[key]
            elif known is not None:
                self._done.move_to_end(key)
            return known

    def close(self) -> None:
        """Stop; a running child is killed."""
        if not self._thread.ident:
            return
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _keep(self, key: Key, outcome: Map | Failure) -> None:
        self._done[key] = outcome
        while len(self._done) > KEPT:
            self._done.popitem(last=False)

    # What follows runs in the thread of the maps.

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                key, snapshot = self._waiting.popleft()
            outcome: Map | Failure
            try:
                outcome = _points(snapshot, key.sample, self._umap)
            except _Failed as failed:
                outcome = failed.failure
                _log.warning("map_failed", reason=outcome.reason)
            except Exception as error:  # noqa: BLE001 - the door of a job
                _log.error("map_failed", exc_info=error)
                outcome = Failure(f"{type(error).__name__}: the service's log has the details")
            del snapshot
            with self._changed:
                self._pending.discard(key)
                self._keep(key, outcome)

    def _umap(self, vectors: Vectors) -> NDArray[np.float32]:
        """Have a child compute it."""
        sent = io.BytesIO()
        np.save(sent, vectors, allow_pickle=False)
        self._cache.mkdir(parents=True, exist_ok=True)
        one_thread = dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
        )
        with subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **one_thread, "NUMBA_CACHE_DIR": str(self._cache)},
        ) as child:
            answer, complaints = self._converse(child, sent.getvalue())
        if child.returncode != 0:
            last = complaints[-_STDERR_BYTES:].decode(errors="replace").strip()
            out_of_memory = "MemoryError" in last or "memory" in last.lower()
            raise _Failed(
                Failure(
                    f"the computation ended with code {child.returncode}"
                    + (
                        " for want of memory: ask for a smaller sample"
                        if out_of_memory
                        else f": {last.rpartition(chr(10))[2] or 'no reason was given'}"
                    ),
                    "map_memory_bytes" if out_of_memory else None,
                    self._memory_bytes if out_of_memory else None,
                )
            )
        coordinates = np.load(io.BytesIO(answer), allow_pickle=False)
        if coordinates.shape != (len(vectors), 2) or not np.isfinite(coordinates).all():
            raise _Failed(Failure(f"{len(vectors)} points gave no {len(vectors)} places"))
        places: NDArray[np.float32] = coordinates.astype(np.float32)
        return places

    def _converse(self, child: "subprocess.Popen[bytes]", sent: bytes) -> tuple[bytes, bytes]:
        """Send, wait, receive; the child does not outlive its time nor the service."""
        waited = 0.0
        given: bytes | None = sent
        try:
            while True:
                try:
                    return child.communicate(given, timeout=_LOOK_S)
                except subprocess.TimeoutExpired:
                    given = None  # what is under way goes on
                waited += _LOOK_S
                if self._stopping:
                    raise _Failed(Failure("the service is stopping"))
                if waited >= self._timeout_s:
                    raise _Failed(
                        Failure(
                            f"it was not done within {self._timeout_s:g} s: ask for a smaller "
                            "sample",
                            "map_timeout_s",
                            self._timeout_s,
                        )
                    )
        finally:
            if child.poll() is None:
                child.kill()


class _Failed(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def _points(
    snapshot: Snapshot, sample: int, layout: Callable[[Vectors], NDArray[np.float32]]
) -> Map:
    rows = sampled(snapshot, sample)
    return Map(snapshot.ids(rows), layout(snapshot.vectors(rows)), len(snapshot))


def sampled(snapshot: Snapshot, count: int) -> Rows:
    """(min(count, N),) rows, ascending: a random sample that depends on the items alone.

    An item is in or out by a hash of its sequence number, so that a sample of a changed gallery is
    nearly the same.
    """
    rows = snapshot.rows()
    if count >= len(rows):
        return rows
    lots = snapshot.seqs(rows).astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64
        lots = (lots + np.uint64(0x9E3779B97F4A7C15)) if shift == 30 else lots
        lots = (lots ^ (lots >> np.uint64(shift))) * np.uint64(factor)
    lots ^= lots >> np.uint64(31)
    return np.sort(rows[np.argsort(lots, kind="stable")[:count]])


def pca(vectors: Vectors) -> NDArray[np.float32]:
    """(n, D) -> (n, 2) coordinates along the two directions in which the vectors differ most.

    A direction points to where its largest component is positive; where there is none left (one
    item, or all alike) the coordinate is 0.
    """
    exact = vectors.astype(np.float64)
    centred = exact - exact.mean(axis=0)
    values, directions = np.linalg.eigh(centred.T @ centred)  # ascending
    axes = directions[:, ::-1][:, :2]
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.where(axes[largest, range(axes.shape[1])] < 0, -1.0, 1.0)
    # A direction without spread is whatever rounding made of it.
    told = values[::-1][:2] > 1e-12 * max(1.0, float(values[-1]))
    coordinates = np.zeros((len(vectors), 2))
    coordinates[:, : axes.shape[1]] = (centred @ axes) * told
    return coordinates.astype(np.float32)
