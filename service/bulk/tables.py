"""Parquet tables with a column of encoded images, or of paths to image files.

In: a .parquet. Out: its cells, a few row groups' rows at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import ArrowException, parquet, types

USUAL_IMAGES = ("image", "img")  # as Hugging Face names them
USUAL_PATHS = ("path", "file_name", "filename", "file")
_ROWS = 64  # read at a time: encoded images are large


class TableError(Exception):
    """A table that cannot be read as one of images; says what it holds."""


@dataclass(frozen=True)
class ImageTable:
    """One file.

    Attributes:
        column: what is read of it; `image.bytes` inside a struct.
    """

    path: Path
    column: str
    holds_paths: bool
    rows: int

    def texts(self) -> Iterator[str]:
        """The paths, "" where there is none."""
        for value in self._values(0, self.rows, 16_384):
            yield "" if value is None else str(value).strip()

    def cells(self, first: int, last: int) -> Iterator[bytes | None]:
        """The encoded images of rows first..last-1; None where a row has none."""
        yield from self._values(first, last, _ROWS)

    def _values(self, first: int, last: int, rows: int) -> Iterator[Any]:
        start = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                for group in range(file.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    if start < last and first < start + count:
                        row = start
                        for batch in file.iter_batches(
                            rows, row_groups=[group], columns=[self.column], use_threads=False
                        ):
                            for value in _inner(batch.column(0), self.column):
                                if first <= row < last:
                                    yield value.as_py()
                                row += 1
                    start += count
        except (ArrowException, OSError) as error:
            raise TableError(
                f"{self.path} is damaged ({error}): fetch or write it again"
            ) from error


def open_table(path: Path, column: str | None) -> ImageTable:
    """Look at the columns of a table.

    Args:
        column: which one holds images or paths; None: the usual names.

    Raises:
        TableError: it cannot be read, or no column is one.
    """
    try:
        with parquet.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (ArrowException, OSError) as error:
        raise TableError(f"{path} cannot be read as a parquet ({error})") from error
    wanted = (*USUAL_IMAGES, *USUAL_PATHS) if column is None else (column,)
    for name in wanted:
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return ImageTable(path, f"{name}.bytes", False, rows)
        if types.is_binary(kind) or types.is_large_binary(kind):
            return ImageTable(path, name, False, rows)
        if types.is_string(kind) or types.is_large_string(kind):
            return ImageTable(path, name, True, rows)
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"
    raise TableError(
        f"{path} has no column {' or '.join(map(repr, wanted))} of encoded images (binary, or "
        f"struct {{bytes, path}}) or of paths, its columns are {columns}: name one with --column"
    )


def _inner(cells: Any, column: str) -> Any:
    """The bytes of a struct, which parquet can give without its other fields."""
    return (
        cells.field("bytes") if column.endswith(".bytes") and types.is_struct(cells.type) else cells
    )
