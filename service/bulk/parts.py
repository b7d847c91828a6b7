"""What bulk embedding leaves: numbered parts, each whole or not there, and one manifest.

In: ids and vectors of a partition. Out: part-00000.npy (n, dim) float32 and part-00000.parquet with
the same n rows (`id`, `number` in the source), for rejected images part-00000.rejected.parquet, and
manifest.json with the sha256 of each. Every file is written under another name, synchronised and
renamed; a part counts once the manifest names it. At the end rejected.parquet joins the rejected.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import parquet

MANIFEST, REJECTED, LOCK = "manifest.json", "rejected.parquet", "lock"
SCHEMA = "invprop.embeddings/1"
UNFINISHED = ".new"

_VECTORS = pyarrow.schema([("id", pyarrow.string()), ("number", pyarrow.int64())])
_REJECTED = pyarrow.schema([*_VECTORS, ("reason", pyarrow.string())])


class OutputError(Exception):
    """A directory that cannot be used as output; says what is in it and what to do."""


class Rejected(NamedTuple):
    """An image without a vector."""

    id: str
    number: int  # in the source, from 0
    reason: str


@dataclass(frozen=True)
class Plan:
    """What a run does; another plan is not continued.

    Attributes:
        vectors: `embedding` or `features`.
        fingerprints: sha256 of the images of each partition.
    """

    model_id: str
    vectors: str
    dim: int
    precision: str
    source: str
    images: int
    partition_images: int
    fingerprints: tuple[str, ...]


class Output:
    """The directory of one run; use it in a `with`, which keeps others out.

    Raises:
        OutputError: another process writes there, or another run did.
        OSError: it cannot be written.
    """

    def __init__(self, directory: Path, plan: Plan) -> None:
        self._directory = directory
        self._plan = plan
        self.damaged: list[str] = []  # parts that were there and are made again, with the reason
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = (directory / LOCK).open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._parts = self._resumed()
        except BlockingIOError:
            self._lock.close()
            raise OutputError(f"another process writes to {directory}: wait for it") from None
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._remove_unfinished()
        self._lock.close()

    def missing(self) -> list[int]:
        """Numbers of the partitions that are not there."""
        return [n for n in range(len(self._plan.fingerprints)) if _name(n) not in self._parts]

    @property
    def counts(self) -> tuple[int, int]:
        """Vectors and rejected images of all parts that are there."""
        parts = self._parts.values()
        return sum(part["rows"] for part in parts), sum(part["rejected"] for part in parts)

    def write(
        self,
        number: int,
        ids: Sequence[tuple[str, int]],
        vectors: NDArray[np.float32],
        rejected: Sequence[Rejected],
    ) -> None:
        """Write one part; when it returns, it is on disk.

        Args:
            ids: (id, number in the source) of each row of `vectors` (n, dim).
        """
        name = _name(number)
        content = BytesIO()
        np.save(content, vectors, allow_pickle=False)
        files = {f"{name}.npy": content.getbuffer(), f"{name}.parquet": _table(ids, _VECTORS)}
        if rejected:
            files[f"{name}.{REJECTED}"] = _table(rejected, _REJECTED)
        sha256 = {file: self._write(file, content) for file, content in files.items()}
        self._parts[name] = {"rows": len(ids), "rejected": len(rejected), "sha256": sha256}
        self._write_manifest()

    def finish(self) -> None:
        """Join the rejected images; from now on the manifest says `complete`."""
        tables = [
            parquet.read_table(self._directory / f"{name}.{REJECTED}")
            for name, part in sorted(self._parts.items())
            if part["rejected"]
        ]
        content = BytesIO()
        joined = pyarrow.concat_tables(tables) if tables else _REJECTED.empty_table()
        parquet.write_table(joined, content)
        self._write_manifest(rejected=self._write(REJECTED, content.getbuffer()))

    def _resumed(self) -> dict[str, dict[str, Any]]:
        self._remove_unfinished()
        if not (self._directory / MANIFEST).exists():
            strange = sorted(p.name for p in self._directory.iterdir() if _is_foreign(p.name))
            if strange:
                raise OutputError(
                    f"{self._directory} holds {strange[0]} and no {MANIFEST}: give an empty "
                    "directory, or a new one"
                )
            return {}
        manifest = read_manifest(self._directory)
        _check_same(self._directory, manifest.plan, self._plan)
        whole = {}
        for name, part in manifest.parts.items():
            try:
                verify(self._directory, part["sha256"])
            except OutputError as error:
                self.damaged.append(str(error))
            else:
                whole[name] = dict(part)
        return whole

    def _remove_unfinished(self) -> None:
        for path in self._directory.glob(f".*{UNFINISHED}"):
            path.unlink(missing_ok=True)

    def _write_manifest(self, rejected: str | None = None) -> None:
        values = {
            "schema": SCHEMA,
            "plan": asdict(self._plan),
            "parts": dict(sorted(self._parts.items())),
            "rejected": rejected,
            "complete": rejected is not None,
        }
        self._write(MANIFEST, memoryview(json.dumps(values, indent=1).encode()))

    def _write(self, name: str, content: memoryview) -> str:
        """Put a file into its place, whole; returns its sha256."""
        unfinished = self._directory / f".{name}{UNFINISHED}"
        with unfinished.open("wb", buffering=0) as file:
            left = content
            while left:
                left = left[os.write(file.fileno(), left) :]
            os.fsync(file.fileno())
        unfinished.replace(self._directory / name)
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What a directory says it holds."""

    plan: Plan
    parts: Mapping[str, Mapping[str, Any]]
    complete: bool


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest; the parts are not looked at.

    Raises:
        OutputError: there is none, or it is damaged.
    """
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_bytes())
        if values["schema"] != SCHEMA:
            raise OutputError(f"{path} has schema {values['schema']!r}, wanted {SCHEMA!r}")
        plan = {**values["plan"], "fingerprints": tuple(values["plan"]["fingerprints"])}
        return Manifest(Plan(**plan), values["parts"], bool(values["complete"]))
    except FileNotFoundError:
        raise OutputError(
            f"{path} is missing: wanted a directory that python -m service.embed wrote"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} cannot be read: {error}") from error


class Part(NamedTuple):
    """One part as it was read and verified."""

    name: str
    ids: list[str]  # n
    vectors: NDArray[np.float32]  # (n, dim)


def read_parts(directory: Path, manifest: Manifest) -> Iterator[Part]:
    """Every part in order, compared with its hashes.

    Raises:
        OutputError: a part is missing or damaged, or is not as the manifest says.
    """
    for name, part in sorted(manifest.parts.items()):
        verify(directory, part["sha256"])
        vectors = np.load(directory / f"{name}.npy", allow_pickle=False)
        ids = parquet.read_table(directory / f"{name}.parquet", columns=["id"]).column(0)
        if (vectors.shape, vectors.dtype) != ((len(ids), manifest.plan.dim), np.float32):
            raise OutputError(
                f"{directory / name}.npy is {vectors.dtype} {vectors.shape} for {len(ids)} ids, "
                f"wanted float32 with {manifest.plan.dim} columns"
            )
        yield Part(name, ids.to_pylist(), vectors)


def verify(directory: Path, sha256: Mapping[str, str]) -> None:
    """Compare files with their hashes.

    Raises:
        OutputError: names the first that is missing or another.
    """
    for name, wanted in sha256.items():
        path = directory / name
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise OutputError(f"{path} cannot be read: {error.strerror}") from error
        if found != wanted:
            raise OutputError(f"{path} is damaged: its sha256 is not that of {MANIFEST}")


def _check_same(directory: Path, there: Plan, wanted: Plan) -> None:
    """Refuse to go on with another run, and say what differs."""
    cure = "give another --output, or remove that one"
    for name in ("model_id", "vectors", "dim", "precision", "source", "partition_images"):
        old, new = getattr(there, name), getattr(wanted, name)
        if old != new:
            raise OutputError(f"{directory} was begun with {name} {old}, not {new}: {cure}")
    if there.images != wanted.images:
        raise OutputError(
            f"the source has {wanted.images:,} images, {directory} was begun with "
            f"{there.images:,}: {cure}"
        )
    for number, (old, new) in enumerate(zip(there.fingerprints, wanted.fingerprints, strict=True)):
        if old != new:
            first = number * wanted.partition_images
            last = min(first + wanted.partition_images, wanted.images)
            raise OutputError(
                f"images {first:,} to {last - 1:,} of the source have changed since {directory} "
                f"was begun (names, sizes, times): {cure}"
            )


def _table(rows: Sequence[tuple[Any, ...]], schema: pyarrow.Schema) -> memoryview:
    columns = zip(*rows, strict=True) if rows else ([] for _ in schema)
    arrays = [pyarrow.array(list(c), f.type) for c, f in zip(columns, schema, strict=True)]
    content = BytesIO()
    parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), content)
    return content.getbuffer()


def _is_foreign(name: str) -> bool:
    return name != LOCK and not name.startswith("part-")


def _name(number: int) -> str:
    return f"part-{number:05d}"
