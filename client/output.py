"""Rows into files: .npy with its ids beside it, or .parquet. In: ids, vectors and metadata as
they come. Out: a file that has its name only when it is whole.
"""

import contextlib
import json
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

from client.models import Json

# A .npy file, version 1.0: magic, version, length of the head, the head, the numbers. The head is
# padded, so that the number of rows can be put in when it is known.
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_HEAD_BYTES = 128


class Rows(Protocol):
    """Takes rows and ends up as files."""

    def write(self, ids: Sequence[str], vectors: Any, metadata: Sequence[Json] | None) -> None:
        """Write some rows; vectors (n, dim) floats, metadata one for each or None."""

    def finish(self) -> None:
        """Write what comes last; nothing has its name yet."""


@contextlib.contextmanager
def whole_files(*paths: Path) -> Iterator[list[Path]]:
    """Places to write to, which get the given names together when the block ends well.

    They lie beside the given paths, are synced before they are renamed, and removed where the
    block fails.
    """
    parts = [path.with_name(f".{path.name}.{os.getpid()}.part") for path in paths]
    try:
        yield parts
        for part in parts:
            with part.open("rb+") as file:
                os.fsync(file.fileno())
        for part, path in zip(parts, paths, strict=True):
            part.replace(path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def rows_file(path: Path, kind: str) -> Iterator[Rows]:
    """A file of rows, of kind "npy" or "parquet".

    Raises:
        ImportError: parquet without pyarrow.
    """
    if kind == "parquet":
        with whole_files(path) as (part,), Parquet(part) as rows:
            yield rows
    else:
        names = path.with_name(path.name + ".ids.jsonl")
        with whole_files(names, path) as (names_part, part), Npy(part, names_part) as rows:
            yield rows


class Npy:
    """Float32 rows as .npy, and beside them one JSON line for each: its id, and its metadata."""

    def __init__(self, path: Path, names: Path) -> None:
        self._rows = self._dim = 0
        self._file: BinaryIO = path.open("wb")
        try:
            self._names = names.open("w", encoding="utf-8")
        except BaseException:
            self._file.close()
            raise
        self._file.write(bytes(_NPY_HEAD_BYTES))

    def write(self, ids: Sequence[str], vectors: Any, metadata: Sequence[Json] | None) -> None:
        for number, (item_id, vector) in enumerate(zip(ids, vectors, strict=True)):
            values = array("f", vector)
            if self._rows and len(values) != self._dim:
                raise ValueError(f"{item_id!r} has {len(values)} numbers, the others {self._dim}")
            self._dim = len(values)
            if sys.byteorder == "big":
                values.byteswap()
            self._file.write(values.tobytes())
            line: dict[str, Any] = {"id": item_id}
            if metadata is not None:
                line["metadata"] = metadata[number]
            self._names.write(json.dumps(line) + "\n")
            self._rows += 1

    def finish(self) -> None:
        head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({self._rows}, {self._dim}), }}"
        room = _NPY_HEAD_BYTES - len(_NPY_MAGIC) - 2
        self._file.seek(0)
        self._file.write(_NPY_MAGIC + room.to_bytes(2, "little"))
        self._file.write(head.ljust(room - 1).encode("ascii") + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self._names.close()
            self._file.close()


class Parquet:
    """Columns id, vector (list of float32) and metadata (JSON text)."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise ImportError("--parquet needs pyarrow: pip install pyarrow") from None
        self._pyarrow = pyarrow
        self._schema = pyarrow.schema(
            [
                ("id", pyarrow.string()),
                ("vector", pyarrow.list_(pyarrow.float32())),
                ("metadata", pyarrow.string()),
            ]
        )
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)

    def write(self, ids: Sequence[str], vectors: Any, metadata: Sequence[Json] | None) -> None:
        columns = {
            "id": list(ids),
            "vector": [None if vector is None else list(vector) for vector in vectors],
            "metadata": [json.dumps(facts) for facts in metadata or [{}] * len(ids)],
        }
        self._writer.write_table(self._pyarrow.table(columns, schema=self._schema))

    def finish(self) -> None:
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish()
