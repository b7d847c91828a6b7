"""Where images of bulk work come from: a folder, tar shards as WebDataset's, or parquet tables.

In: a path. Out: a `Source`: images in a fixed order, each with an id (the trainer's for the same
place), a mark that changes with it, and its bytes when asked for, or why there are none. Whatever
looks like an image is in the list, so that nothing is left out in silence.
"""

import hashlib
import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, Protocol

from service.bulk.tables import ImageTable, TableError, open_table
from trainer.representation.bundle import MAX_ID_LENGTH

# What is an image by its name. Not all of these are decoded here; those that are not are rejected.
JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
OTHER_SUFFIXES = (".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
SUFFIXES = frozenset((*JPEG_SUFFIXES, *OTHER_SUFFIXES))
MAX_SHARDS = 100_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")

Kind = Literal["folder", "webdataset", "parquet"]


class SourceError(Exception):
    """Nothing can be read from there; says what was found and wanted."""


class Unreadable(NamedTuple):
    """Why an image has no bytes."""

    reason: str


class Pictures(Protocol):
    """Encoded images by their number."""

    def read(self, first: int, last: int) -> Iterator[bytes | Unreadable]:
        """Images first..last-1 in order."""
        ...


@dataclass(frozen=True)
class Source:
    """N images.

    Attributes:
        ids: N; different among those that can be read.
        marks: N; what changes when the image does: its place, size and time.
        unusable: number -> why this image cannot have its id.
        other_files: files or members that are no images by their name.
    """

    kind: Kind
    ids: Sequence[str]
    marks: Sequence[str]
    pictures: Pictures
    unusable: Mapping[int, str] = field(default_factory=dict)
    other_files: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, first: int, last: int) -> Iterator[tuple[int, bytes | Unreadable]]:
        """(number, encoded image) of first..last-1."""
        for number, content in enumerate(self.pictures.read(first, last), first):
            reason = self.unusable.get(number)
            yield number, content if reason is None else Unreadable(reason)

    def fingerprint(self, first: int, last: int) -> str:
        """sha256 (hex) of the ids and marks of first..last-1."""
        digest = hashlib.sha256()
        for number in range(first, last):
            digest.update(f"{self.ids[number]}\0{self.marks[number]}\n".encode())
        return digest.hexdigest()


def open_source(place: str, *, column: str | None = None, images: Path | None = None) -> Source:
    """Find the images of a folder, of a .tar or .parquet, or of a folder or pattern of those.

    Args:
        place: `photos/`, `shards/`, `shards/train-{000..009}.tar`, `table.parquet`.
        column: of a parquet, that holds the images or their paths.
        images: where the paths of a parquet start; None: its folder.

    Raises:
        SourceError: nothing there, several kinds beside each other, damage.
    """
    paths = [Path(name) for name in _expanded(place)]
    if len(paths) == 1 and paths[0].is_dir():
        (root,) = paths
        files = sorted(path for path in root.iterdir() if path.is_file())
        paths = [path for path in files if path.suffix in (".tar", ".parquet")]
        if not paths:
            return _folder(root)
        loose = [path.name for path in files if path.suffix.lower() in SUFFIXES]
        if loose:
            raise SourceError(
                f"{root} holds {paths[0].name} and images such as {loose[0]}: give one of them, "
                "or put them into folders of their own"
            )
    else:
        root = Path(os.path.commonpath([path.parent for path in paths]))
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise SourceError(f"{missing[0]} does not exist, nor {len(missing) - 1} of the others")
    suffixes = {path.suffix for path in paths}
    if suffixes == {".tar"}:
        return _shards(paths, root)
    if suffixes == {".parquet"}:
        try:
            return _tables(paths, root, column, images)
        except TableError as error:
            raise SourceError(str(error)) from error
    raise SourceError(
        f"{place} holds {', '.join(sorted(suffixes))}: wanted a folder of images, .tar shards, or "
        ".parquet tables"
    )


def _expanded(pattern: str) -> list[str]:
    parts = _RANGE.split(pattern)  # text, first, last, text, ..., text
    numbers, total = [], 1
    for first, last in zip(parts[1::3], parts[2::3], strict=True):
        total *= max(0, int(last) - int(first) + 1)
        if not 0 < total <= MAX_SHARDS:
            raise SourceError(
                f"{{{first}..{last}}}: wanted a range that counts up, and at most {MAX_SHARDS:,} "
                "names in all"
            )
        numbers.append([str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)])
    return [
        "".join(itertools.chain(*zip(parts[::3], [*chosen, ""], strict=True)))
        for chosen in itertools.product(*numbers)
    ]


