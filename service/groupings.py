"""Groupings: partitions of the whole gallery, computed one after the other, kept on disk.

In: parameters and the snapshot they are asked for. Out: for each a state, and when it has succeeded
its groups. What was accepted is on disk before it is answered; a grouping is whole or not there.
The definition of a group is service.partition's.
"""

import hashlib
import json
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import structlog
from numpy.typing import NDArray

from service.batching import QueueFull
from service.gallery.protocol import Gallery, Snapshot, StorageError, Vectors
from service.gallery.records import Blobs
from service.graph import ItemGraph, built_graph
from service.graph_keeper import GraphKeeper, npy_pieces, read_npy, run_in_background
from service.partition import partition
from trainer.representation.artifact import (
    ArtifactError,
    Content,
    open_artifact,
    remove_artifact,
    remove_unfinished,
    write_artifact,
)

State = Literal["queued", "running", "succeeded", "failed"]
SCHEMA = 1
DIRECTORY = "groupings"  # inside the state directory
_LOOK_S = 0.5  # how often a grouping that waits for the kept graph looks whether it should stop
_ARRAYS = ("ids", "ends", "similarities", "starts")

_log = structlog.get_logger("service.groupings")


@dataclass(frozen=True)
class Grouping:
    """What is known of one grouping. Times in seconds since 1970."""

    id: str
    gallery_version: int
    k: int
    steps: int
    min_size: int
    state: State
    created_at: float
    items: int  # of that version: grouped + ungrouped
    started_at: float | None = None
    finished_at: float | None = None
    grouped: int | None = None
    ungrouped: int | None = None
    groups: int | None = None
    message: str | None = None  # why there is no group
    error: str | None = None  # why it failed
    progress: "Progress | None" = None


class Progress(NamedTuple):
    """What is being done, and how much of it."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Groups:
    """The groups of a grouping that has succeeded, the larger ones first."""

    ids: Blobs  # (M,) UTF-8, group by group, the representative of each first
    similarities: Vectors  # (M,) to the representative, descending within a group
    starts: NDArray[np.int64]  # (G + 1,)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(G,) descending."""
        return np.diff(self.starts)

    def members(self, group: int, start: int, count: int) -> list[tuple[str, np.float32]]:
        """Ids and similarities, from the `start`th of a group on."""
        first = int(self.starts[group]) + start
        last = min(first + count, int(self.starts[group + 1]))
        return [(self.ids[m].decode(), self.similarities[m]) for m in range(first, last)]


class _Stopped(Exception):
    """The service is stopping; the grouping stays queued on disk."""


