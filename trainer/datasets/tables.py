"""Tables with a column of encoded images: parquet files, and streams of Arrow record batches.

In: .parquet or .arrow files. Out: an `ImageSource` of cells.
A process that decodes holds one row group at a time; .arrow files are mapped, not read.
"""

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trainer.datasets.source import (
    UNKNOWN_CLASSES,
    Classes,
    DataError,
    ImageSource,
    classes_of,
    unusable_name,
)
from trainer.representation.preprocess import ImageRejected

# pyarrow is imported by the functions that need it: it takes a fifth of a second and 50 MB, which
# every decoding process of every other source would pay.
if TYPE_CHECKING:
    import pyarrow

USUAL_COLUMNS = ("image", "img")  # tried first, in this order
LABEL_COLUMN = "label"
TRAIN_SPLIT = "train"
# Uncompressed bytes of images in one row group: each decoding process holds one such group.
MAX_ROW_GROUP_BYTES = 1 << 30
OPEN_ARROW_FILES = 64  # mapped at once by a process: address space, hardly any memory
# How Hugging Face names the files of a split.
_SPLIT_FILE = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?")


@dataclass(frozen=True, slots=True)
class TableCell:
    """An encoded picture in a table."""

    file: Path
    column: str
    part: int  # row group of a .parquet, record batch of an .arrow
    row: int  # within the part

    def read(self) -> bytes:
        """The encoded picture; ImageRejected where its part is damaged or the cell is empty."""
        read_part = _row_group if self.file.suffix == ".parquet" else _record_batch
        cells = read_part(self.file, self.column, self.part)
        if isinstance(cells, str):
            raise ImageRejected(cells)
        content = cells[self.row].as_py()
        if content is None:
            raise ImageRejected(f"column {self.column!r} holds no bytes in this row")
        return bytes(content)


@dataclass(frozen=True)
class _Table:
    """What is known of a file without reading its images."""

    schema: "pyarrow.Schema"
    rows: tuple[int, ...]  # of each part
    footer: bytes  # hash of what a parquet's says of sizes and places; an arrow has none
    labels: NDArray[np.int64] | None


def open_tables(paths: Sequence[Path], root: Path) -> ImageSource:
    """The images of parquet or arrow files, in the order of `paths`; ids are `FILE/ROW`.

    Of files that Hugging Face named by split (`train-00000-of-00004.parquet`), only `train`'s are
    taken where it is among several.

    Raises:
        DataError: a file is damaged or has no column of images, or a row group is too large.
    """
    kept = _train_split(paths)
    ids: list[str] = []
    cells: list[TableCell] = []
    labels: list[NDArray[np.int64] | None] = []
    digest = hashlib.sha256()
    column: str | None = None
    for path in kept:
        table = _describe(path)
        column = column or _image_column(table.schema, path)
        if column not in table.schema.names or not _holds_images(table.schema.field(column).type):
            raise DataError(
                f"{path} has no column {column!r} of images as {kept[0]} has, only "
                f"{_columns(table.schema)}: give files of one table"
            )
        _check_row_groups(path, column)
        name = path.relative_to(root).as_posix()
        digest.update(f"{name}\0{path.stat().st_size}\0{table.rows}\0".encode() + table.footer)
        digest.update(b"" if table.labels is None else table.labels.tobytes())
        digest.update(_cell_sizes(path, column))
        count = sum(table.rows)
        reason = unusable_name(f"{name}/{count}")
        if reason:
            raise DataError(f"{path}: {reason}; no row of it can have an id")
        width = len(str(max(count - 1, 0)))
        ids += [f"{name}/{str(row).zfill(width)}" for row in range(count)]
        cells += [
            TableCell(path, column, part, row)
            for part, rows in enumerate(table.rows)
            for row in range(rows)
        ]
        labels.append(table.labels)
    if not ids:
        raise DataError(
            f"{kept[0]} and {len(kept) - 1} more files hold no row: nothing to train on"
        )
    classes = _joined(labels)
    return ImageSource(
        ids=tuple(ids),
        pictures=cells,
        labels=classes.labels,
        fingerprint=digest.hexdigest(),
        other_files=len(paths) - len(kept),
        class_names=classes.names,
    )