class _Listed:
    """Images as they are found."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.marks: list[str] = []
        self.unusable: dict[int, str] = {}
        self.others = 0
        self._seen: set[str] = set()

    def add(self, name: str, mark: str) -> None:
        """Note an image, and why it cannot have its name for an id."""
        number = len(self.ids)
        try:
            name.encode()
        except UnicodeEncodeError:
            self.unusable[number] = "its name is not UTF-8: rename it"
            name = name.encode("utf-8", "replace").decode()
        if not 1 <= len(name) <= MAX_ID_LENGTH:
            self.unusable[number] = (
                f"its name has {len(name)} characters, 1..{MAX_ID_LENGTH} can be an id"
            )
        if name in self._seen:
            self.unusable[number] = "an earlier image has the same name: rename it"
        self._seen.add(name)
        self.ids.append(name)
        self.marks.append(mark)

    def source(self, kind: Kind, pictures: Pictures) -> Source:
        """All of them."""
        return Source(kind, self.ids, self.marks, pictures, self.unusable, self.others)


def _folder(root: Path) -> Source:
    listed, paths = _Listed(), []
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                listed.others += 1
                continue
            listed.add(path.relative_to(root).as_posix(), _mark(path))
            paths.append(path)
    if not paths:
        raise SourceError(
            f"{root} holds no image, {listed.others} other files: wanted files ending in "
            f"{', '.join(sorted(SUFFIXES))}"
        )
    return listed.source("folder", _Files(paths))


def _shards(paths: Sequence[Path], root: Path) -> Source:
    listed, places = _Listed(), []
    for path in paths:
        shard, mark = path.relative_to(root).as_posix(), _mark(path)
        for info in _members(path):
            name = PurePosixPath(info.name)
            if name.name.startswith(".") or name.suffix.lower() not in SUFFIXES:
                listed.others += 1
                continue
            listed.add(f"{shard}/{info.name}", f"{mark} {info.offset_data} {info.size}")
            places.append(_Place(path, info.offset_data, info.size))
    if not places:
        raise SourceError(f"{paths[0]}, {len(paths)} shards: no image, {listed.others} others")
    return listed.source("webdataset", _Members(places))


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The plain files of an uncompressed tar; a header that is damaged is no end."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                if info.isreg() and not info.issparse():
                    yield info
            file.seek(archive.offset)
            closing = file.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError) as error:
        raise SourceError(f"{path} cannot be read as an uncompressed tar: {error}") from error
    if len(closing) < tarfile.BLOCKSIZE or closing.strip(b"\0"):
        raise SourceError(
            f"{path} is damaged or was cut short at byte {archive.offset}: fetch it again"
        )


def _tables(paths: Sequence[Path], root: Path, column: str | None, images: Path | None) -> Source:
    listed = _Listed()
    tables = [open_table(path, column) for path in paths]
    if len({table.holds_paths for table in tables}) > 1:
        raise SourceError(f"{root}: some tables hold images, others paths: give tables of one kind")
    if tables[0].holds_paths:
        files: list[Path | None] = []
        for table in tables:
            start = images or table.path.parent
            for text in table.texts():
                parts = PurePosixPath(text).parts
                below = bool(parts) and parts[0] != "/" and ".." not in parts
                files.append(start / text if below else None)
                listed.add(text, _mark(start / text) if below else "")
        if not files:
            raise SourceError(f"{paths[0]}, {len(paths)} tables: no row")
        return listed.source("parquet", _Files(files))
    for table in tables:
        name, mark = table.path.relative_to(root).as_posix(), _mark(table.path)
        width = len(str(max(table.rows - 1, 0)))  # as the trainer names them
        for row in range(table.rows):
            listed.add(f"{name}/{row:0{width}}", mark)
    if not listed.ids:
        raise SourceError(f"{paths[0]}, {len(paths)} tables: no row")
    return listed.source("parquet", _Cells(tables))


@dataclass(frozen=True)
class _Files:
    """Pictures that are files; None lies where it must not."""

    paths: Sequence[Path | None]

    def read(self, first: int, last: int) -> Iterator[bytes | Unreadable]:
        for path in self.paths[first:last]:
            if path is None:
                yield Unreadable("its path leads out of the folder of images")
                continue
            try:
                yield path.read_bytes()
            except (OSError, ValueError) as error:  # a name that no file system takes
                yield Unreadable(f"it cannot be read: {getattr(error, 'strerror', error)}")


class _Place(NamedTuple):
    """A member of a shard."""

    shard: Path
    offset: int
    size: int


@dataclass(frozen=True)
class _Members:
    """Pictures that are members of tars."""

    places: Sequence[_Place]

    def read(self, first: int, last: int) -> Iterator[bytes | Unreadable]:
        for shard, places in itertools.groupby(self.places[first:last], lambda place: place.shard):
            try:
                with shard.open("rb") as file:
                    for place in places:
                        file.seek(place.offset)
                        yield file.read(place.size)
            except OSError as error:
                raise SourceError(f"{shard} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class _Cells:
    """Pictures that stand in tables."""

    tables: Sequence[ImageTable]

    def read(self, first: int, last: int) -> Iterator[bytes | Unreadable]:
        start = 0
        for table in self.tables:
            begin, end = max(first - start, 0), min(last - start, table.rows)
            if begin < end:
                for content in table.cells(begin, end):
                    yield Unreadable("the row holds no bytes") if content is None else content
            start += table.rows


def _mark(path: Path) -> str:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"