class Groupings:
    """The groupings of one gallery. `start`, then `ask` and look, and `close`.

    Args:
        state: the state directory; they lie below it.
        graph: whose edges are taken where it has them.
        kept: finished groupings that are kept; the oldest go.
        max_pending: groupings that may be queued or running.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        state: Path,
        *,
        graph: GraphKeeper,
        kept: int,
        max_pending: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = state / DIRECTORY
        self._graph = graph
        self._kept = kept
        self._max_pending = max_pending
        self._clock = clock
        self._model = ""
        self._changed = threading.Condition()
        # Guarded by the condition; the values are never changed, so readers take them as they are.
        self._known: dict[str, Grouping] = {}
        self._groups: dict[str, Groups] = {}
        self._waiting: deque[tuple[str, Snapshot]] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="groupings", daemon=True)

    def start(self, gallery: Gallery) -> None:
        """Read what is kept, and go on with what was accepted and not finished."""
        self._model = gallery.model_id
        snapshot = gallery.snapshot()
        if self._directory.is_dir():
            remove_unfinished(self._directory)
            for path in sorted(self._directory.iterdir()):
                self._read(path, snapshot)
        self._thread.start()

    def ask(self, snapshot: Snapshot, *, k: int, steps: int, min_size: int) -> Grouping:
        """The grouping of these parameters at this version; queued unless it is there already.

        Raises:
            QueueFull: too many are waiting.
            StorageError: it could not be written down and was not accepted.
        """
        facts = [SCHEMA, self._model, snapshot.version, k, steps, min_size]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        with self._changed:
            known = self._known.get(name)
            if known is not None and known.state != "failed":
                return known
            pending = sum(g.state in ("queued", "running") for g in self._known.values())
            if pending >= self._max_pending:
                raise QueueFull(self._max_pending)
            grouping = Grouping(
                name,
                snapshot.version,
                k,
                steps,
                min_size,
                "queued",
                self._clock(),
                len(snapshot),
            )
            try:
                self._write(grouping, {})
            except (OSError, ArtifactError) as error:
                raise StorageError(str(error), full=False) from error
            self._known[name] = grouping
            self._waiting.append((name, snapshot))
            self._changed.notify_all()
            return grouping

    def all(self) -> list[Grouping]:
        """The newest first."""
        with self._changed:
            known = list(self._known.values())
        return sorted(known, key=lambda g: (-g.created_at, g.id))

    def get(self, name: str) -> Grouping | None:
        """One of them, None where there is none of this id."""
        return self._known.get(name)

    def groups(self, name: str) -> Groups | None:
        """The groups of one that has succeeded, else None."""
        return self._groups.get(name)

    def close(self) -> None:
        """Stop; what is not finished is begun again at the next start."""
        if not self._thread.ident:
            return
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _read(self, path: Path, snapshot: Snapshot) -> None:
        """Take up one that lies on disk; a damaged one is said and removed, never served."""
        try:
            manifest = open_artifact(path)
            if manifest.get("schema") != SCHEMA or manifest.get("model") != self._model:
                raise ArtifactError(f"{path} is of another model or version of this program")
            grouping = Grouping(**manifest["grouping"])
            if grouping.state == "succeeded":
                self._groups[grouping.id] = _read_groups(path, grouping)
        except (ArtifactError, KeyError, TypeError, ValueError) as error:
            _log.warning("grouping_dropped", reason=str(error))
            shutil.rmtree(path, ignore_errors=True)
            return
        if grouping.state == "queued":
            if grouping.gallery_version == snapshot.version:
                self._waiting.append((grouping.id, snapshot))
            else:
                grouping = replace(
                    grouping,
                    state="failed",
                    finished_at=self._clock(),
                    error="the service stopped before it was done, and the gallery has changed "
                    "since; ask for one of the gallery as it is now",
                )
        self._known[grouping.id] = grouping

    def _write(self, grouping: Grouping, files: Mapping[str, Content]) -> None:
        facts = {
            "kind": "grouping of the gallery",
            "schema": SCHEMA,
            "model": self._model,
            "grouping": asdict(replace(grouping, progress=None)),
        }
        write_artifact(self._directory / grouping.id, files, facts)

    # What follows runs in the thread of the groupings.

    def _work(self) -> None:
        run_in_background()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                name, snapshot = self._waiting.popleft()
                running = replace(self._known[name], state="running", started_at=self._clock())
                self._known[name] = running
            try:
                self._compute(running, snapshot)
            except _Stopped:
                return
            except Exception as error:  # noqa: BLE001 - the door of a job
                _log.error("grouping_failed", exc_info=error)
                self._fail(running, error)
            del snapshot  # nothing of an old version is held while waiting
            self._forget()

    def _compute(self, running: Grouping, snapshot: Snapshot) -> None:
        def report(stage: str, done: int, total: int) -> None:
            if self._stopping:
                raise _Stopped
            self._known[running.id] = replace(running, progress=Progress(stage, done, total))

        graph = self._edges(running, snapshot, report)
        # The same places as the graph's: both are in the order of writing.
        rows = snapshot.rows()
        wanted = graph.neighbours[:, : running.k]
        neighbours = np.where(wanted >= 0, np.searchsorted(graph.seqs, wanted), -1)
        del graph, wanted
        found = partition(
            snapshot,
            rows,
            neighbours,
            steps=running.steps,
            min_size=running.min_size,
            report=report,
        )
        ids = Blobs.of(i.encode() for i in snapshot.ids(rows[found.members]))
        groups = Groups(ids, found.similarities, found.starts)
        message = None
        if not len(groups):
            message = (
                f"no group has min_size = {running.min_size} members, the largest has "
                f"{found.largest_dissolved}: ask with a smaller min_size or a larger k or steps"
                if len(snapshot)
                else "the gallery is empty"
            )
        done = replace(
            running,
            state="succeeded",
            finished_at=self._clock(),
            items=len(rows),
            grouped=len(found.members),
            ungrouped=len(rows) - len(found.members),
            groups=len(groups),
            message=message,
        )
        arrays: Mapping[str, NDArray[Any]] = {
            "ids": ids.data,
            "ends": ids.ends,
            "similarities": groups.similarities,
            "starts": groups.starts,
        }
        self._write(done, {f"{name}.npy": npy_pieces(arrays[name]) for name in _ARRAYS})
        with self._changed:
            self._groups[done.id] = groups
            self._known[done.id] = done
        _log.info(
            "grouping_done",
            items=done.items,
            groups=done.groups,
            ungrouped=done.ungrouped,
            duration_s=round(self._clock() - (running.started_at or 0), 3),
        )

    def _edges(
        self, running: Grouping, snapshot: Snapshot, report: Callable[[str, int, int], None]
    ) -> ItemGraph:
        """The kept graph of this version, also when it is still being made; else one of our own."""
        while True:
            graph = self._graph.wait_for(snapshot, running.k, timeout_s=_LOOK_S)
            if graph is not None:
                return graph
            report("waiting for the graph", 0, len(snapshot))
            if not self._graph.will_have(snapshot, running.k):
                break
        return built_graph(
            snapshot, running.k, progress=lambda done, total: report("searching", done, total)
        )

    def _fail(self, running: Grouping, error: Exception) -> None:
        failed = replace(
            running,
            state="failed",
            finished_at=self._clock(),
            error=f"{type(error).__name__}: the service's log has the details; ask again",
        )
        with self._changed:
            self._known[failed.id] = failed
        try:
            self._write(failed, {})
        except (OSError, ArtifactError) as again:
            _log.warning("grouping_not_saved", error=str(again))

    def _forget(self) -> None:
        """Remove the oldest finished ones beyond those that are kept."""
        with self._changed:
            finished = [g for g in self._known.values() if g.finished_at is not None]
            finished.sort(key=lambda g: (g.finished_at, g.id), reverse=True)
            for grouping in finished[self._kept :]:
                del self._known[grouping.id]
                self._groups.pop(grouping.id, None)
                try:
                    remove_artifact(self._directory / grouping.id)
                except OSError as error:
                    _log.warning("grouping_not_removed", error=str(error))


def _read_groups(path: Path, grouping: Grouping) -> Groups:
    """Read the files of one whose hashes were checked."""
    data, ends, similarities, starts = (read_npy(path / f"{name}.npy") for name in _ARRAYS)
    groups = Groups(Blobs(data, ends), similarities, starts)
    if (
        len(groups) != grouping.groups
        or len(groups.ids) != len(similarities)
        or int(starts[-1]) != len(similarities)
        or len(similarities) != grouping.grouped
    ):
        raise ArtifactError(f"{path} holds arrays that do not fit each other")
    return groups
