"""Images that are files: a folder, flat or nested, or a text list of paths.

In: a folder, or a list and the folder its paths start from. Out: an `ImageSource` of paths.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.datasets.source import (
    SUFFIXES,
    UNKNOWN_CLASSES,
    Classes,
    DataError,
    ImageSource,
    Skipped,
    classes_of,
    printable,
    unusable_name,
)


def open_folder(root: Path) -> ImageSource:
    """Image files below `root`, labelled by their top folder where all lie in two or more.

    Raises:
        DataError: no image there.
    """
    names, skipped, other_files = [], [], 0
    digest = hashlib.sha256()
    for path in walk(root):
        if path.suffix.lower() not in SUFFIXES:
            other_files += 1
            continue
        name = path.relative_to(root).as_posix()
        reason = unusable_name(name)
        if reason:
            skipped.append(Skipped(printable(name), reason))
            continue
        names.append(name)
        digest.update(f"{name}\0{path.stat().st_size}\n".encode())
    if not names:
        raise DataError(
            f"{root} holds no image, {other_files} other files and {len(skipped)} unusable names: "
            f"wanted files ending in {', '.join(sorted(SUFFIXES))}"
        )
    classes = _classes_from_folders(names)
    return ImageSource(
        ids=tuple(names),
        pictures=[root / name for name in names],
        labels=classes.labels,
        fingerprint=digest.hexdigest(),
        skipped=tuple(skipped),
        other_files=other_files,
        class_names=classes.names,
    )


def open_list(path: Path, root: Path) -> ImageSource:
    """A text list, `relative/path.jpg` or `relative/path.jpg 12` a line, as Places205's.

    The paths start from `root`; the number is the label. Files that are not there are found, and
    skipped, by the first pass over the data.

    Raises:
        DataError: no UTF-8 text, empty, a path twice, or labels on some lines only.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text ({error}): wanted one path a line") from error
    if not root.is_dir():
        raise DataError(f"{root}, where the paths of {path} should start, is no folder")
    names: dict[str, int | None] = {}
    skipped = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        has_label = bool(name) and label.isdecimal()
        name = name.rstrip() if has_label else line.strip()
        if name in names:
            raise DataError(f"{path}, line {number}: {name} stands there twice; remove one line")
        reason = unusable_name(name)
        if reason:
            skipped.append(Skipped(printable(name), reason))
        else:
            names[name] = int(label) if has_label else None
    labels = [label for label in names.values() if label is not None]
    if not names:
        raise DataError(f"{path} lists no image: wanted `relative/path.jpg` or with ` 12` a line")
    if labels and len(labels) < len(names):
        without = next(name for name, label in names.items() if label is None)
        raise DataError(
            f"{path}: {len(labels)} of {len(names)} lines have a label, {without} has none: "
            "give a number on every line or on none"
        )
    return from_files(root, list(names), labels or None, skipped)


def from_files(
    root: Path, names: Sequence[str], labels: Sequence[int] | None, skipped: Sequence[Skipped] = ()
) -> ImageSource:
    """The source of files with known names below `root`; a missing one is skipped later."""
    digest = hashlib.sha256()
    for name in names:
        try:
            size = (root / name).stat().st_size
        except OSError:
            size = -1  # so that the fingerprint tells when it comes back
        digest.update(f"{name}\0{size}\n".encode())
    classes = classes_of(labels)
    return ImageSource(
        ids=tuple(names),
        pictures=[root / name for name in names],
        labels=classes.labels,
        fingerprint=digest.hexdigest(),
        skipped=tuple(skipped),
        class_names=classes.names,
    )


def walk(root: Path) -> Iterator[Path]:
    """Files below `root` in sorted order, without hidden ones; linked folders are not entered."""
    for place, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            path = Path(place, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _classes_from_folders(names: Sequence[str]) -> Classes:
    """The top sub-folder of each image as its class, where that says anything."""
    tops = [name.split("/")[0] if "/" in name else "" for name in names]
    if "" in tops or len(set(tops)) < 2:
        return UNKNOWN_CLASSES
    return classes_of(tops)
