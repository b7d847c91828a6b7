"""Tar shards as WebDataset writes them, read in any order: their headers are indexed when opened.

In: .tar files, local or fetched once by URL. Out: an `ImageSource` of members, each known by shard,
offset and size; `KEY.cls` beside `KEY.jpg` is its label. Members are read by the decoding
processes; nothing is ever unpacked onto the disk.
"""

import hashlib
import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from trainer.datasets.fetch import cache_folder, fetch, shown
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
from trainer.representation.preprocess import ImageRejected

MAX_SHARDS = 100_000  # a pattern of more is a slip of the hand, and its list alone takes memory
MAX_LABEL_BYTES = 256  # of a .cls: a class number or a name
# An encoded image of the 50 Mpx that are decoded at most is smaller, even uncompressed (RGB).
MAX_MEMBER_BYTES = 200_000_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, slots=True)
class TarMember:
    """An encoded picture within a shard."""

    shard: Path
    offset: int  # of its first byte in the shard
    size: int  # in bytes

    def read(self) -> bytes:
        """The encoded picture; ImageRejected where the shard is shorter than its headers say."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise ImageRejected(
                f"{self.shard} ends {self.size - len(content)} bytes before this member does"
            )
        return content


def open_shards(paths: Sequence[Path], root: Path | None = None) -> ImageSource:
    """The images of tar shards, in the order of `paths` and within a shard of its members.

    Args:
        root: ids are paths relative to it; by default the lowest folder that holds all shards.

    Raises:
        DataError: a shard is missing, compressed, cut short, or no image is in any.
    """
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} shards are not there, first {missing[0]}: "
            "fetch them, or give a pattern of those that are"
        )
    root = root or Path(os.path.commonpath([path.parent for path in paths]))
    members: dict[str, TarMember] = {}
    labels: list[str | None] = []
    skipped: list[Skipped] = []
    other_files = 0
    digest = hashlib.sha256()
    for path in paths:
        images, classes, others = _index(path)
        other_files += others
        for name, member in images:
            full = f"{path.relative_to(root).as_posix()}/{name}"
            reason = unusable_name(full)
            if full in members:
                reason = "an earlier member has the same name: rename it"
            elif member.size > MAX_MEMBER_BYTES:
                reason = f"it has {member.size:,} bytes, at most {MAX_MEMBER_BYTES:,} are read"
            if reason:
                skipped.append(Skipped(printable(full), reason))
                continue
            members[full] = member
            labels.append(classes.get(_key(name)))
            digest.update(f"{full}\0{member.offset}\0{member.size}\0{labels[-1]}\n".encode())
    if not members:
        raise DataError(
            f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: no image in "
            f"them, {other_files} other members and {len(skipped)} unusable ones; wanted members "
            f"ending in {', '.join(sorted(SUFFIXES))}"
        )
    named = _classes(labels)
    return ImageSource(
        ids=tuple(members),
        pictures=list(members.values()),
        labels=named.labels,
        fingerprint=digest.hexdigest(),
        skipped=tuple(skipped),
        other_files=other_files,
        class_names=named.names,
    )


def is_remote(source: str) -> bool:
    """Whether SOURCE is a URL."""
    return source.startswith(("http://", "https://"))


def open_remote_shards(pattern: str) -> ImageSource:
    """The images of shards behind a URL pattern, each fetched once into the cache, see `fetch`.

    Raises:
        DataError: no .tar, or one that cannot be fetched.
    """
    urls = expand_braces(pattern)
    for url in urls:
        if not urlsplit(url).path.endswith(".tar"):
            raise DataError(f"{shown(url)} is no URL of a .tar: only shards are fetched")
    # One folder for all shards of a pattern, so that ids are the shards' names.
    bases = {url.split("?")[0].rpartition("/")[0] for url in urls}
    if len(bases) > 1:
        raise DataError(
            f"{shown(pattern)}: the shards lie in {len(bases)} folders, wanted one: vary the "
            "file's name only"
        )
    place = cache_folder(os.environ) / hashlib.sha256(bases.pop().encode()).hexdigest()
    return open_shards([fetch(url, place) for url in urls])


def expand_braces(pattern: str) -> list[str]:
    """All names of a pattern: `{000..011}` counts up, with the first number's width.

    Raises:
        DataError: a range that runs backwards, or too many names.
    """
    parts = _RANGE.split(pattern)  # text, first, last, text, ..., text
    ranges, total = [], 1
    for first, last in zip(parts[1::3], parts[2::3], strict=True):
        total *= int(last) - int(first) + 1
        if int(last) < int(first) or total > MAX_SHARDS:
            raise DataError(
                f"{{{first}..{last}}} in {shown(pattern)}: wanted a range that counts up, and at "
                f"most {MAX_SHARDS:,} names in all"
            )
        ranges.append([str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)])
    texts = parts[::3]
    return [
        "".join(itertools.chain(*zip(texts, [*numbers, ""], strict=True)))
        for numbers in itertools.product(*ranges)
    ]


def _index(path: Path) -> tuple[list[tuple[str, TarMember]], dict[str, str], int]:
    """(name, member) of each image, key -> class, and the number of other members."""
    images, classes, others = [], {}, 0
    try:
        with path.open("rb") as file:
            for info in _headers(path, file):
                name = info.name
                if Path(name).name.startswith("."):
                    continue
                if Path(name).suffix.lower() in SUFFIXES:
                    images.append((name, TarMember(path, info.offset_data, info.size)))
                elif name.endswith(".cls"):
                    classes[_key(name)] = _read_class(path, file, info)
                else:
                    others += 1
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read as an uncompressed tar: {error}. Fetch or write it again; "
            "unpack a compressed one with gunzip"
        ) from error
    return images, classes, others


def _headers(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Plain files of the archive; a damaged header is an error, which tarfile takes for the end."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:
            if info.isreg() and not info.issparse():
                yield info
        file.seek(archive.offset)
        block = file.read(tarfile.BLOCKSIZE)
        if block.strip(b"\0"):
            raise tarfile.ReadError(
                f"the header at byte {archive.offset} is damaged, {len(archive.getmembers())} "
                "members before it are whole"
            )
        if len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(
                f"it ends at byte {archive.offset} without the mark that closes a tar: it was cut "
                "short"
            )


def _read_class(path: Path, file: BinaryIO, info: tarfile.TarInfo) -> str:
    if info.size > MAX_LABEL_BYTES:
        raise DataError(
            f"{path}: {printable(info.name)} has {info.size} bytes, wanted a class number or name "
            f"of at most {MAX_LABEL_BYTES}"
        )
    file.seek(info.offset_data)
    try:
        return file.read(info.size).decode().strip()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: {printable(info.name)} is no text ({error}), wanted a class number or name"
        ) from error


def _key(name: str) -> str:
    """What the members of one sample share: the path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _classes(labels: Sequence[str | None]) -> Classes:
    """Classes where every image has a label; numbers count, other texts go by the alphabet."""
    known = [label for label in labels if label]
    if len(known) < len(labels):
        return UNKNOWN_CLASSES
    if all(value.isdecimal() for value in known):
        return classes_of([int(value) for value in known])
    return classes_of(known)