@functools.lru_cache(maxsize=1)
def _row_group(path: Path, column: str, part: int) -> "pyarrow.Array | str":
    """The encoded images of a row group, or what is wrong with it: asked for row by row."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            # Parquet can leave a struct's other fields unread.
            wanted = (
                column if _is_binary(file.schema_arrow.field(column).type) else f"{column}.bytes"
            )
            table = file.read_row_group(part, columns=[wanted], use_threads=False)
    except (ArrowException, OSError) as error:
        return f"row group {part} of {path} is damaged ({error})"
    return _encoded(table.column(0).combine_chunks())


@functools.lru_cache(maxsize=OPEN_ARROW_FILES)
def _record_batches(path: Path) -> "tuple[pyarrow.RecordBatch, ...]":
    import pyarrow

    with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        return tuple(stream)


def _record_batch(path: Path, column: str, part: int) -> "pyarrow.Array | str":
    from pyarrow import ArrowException

    try:
        return _encoded(_record_batches(path)[part].column(column))
    except (ArrowException, OSError, IndexError) as error:
        return f"record batch {part} of {path} is damaged ({error})"


def _cell_sizes(path: Path, column: str) -> bytes:
    """The sizes of an .arrow's encoded images; a parquet's footer says enough of its own."""
    if path.suffix == ".parquet":
        return b""
    from pyarrow import compute

    sizes = [
        compute.binary_length(_encoded(batch.column(column))).fill_null(-1).to_numpy()
        for batch in _record_batches(path)
    ]
    return b"".join(each.astype(np.int64).tobytes() for each in sizes)


def _encoded(cells: "pyarrow.Array") -> "pyarrow.Array":
    """The binary array of a column that may be a struct {bytes, path}; nulls stay nulls."""
    return cells if _is_binary(cells.type) else cells.field("bytes")


def _describe(path: Path) -> _Table:
    from pyarrow import ArrowException, parquet

    try:
        if path.suffix == ".parquet":
            with parquet.ParquetFile(path) as file:
                facts = file.metadata
                rows = tuple(facts.row_group(i).num_rows for i in range(facts.num_row_groups))
                footer = json.dumps(facts.to_dict(), sort_keys=True, default=repr).encode()
                labels = None
                if _has_label(file.schema_arrow):
                    labels = _labels(file.read(columns=[LABEL_COLUMN]).column(0))
                return _Table(file.schema_arrow, rows, hashlib.sha256(footer).digest(), labels)
        import pyarrow

        with pyarrow.memory_map(str(path)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
            batches = list(stream)
            labels = None
            if _has_label(stream.schema):
                column = pyarrow.chunked_array(
                    [batch.column(LABEL_COLUMN) for batch in batches],
                    type=stream.schema.field(LABEL_COLUMN).type,
                )
                labels = _labels(column)
            rows = tuple(batch.num_rows for batch in batches)
            return _Table(stream.schema, rows, b"", labels)
    except (ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as a table ({error}): fetch or write it again"
        ) from error


def _check_row_groups(path: Path, column: str) -> None:
    from pyarrow import parquet

    if path.suffix != ".parquet":
        return
    facts = parquet.read_metadata(path)
    for part in range(facts.num_row_groups):
        group = facts.row_group(part)
        chunks = (group.column(i) for i in range(group.num_columns))
        size = sum(
            chunk.total_uncompressed_size
            for chunk in chunks
            if chunk.path_in_schema.split(".")[0] == column
        )
        if size > MAX_ROW_GROUP_BYTES:
            raise DataError(
                f"{path}: row group {part} holds {size:,} bytes of images and each decoding "
                f"process reads a whole one, at most {MAX_ROW_GROUP_BYTES:,}: write the file again "
                "with smaller groups, such as row_group_size=100"
            )


def _image_column(schema: "pyarrow.Schema", path: Path) -> str:
    fitting = [field.name for field in schema if _holds_images(field.type)]
    for name in USUAL_COLUMNS:
        if name in fitting:
            return name
    if len(fitting) == 1:
        return str(fitting[0])
    raise DataError(
        f"{path} has {len(fitting)} columns that could hold images, its columns are "
        f"{_columns(schema)}: wanted one of encoded images, binary or struct {{bytes, path}}, "
        f"named {' or '.join(map(repr, USUAL_COLUMNS))} where there are several"
    )


def _columns(schema: "pyarrow.Schema") -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"


def _holds_images(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    if not types.is_struct(kind):
        return _is_binary(kind)
    return any(field.name == "bytes" and _is_binary(field.type) for field in kind)


def _is_binary(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _has_label(schema: "pyarrow.Schema") -> bool:
    from pyarrow import types

    return LABEL_COLUMN in schema.names and types.is_integer(schema.field(LABEL_COLUMN).type)


def _labels(column: "pyarrow.ChunkedArray") -> NDArray[np.int64] | None:
    """(N,) as written; None where some are missing, or -1 as Hugging Face marks unknown ones."""
    if column.null_count:
        return None
    values = column.to_numpy().astype(np.int64)
    return None if (values < 0).any() else values


def _joined(labels: Sequence[NDArray[np.int64] | None]) -> Classes:
    known = [values for values in labels if values is not None]
    return classes_of(np.concatenate(known)) if len(known) == len(labels) else UNKNOWN_CLASSES


def _train_split(paths: Sequence[Path]) -> list[Path]:
    matches = [_SPLIT_FILE.fullmatch(path.stem) for path in paths]
    splits = [match.group(1) if match else None for match in matches]
    if TRAIN_SPLIT not in splits or None in splits:
        return list(paths)
    return [path for path, split in zip(paths, splits, strict=True) if split == TRAIN_SPLIT]
