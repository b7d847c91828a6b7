"""Tables of labelled images: a CSV or parquet of paths, or a parquet of encoded images.

In: a `TableDataset`. Out: its sources by split, labels as the column has them; a table without a
split column is all `train`. Paths start from the table's folder and never leave it.
"""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from trainer.datasets import DataError, ImageSource
from trainer.datasets.files import from_files
from trainer.datasets.source import Skipped, classes_of, printable, unusable_name
from trainer.datasets.tables import open_tables
from trainer.evaluation.dataset_specs import TEST, TRAIN, VALIDATION, TableDataset

# What a split column may say.
_SPLIT_WORDS = {
    "train": TRAIN,
    "training": TRAIN,
    "validation": VALIDATION,
    "valid": VALIDATION,
    "val": VALIDATION,
    "test": TEST,
}
Columns = dict[str, list[str]]  # name to texts, all equally long


def open_labelled_table(spec: TableDataset) -> dict[str, ImageSource]:
    """The labelled images of a table by split.

    Raises:
        DataError: no such file or column, a row without path or label, a path twice or outside.
    """
    if spec.splits is not None:
        places = {name: spec.root / where for name, where in spec.splits.items()}
        return {name: _whole(spec, path) for name, path in places.items()}
    if not spec.root.is_file():
        raise DataError(
            f"data set {spec.name}: {spec.root} is no file: wanted a .csv or .parquet, or splits "
            "with a file for each"
        )
    columns = _columns(spec, spec.root)
    if columns is None or spec.split not in columns:
        return {TRAIN: _whole(spec, spec.root)}
    words = columns[spec.split]
    unknown = sorted({word for word in words if word.strip().lower() not in _SPLIT_WORDS})
    if unknown:
        raise DataError(
            f"data set {spec.name}: column {spec.split!r} of {spec.root} says {unknown[:5]}: "
            f"wanted {', '.join(_SPLIT_WORDS)}"
        )
    rows: dict[str, list[int]] = {}
    for row, word in enumerate(words):
        rows.setdefault(_SPLIT_WORDS[word.strip().lower()], []).append(row)
    return {name: _source(spec, spec.root, columns, rows[name]) for name in sorted(rows)}


def _whole(spec: TableDataset, path: Path) -> ImageSource:
    columns = _columns(spec, path)
    if columns is None:
        return _encoded(spec, path)
    return _source(spec, path, columns, range(len(columns[spec.path])))


def _columns(spec: TableDataset, path: Path) -> Columns | None:
    """The columns as texts; None for a parquet of images, which has no column of paths."""
    if not path.is_file():
        raise DataError(f"data set {spec.name}: {path} does not exist")
    if path.suffix == ".parquet":
        columns = _of_parquet(spec, path)
        if columns is None:
            return None
    elif path.suffix == ".csv":
        columns = _of_csv(spec, path)
    else:
        raise DataError(f"data set {spec.name}: {path} is no .csv or .parquet")
    missing = [name for name in (spec.path, spec.label) if name not in columns]
    if missing:
        raise DataError(
            f"data set {spec.name}: {path} has no column {missing[0]!r}, only {sorted(columns)}"
        )
    if not columns[spec.path]:
        raise DataError(f"data set {spec.name}: {path} has no row")
    return columns


def _of_csv(spec: TableDataset, path: Path) -> Columns:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            header = next(lines, [])
            rows = [row for row in lines if row]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise DataError(f"data set {spec.name}: {path} cannot be read as CSV: {error}") from error
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise DataError(
                f"data set {spec.name}: {path}, row {number} has {len(row)} fields, the header "
                f"{len(header)}"
            )
    return {name: [row[seat] for row in rows] for seat, name in enumerate(header)}


def _of_parquet(spec: TableDataset, path: Path) -> Columns | None:
    # Imported here as in trainer.datasets.tables: it takes a fifth of a second.
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            if spec.path not in file.schema_arrow.names:
                return None
            known = [
                name
                for name in (spec.path, spec.label, spec.split)
                if name in file.schema_arrow.names
            ]
            table = file.read(columns=known)
    except (ArrowException, OSError) as error:
        raise DataError(f"data set {spec.name}: {path} cannot be read: {error}") from error
    return {
        name: ["" if value is None else str(value) for value in table.column(name).to_pylist()]
        for name in known
    }


def _encoded(spec: TableDataset, path: Path) -> ImageSource:
    """A parquet whose rows hold the images themselves."""
    from pyarrow import parquet

    source = open_tables([path], path.parent)
    with parquet.ParquetFile(path) as file:
        if spec.label not in file.schema_arrow.names:
            raise DataError(
                f"data set {spec.name}: {path} has no column {spec.label!r}, only "
                f"{sorted(file.schema_arrow.names)}"
            )
        values = file.read(columns=[spec.label]).column(0).to_pylist()
    if None in values:
        raise DataError(
            f"data set {spec.name}: {path}, row {values.index(None)} has no {spec.label!r}"
        )
    known = classes_of(values)
    return replace(source, labels=known.labels, class_names=known.names)


def _source(spec: TableDataset, path: Path, columns: Columns, rows: Sequence[int]) -> ImageSource:
    root = spec.images or path.parent
    names: list[str] = []
    labels: list[str] = []
    skipped: list[Skipped] = []
    seen: set[str] = set()
    for row in rows:
        name, label = columns[spec.path][row].strip(), columns[spec.label][row].strip()
        parts = PurePosixPath(name).parts
        if not name or not label:
            raise DataError(
                f"data set {spec.name}: {path}, data row {row + 1} has no "
                f"{spec.label if name else spec.path}: wanted both in each row"
            )
        if parts[0] == "/" or ".." in parts:
            raise DataError(
                f"data set {spec.name}: {path}, data row {row + 1}: {name} lies outside {root}: "
                "wanted paths below it"
            )
        if name in seen:
            raise DataError(
                f"data set {spec.name}: {path} names {name} twice; remove one of the rows"
            )
        seen.add(name)
        reason = unusable_name(name)
        if reason:
            skipped.append(Skipped(printable(name), reason))
            continue
        names.append(name)
        labels.append(label)
    source = from_files(root, names, None, skipped)
    as_numbers = all(label.removeprefix("-").isdecimal() for label in labels)
    known = classes_of([int(label) for label in labels] if as_numbers else labels)
    return replace(source, labels=known.labels, class_names=known.names)
