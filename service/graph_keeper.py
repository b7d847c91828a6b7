"""Keeps the gallery's kNN graph up with the gallery, in a thread of its own, and a copy on disk.

In: every new snapshot. Out: the graph of the newest version once it is there; until then whoever
wants edges searches for them. The copy on disk is a cache: a damaged, missing or foreign one is
said in the log and the graph is built again.
"""

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import structlog
from numpy.typing import NDArray

from service.gallery.protocol import Gallery, Snapshot
from service.graph import ItemGraph, Progress, built_graph, carried_graph, marks_of
from trainer.representation.artifact import ArtifactError, open_artifact, write_artifact

State = Literal["building", "updating", "ready", "failed", "off"]
SCHEMA = 1
DIRECTORY = "graph"  # inside the state directory
SAVE_EVERY_S = 60.0  # a changed graph is written at most so often, and at the end
# Threads of the same process that answer requests come first, 9 to 1.
BACKGROUND_NICE = 10
_FILES = ("seqs", "marks", "neighbours", "similarities")

_log = structlog.get_logger("service.graph")


class _Stopped(Exception):
    """The service is stopping; what was begun is dropped."""


class GraphKeeper:
    """The graph of one gallery. `start` it, ask `graph_of`, `close` it.

    Args:
        state: the state directory; the copy lies below it.
        neighbours: k; 0 keeps no graph.
        on_progress: told the version of the graph and the share (0..1) that is done of the next.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        state: Path,
        *,
        neighbours: int,
        on_progress: Callable[[int, float], None] = lambda version, share: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = state / DIRECTORY
        self._k = neighbours
        self._on_progress = on_progress
        self._clock = clock
        self._model = ""
        self._changed = threading.Condition()
        # Guarded by the condition.
        self._target: Snapshot | None = None  # the newest snapshot
        self._graph: ItemGraph | None = None
        self._state: State = "building" if neighbours else "off"
        self._done = self._total = 0
        self._stopping = False
        # Of the thread alone.
        self._saved_version: int | None = None
        self._saved_at = -SAVE_EVERY_S
        self._thread = threading.Thread(target=self._work, name="graph", daemon=True)

    def start(self, gallery: Gallery) -> None:
        """Begin to follow the gallery."""
        if not self._k:
            return
        self._model = gallery.model_id
        gallery.on_change(self._note)
        self._note(gallery.snapshot())
        self._thread.start()

    def graph_of(self, snapshot: Snapshot, k: int) -> ItemGraph | None:
        """The graph of this version if it is there and has k neighbours, else None."""
        graph = self._graph
        if graph is None or k > graph.k or graph.version != snapshot.version:
            return None
        return graph

    def wait_for(self, snapshot: Snapshot, k: int, *, timeout_s: float) -> ItemGraph | None:
        """Wait a while for the graph of this version; None where it does not come."""

        def settled() -> bool:
            return (
                self.graph_of(snapshot, k) is not None
                or not self.will_have(snapshot, k)
                or self._stopping
            )

        with self._changed:
            self._changed.wait_for(settled, timeout_s)
        return self.graph_of(snapshot, k)

    def will_have(self, snapshot: Snapshot, k: int) -> bool:
        """Whether the graph of this version is being made, as far as is known now."""
        target = self._target
        return (
            k <= self._k
            and self._state in ("building", "updating")
            and target is not None
            and target.version == snapshot.version
        )

    def status(self) -> dict[str, Any]:
        """What /info says of the graph."""
        with self._changed:
            graph = self._graph
            status: dict[str, Any] = {
                "state": self._state,
                "neighbours": self._k,
                "version": None if graph is None else graph.version,
                "size_bytes": 0 if graph is None else graph.size_bytes,
            }
            if self._state in ("building", "updating"):
                status["progress"] = {"done": self._done, "total": self._total}
            return status

    def close(self) -> None:
        """Stop, and write what has changed since the last writing."""
        if not self._thread.ident:
            return
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _note(self, snapshot: Snapshot) -> None:
        """Runs in the writer's thread: only the newest snapshot is kept, so a burst is one step."""
        with self._changed:
            self._target = snapshot
            if self._graph is None:
                self._state = "building"  # also after a failure: it is tried again
            elif self._graph.version != snapshot.version:
                self._state = "updating"
            self._changed.notify_all()

    # What follows runs in the keeper's thread.

    def _work(self) -> None:
        run_in_background()
        tried: Snapshot | None = None  # a failure is not repeated until something has changed
        while (target := self._next(tried)) is not None:
            tried = target
            try:
                self._advance(target)
            except _Stopped:
                break
            except Exception as error:  # noqa: BLE001 - the thread's door: groups go on by searching
                _log.error("graph_failed", exc_info=error)
                with self._changed:
                    self._graph, self._state = None, "failed"
                    self._changed.notify_all()
        self._save()

    def _next(self, tried: Snapshot | None) -> Snapshot | None:
        """Wait for a snapshot to work on, writing meanwhile what is due; None: stop."""
        while True:
            with self._changed:
                if self._stopping:
                    return None
                if self._target is not tried:
                    return self._target
                due_s = None
                if self._unsaved():
                    due_s = max(0.0, self._saved_at + SAVE_EVERY_S - self._clock())
                if due_s != 0:
                    self._changed.wait(due_s)
                    continue
            self._save()

    def _advance(self, target: Snapshot) -> None:
        began = self._clock()
        old, how = self._graph, "carried"
        if old is None:
            with self._changed:
                self._state = "building"
            old, how = self._load(target), "loaded"
        if old is None:
            graph, how = built_graph(target, self._k, progress=self._progress()), "built"
        else:
            graph = carried_graph(old, target, progress=self._progress())
        with self._changed:
            self._graph = graph
            behind = self._target is not None and self._target.version != graph.version
            self._state = "updating" if behind else "ready"
            self._changed.notify_all()
        self._on_progress(graph.version, 1.0)
        if how != "carried":
            _log.info(
                "graph_ready",
                how=how,
                items=len(graph),
                gallery_version=graph.version,
                duration_s=round(self._clock() - began, 3),
            )
            if how == "built":
                self._saved_version = None  # what lies on the disk is another
                self._save()

    def _progress(self) -> Progress:
        version = 0 if self._graph is None else self._graph.version

        def note(done: int, total: int) -> None:
            self._done, self._total = done, total
            if self._stopping:
                raise _Stopped
            self._on_progress(version, done / max(1, total))

        return note

    def _unsaved(self) -> bool:
        return self._graph is not None and self._graph.version != self._saved_version

    def _save(self) -> None:
        """Write the graph beside the log, where it has changed."""
        graph = self._graph
        if graph is None or not self._unsaved():
            return
        self._saved_at = self._clock()
        arrays: dict[str, NDArray[Any]] = {
            "seqs": graph.seqs,
            "marks": marks_of(graph.snapshot, graph.rows),
            "neighbours": graph.neighbours,
            "similarities": graph.similarities,
        }
        facts = {
            "kind": "kNN graph of the gallery",
            "schema": SCHEMA,
            "model": self._model,
            "gallery_version": graph.version,
            "neighbours": graph.k,
        }
        try:
            write_artifact(
                self._directory, {f"{n}.npy": npy_pieces(arrays[n]) for n in _FILES}, facts
            )
        except (OSError, ArtifactError) as error:
            # The next start builds it again, which costs time and nothing else.
            _log.warning("graph_not_saved", error=str(error))
        else:
            self._saved_version = graph.version

    def _load(self, snapshot: Snapshot) -> ItemGraph | None:
        """The graph on disk, of whatever version, or None; damage is said, not served."""
        if not self._directory.exists():
            return None
        try:
            return self._read(snapshot)
        except ArtifactError as error:
            _log.warning("graph_rebuilt", reason=str(error))
            return None

    def _read(self, snapshot: Snapshot) -> ItemGraph | None:
        manifest = open_artifact(self._directory)
        facts = (manifest.get("schema"), manifest.get("model"), manifest.get("neighbours"))
        if facts != (SCHEMA, self._model, self._k):
            _log.info("graph_rebuilt", reason=f"it was made for {facts}")
            return None
        seqs, marks, neighbours, similarities = (
            read_npy(self._directory / f"{name}.npy") for name in _FILES
        )
        kinds = "".join(array.dtype.char for array in (seqs, marks, neighbours, similarities))
        fits = (
            kinds == "lLlf"
            and seqs.shape == marks.shape == (len(neighbours),)
            and neighbours.shape == similarities.shape == (len(seqs), self._k)
            and bool(np.all(np.diff(seqs) > 0))
        )
        if not fits:
            raise ArtifactError(f"{self._directory} holds arrays that do not fit each other")
        rows = snapshot.rows()
        common, ours, theirs = np.intersect1d(
            snapshot.seqs(rows), seqs, assume_unique=True, return_indices=True
        )
        if not np.array_equal(marks_of(snapshot, rows[ours]), marks[theirs]):
            raise ArtifactError(f"{self._directory} belongs to another operations log")
        self._saved_version = manifest.get("gallery_version")
        _log.info("graph_loaded", items=len(seqs), still_there=len(common))
        return ItemGraph(_Saved(self._saved_version or 0), rows, seqs, neighbours, similarities)


class _Saved:
    """Stands for the snapshot of a graph that was read: only its version is known."""

    def __init__(self, version: int) -> None:
        self.version = version

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a saved graph has no snapshot to ask for {name}")


def run_in_background() -> None:
    """Let this thread have what the others leave of the processor, and one core of it."""
    faiss.omp_set_num_threads(1)
    if sys.platform == "linux":  # elsewhere niceness belongs to the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND_NICE)


def npy_pieces(array: NDArray[Any]) -> Iterator[bytes | memoryview]:
    """The content of a .npy file without a second copy of the array."""
    array = np.ascontiguousarray(array)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    yield header.getvalue()
    if array.size:  # a memoryview of no bytes cannot be cast
        yield memoryview(array)  # type: ignore[arg-type]


def read_npy(path: Path) -> NDArray[Any]:
    """Read a .npy file whose hash was checked.

    Raises:
        ArtifactError: it cannot be read as one.
    """
    try:
        with path.open("rb") as file:
            array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    return array
