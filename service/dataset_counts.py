"""Counts of the registered data sets, found out in the background and kept on disk.

In: registered data sets. Out: for each what is known now, at once. A data set is opened again when
its folders or files look different (times and sizes down to the folders of the classes), or when
its entry in the file changed. The files in the state directory are a cache: what is damaged is
said in the log and made again.
"""

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson
import structlog

from service.dataset_description import Description, Undescribed, describe
from service.dataset_file import RegisteredDataset
from service.settings import Settings

DIRECTORY = "datasets"  # inside the state directory: NAME.json for each
SCHEMA = "invprop.dataset/1"
LOOK_AGAIN_S = 30.0  # a data set is looked at again, when asked for, after so long
MAX_FOLDERS = 20_000  # of one data set that are looked at
DEPTH = 3  # of folders: root, split, class

Describe = Callable[[Mapping[str, Any], Callable[[], bool]], Description | Undescribed]

_log = structlog.get_logger("service.datasets")


class Known(NamedTuple):
    """What is known of a data set at a moment."""

    state: Literal["counting", "ready", "failed"]
    description: Description | None = None  # where ready
    problem: str | None = None  # where failed; names no path


class DatasetCounts:
    """What the data sets hold. `start`, then `look`, then `close`.

    Args:
        state: the service's state directory.
        describe: opens a data set, in a process of its own: (spec, whether to give up).
        clock: monotonic seconds.
    """

    def __init__(
        self, state: Path, *, describe: Describe, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._directory = state / DIRECTORY
        self._describe = describe
        self._clock = clock
        self._changed = threading.Condition()
        # Guarded by the condition.
        self._known: dict[str, tuple[str, Known]] = {}  # name -> digest of the spec, what is known
        self._looked_at: dict[str, float] = {}
        self._waiting: deque[RegisteredDataset] = deque()
        self._stopping = False
        # Of the thread alone.
        self._marks: dict[str, str] = {}  # name -> mark of what `_known` was made of
        self._thread = threading.Thread(target=self._work, name="datasets", daemon=True)

    def start(self, datasets: Iterable[RegisteredDataset]) -> None:
        """Begin to count, with these."""
        for dataset in datasets:
            self.look(dataset)
        self._thread.start()

    def look(self, dataset: RegisteredDataset) -> Known:
        """What is known now; it is looked at again in the background where that is some time ago.

        While a changed data set is counted anew, what was known of it before is told.
        """
        now = self._clock()
        digest = _digest(dataset.spec())
        with self._changed:
            of, known = self._known.get(dataset.name, ("", Known("counting")))
            if of != digest:
                known = Known("counting")
            looked_at = self._looked_at.get(dataset.name)
            due = looked_at is None or now - looked_at >= LOOK_AGAIN_S or of not in ("", digest)
            if due and all(waiting.name != dataset.name for waiting in self._waiting):
                self._looked_at[dataset.name] = now
                self._waiting.append(dataset)
                self._changed.notify_all()
        return known

    def close(self) -> None:
        """Stop; a running child is killed."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident:
            self._thread.join()

    # What follows runs in the thread.

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                dataset = self._waiting[0]
            known = None
            try:
                known = self._looked(dataset)
            except Exception as error:  # noqa: BLE001 - the door of a job
                _log.error("dataset_failed", name=dataset.name, exc_info=error)
                known = Known("failed", None, "it cannot be counted; the service's log says why")
            with self._changed:
                self._waiting.popleft()
                if known is not None:
                    self._known[dataset.name] = (_digest(dataset.spec()), known)

    def _looked(self, dataset: RegisteredDataset) -> Known | None:
        """Count where something changed; None where nothing did."""
        spec = dataset.spec()
        mark = _digest({"spec": spec, "data": list(marks_of(spec))})
        if self._marks.get(dataset.name) == mark:
            return None
        found = self._read(dataset.name, mark)
        if found is None:
            described = self._describe(spec, lambda: self._stopping)
            if self._stopping:
                return None
            if isinstance(described, Undescribed):
                _log.warning(
                    "dataset_problem",
                    name=dataset.name,
                    reason=described.reason,
                    details=described.details,
                )
                self._marks[dataset.name] = mark
                return Known("failed", None, without_paths(described.reason, spec))
            found = described
            self._write(dataset.name, mark, found)
        self._marks[dataset.name] = mark
        return Known("ready", found)

    def _read(self, name: str, mark: str) -> Description | None:
        path = self._directory / f"{name}.json"
        try:
            values = orjson.loads(path.read_bytes())
            if (values["schema"], values["mark"]) != (SCHEMA, mark):
                return None
            return Description.of(values["description"])
        except FileNotFoundError:
            return None
        except (OSError, orjson.JSONDecodeError, KeyError, TypeError) as error:
            _log.warning("dataset_cache_damaged", name=name, reason=str(error))
            return None

    def _write(self, name: str, mark: str, description: Description) -> None:
        path = self._directory / f"{name}.json"
        values = {"schema": SCHEMA, "mark": mark, "description": description.as_dict()}
        unfinished = path.with_name(f".{path.name}.new")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(orjson.dumps(values))
            unfinished.replace(path)
        except OSError as error:  # it is counted again after the next start
            _log.warning("dataset_cache_not_written", name=name, reason=str(error))


def counting(settings: Settings) -> DatasetCounts:
    """The counts of a service, by the trainer's readers within the settings' bounds."""

    def bounded(spec: Mapping[str, Any], stopping: Callable[[], bool]) -> Description | Undescribed:
        return describe(
            spec,
            timeout_s=settings.dataset_timeout_s,
            memory_bytes=settings.dataset_memory_bytes,
            stopping=stopping,
        )

    return DatasetCounts(settings.state, describe=bounded)


def marks_of(spec: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """(place, time, size) of what changes when images come, go, or are named otherwise: root, its
    files, the folders below it, and what `splits` names."""
    root = Path(spec["root"])
    yield _mark(root)
    for where in (spec.get("splits") or {}).values():
        yield _mark(root / where)
    if not root.is_dir():
        return
    level, seen = [root], 0
    for depth in range(DEPTH):
        below: list[Path] = []
        for folder in level:
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError:  # it is part of the mark of its parent
                continue
            for entry in entries:
                if entry.is_dir():
                    below.append(Path(entry.path))
                elif depth:  # images; the time of their folder stands for them
                    continue
                yield _mark(Path(entry.path))
        seen += len(below)
        if seen > MAX_FOLDERS:
            return
        level = below


def without_paths(text: str, spec: Mapping[str, Any]) -> str:
    """A message for callers, who are told no path of this machine."""
    root = Path(spec["root"])
    places = {str(root): "ROOT", str(root.parent): "FOLDER"}
    if spec.get("images"):
        places[str(spec["images"])] = "IMAGES"
    for place in sorted(places, key=len, reverse=True):
        if len(place) > 1:  # else every slash would be one
            text = text.replace(place, places[place])
    return text


def _mark(path: Path) -> tuple[str, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        return str(path), -1, error.errno or 0
    return str(path), status.st_mtime_ns, status.st_size


def _digest(values: Any) -> str:
    return hashlib.sha256(orjson.dumps(values, option=orjson.OPT_SORT_KEYS)).hexdigest()
