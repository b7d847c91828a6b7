"""Snapshots of the gallery on disk: what a start reads in place of the whole log.

In: a snapshot and what it belongs to. Out: the newest generation on disk that is whole, verified by
the SHA-256 of every file, and of this very log. A generation is a cache: one that is damaged, torn
or of another log is named, removed and made again; it never keeps a service from starting.

A generation is a directory `gen-<seq>` that appears whole, by a rename; the highest number is the
newest, so that no pointer can disagree with what is there. What is in a generation is held in its
files, not in the manifest: the manifest has no checksum of its own.
"""

import hashlib
import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import structlog
from numpy.typing import DTypeLike, NDArray

from service.gallery import approximate
from service.gallery.choice import Choice
from service.gallery.faiss_index import FaissSnapshot
from service.gallery.records import Blobs, Records
from service.gallery.segment import Segment
from trainer.representation.artifact import (
    ArtifactError,
    Content,
    read_manifest,
    remove_artifact,
    remove_unfinished,
    write_artifact,
)

DIRECTORY = "generations"
SCHEMA = "invprop.generation/1"
KEPT = 2  # the newest, and the one before it should the newest turn out to be damaged
_NAME = re.compile(r"gen-(\d{12})")
_FACTS, _IDS, _METADATA, _ENDS = "facts.json", "ids.json", "metadata.bin", "metadata_ends.i64"
_VECTORS, _SEQS, _DEAD, _INDEX = "vectors.f32", "seqs.i64", "dead.u8", "index.faiss"

_log = structlog.get_logger("service.gallery")


@dataclass(frozen=True)
class Origin:
    """What a generation belongs to."""

    log_id: str
    model_id: str
    dim: int
    seq: int  # of the last operation in it
    operation: int  # checksum of that operation: a log that was restored may differ from there on


class Generations:
    """The generations of one log.

    Args:
        directory: of this log alone; made when the first one is written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, snapshot: FaissSnapshot, origin: Origin) -> None:
        """Write a generation and remove those before the last two.

        Raises:
            OSError: it could not be written; nothing of it is left.
        """
        assert snapshot.version == origin.seq
        self.directory.mkdir(parents=True, exist_ok=True)
        write_artifact(
            self.directory / f"gen-{origin.seq:012d}", _files(snapshot, origin), {"schema": SCHEMA}
        )
        for path in self._found()[:-KEPT]:
            _remove(path)

    def newest(
        self,
        belongs: Callable[[Origin], str | None],
        *,
        choose: Callable[[int], Choice],
        gpu: Any = None,
    ) -> FaissSnapshot | None:
        """The newest generation that verifies and belongs to the log; others are removed.

        Args:
            belongs: None, or why a generation of this origin does not belong to the log.
            choose: the index of so many items: only an index of that kind is read.
        """
        if not self.directory.is_dir():
            return None
        remove_unfinished(self.directory)
        for path in reversed(self._found()):
            try:
                found = _read(path, belongs, choose, gpu)
            except (ArtifactError, OSError, _Refused) as reason:
                # A cache that cannot be used is worth nothing: the log has all of it.
                _log.error("generation_refused", generation=path.name, reason=str(reason))
                _remove(path)
                continue
            return found
        return None

    def _found(self) -> list[Path]:
        """The directories of generations, the oldest first."""
        paths = [p for p in self.directory.iterdir() if _NAME.fullmatch(p.name)]
        return sorted(paths, key=lambda path: path.name)


def remove_others(parent: Path, logs: set[str]) -> None:
    """Remove the generations of logs that are no more; directories are named by log."""
    if parent.is_dir():
        for path in parent.iterdir():
            if path.name not in logs:
                _log.warning("generations_removed", log=path.name, reason="there is no such log")
                shutil.rmtree(path, ignore_errors=True)


class _Refused(Exception):
    """A generation that cannot be used; says why."""


def _files(snapshot: FaissSnapshot, origin: Origin) -> dict[str, Content]:
    segments = snapshot.segments
    columns = [segment.records for segment in segments]
    files: dict[str, Content] = {
        _VECTORS: _pieces(r.vectors for r in columns),
        _SEQS: _pieces(r.seqs for r in columns),
        _IDS: orjson.dumps([i for r in columns for i in r.ids.tolist()]),
        _METADATA: _pieces(r.metadata.data for r in columns),
        _ENDS: _pieces(_joined_ends(columns)),
    }
    if snapshot.num_dead:
        files[_DEAD] = _pieces(iter([snapshot.dead.view(np.uint8)]))
    first = segments[0] if segments else None
    index = None if first is None or first.approximate is None else first.approximate.to_bytes()
    if index is not None:
        files[_INDEX] = _pieces(iter([index]))
    facts = {
        "schema": SCHEMA,
        "origin": asdict(origin),
        "segments": [len(segment) for segment in segments],
        "kind": "flat" if first is None else first.kind,
        "dead": snapshot.num_dead > 0,
        "index": index is not None,
    }
    return {_FACTS: orjson.dumps(facts), **files}


def _pieces(arrays: Iterator[NDArray[Any]]) -> Iterator[memoryview]:
    for array in arrays:
        if array.size:
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _joined_ends(columns: list[Records]) -> Iterator[NDArray[np.int64]]:
    yield np.zeros(1, np.int64)
    shift = 0
    for records in columns:
        yield records.metadata.ends[1:] + shift
        shift += len(records.metadata.data)


def _read(
    path: Path,
    belongs: Callable[[Origin], str | None],
    choose: Callable[[int], Choice],
    gpu: Any,
) -> FaissSnapshot:
    manifest = read_manifest(path)
    facts = orjson.loads(_verified(path, manifest, _FACTS, np.uint8, mapped=False).tobytes())
    if facts["schema"] != SCHEMA:
        raise _Refused(f"it has schema {facts['schema']!r}, wanted {SCHEMA!r}")
    origin = Origin(**facts["origin"])
    if path.name != f"gen-{origin.seq:012d}":
        raise _Refused(f"it is of seq {origin.seq}: it was renamed")
    strange = belongs(origin)
    if strange is not None:
        raise _Refused(strange)
    bounds = np.cumsum([0, *facts["segments"]])
    rows = int(bounds[-1])
    dead = np.zeros(rows, bool)
    if facts["dead"]:
        dead = _verified(path, manifest, _DEAD, np.uint8, mapped=False).astype(bool)
    choice = choose(rows - int(dead.sum()))
    records = _records(path, manifest, origin.dim, mapped=choice.vectors_on_disk)
    if len(records) != rows or len(dead) != rows:
        raise _Refused(f"it has {len(records)} rows, its facts say {rows}")
    segments = []
    for number, (start, stop) in enumerate(itertools.pairwise(bounds.tolist())):
        part = _part(records, start, stop)
        if number == 0 and choice.kind == facts["kind"] and not choice.is_exact and facts["index"]:
            content = _verified(path, manifest, _INDEX, np.uint8, mapped=False)
            try:
                ready = approximate.load(choice.kind, content, part.vectors)
            except (ValueError, RuntimeError) as error:  # of another version of faiss
                raise _Refused(f"its index cannot be read: {error}") from error
            segments.append(Segment.indexed(part, choice, directory=path.parent, ready=ready))
        elif number == 0 and choice.is_exact:
            segments.append(Segment.indexed(part, choice, gpu=gpu, directory=path.parent))
        else:
            segments.append(Segment.of(part))
    return FaissSnapshot(
        origin.seq, origin.dim, gpu, tuple(segments), dead, num_dead=int(dead.sum())
    )


def _records(path: Path, manifest: dict[str, Any], dim: int, *, mapped: bool) -> Records:
    vectors = _verified(path, manifest, _VECTORS, np.float32, mapped=mapped).reshape(-1, dim)
    ids = np.empty(len(vectors), np.object_)
    ids[:] = orjson.loads(_verified(path, manifest, _IDS, np.uint8, mapped=False).tobytes())
    metadata = Blobs(
        _verified(path, manifest, _METADATA, np.uint8, mapped=False),
        _verified(path, manifest, _ENDS, np.int64, mapped=False),
    )
    return Records(vectors, ids, metadata, _verified(path, manifest, _SEQS, np.int64, mapped=False))


def _part(records: Records, start: int, stop: int) -> Records:
    ends = records.metadata.ends[start : stop + 1]
    return Records(
        records.vectors[start:stop],
        records.ids[start:stop],
        Blobs(records.metadata.data[ends[0] : ends[-1]], ends - ends[0]),
        records.seqs[start:stop],
    )


def _verified(
    path: Path, manifest: dict[str, Any], name: str, dtype: DTypeLike, *, mapped: bool
) -> NDArray[Any]:
    """The content of a file, compared with its hash as it lies in memory.

    Raises:
        ArtifactError: it is missing, cut short or damaged.
    """
    entry = manifest["files"].get(name)
    if entry is None:
        raise ArtifactError(f"{path / name} is not in the manifest")
    size = (path / name).stat().st_size
    if size != entry["size_bytes"]:
        raise ArtifactError(
            f"{path / name} has {size} bytes, its manifest says {entry['size_bytes']}"
        )
    content: NDArray[Any] = np.empty(0, dtype)
    if size and mapped:
        content = np.asarray(np.memmap(path / name, dtype, "r"))
    elif size:
        content = np.fromfile(path / name, dtype)
    if hashlib.sha256(content.view(np.uint8).data).hexdigest() != entry["sha256"]:
        raise ArtifactError(f"{path / name} is damaged: its sha256 is not that of its manifest")
    return content


def _remove(path: Path) -> None:
    try:
        if path.is_dir():
            remove_artifact(path)
        else:
            path.unlink()
    except OSError as error:
        _log.error("generation_not_removed", generation=path.name, reason=error.strerror)
