"""add_folder(): a folder of pictures into the gallery, going on where a kill cut it short.

In: a folder and a journal. Out: steps that end with a FolderAdded. Files that an earlier run got an
answer for are not sent again unless they have changed; parts that were on their way are sent again
under their Idempotency-Key, so that the service changes nothing twice.
"""

import hashlib
import json
import os
import threading
import unicodedata
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from client import answers, bodies
from client import images as pictures
from client.answers import reading
from client.bodies import cut
from client.errors import FolderNotAdded, IdempotencyConflict
from client.gallery import Gallery, new_items
from client.journal import Journal, Sent
from client.models import Added, FolderAdded, Json, RefusedFile
from client.paths import PICTURE_SUFFIXES, FileInFolder, files_in
from client.retry import Steps
from client.routes import ADD

JOURNAL_SUFFIX = ".invprop-journal"

Progress = Callable[[int, int], None]
MetadataOf = Callable[[str], Json | None]


class _Line(NamedTuple):
    """One file, read."""

    sent: Sent
    line: bytes  # of NDJSON


class _Refused(Exception):
    """A file that is not sent, and why."""


class Folders(Gallery):
    """The one route of this room is /items."""

    def add_folder(
        self,
        folder: str | os.PathLike[str],
        *,
        journal: str | os.PathLike[str] | None,
        metadata: MetadataOf | None,
        progress: Progress | None,
    ) -> Steps[FolderAdded]:
        root = Path(folder).resolve()
        if not root.is_dir():
            raise NotADirectoryError(f"{folder} is no folder")
        place = root.with_name(root.name + JOURNAL_SUFFIX) if journal is None else Path(journal)
        info = yield from self.info()  # its version now, not when this client was new
        limit = yield from self._limits()
        with Journal(place) as book:
            if book.kept.head:
                _same_gallery(book, root, self._service, info.model, info.gallery_version)
            else:
                book.start(folder=str(root), service=self._service, model=info.model)
            job = _Job(root, book, metadata, progress, most_bytes=limit("max_body_bytes"))
            yield from self._together(
                self._folder_parts(
                    job,
                    most=self._most(limit("max_images")),
                    most_bytes=self._most_bytes(limit("max_body_bytes")),
                )
            )
            return job.result(info.gallery_version)

    def _folder_parts(
        self, job: "_Job", *, most: int, most_bytes: int
    ) -> Iterator[Callable[[], Steps[None]]]:
        for key, part in job.begun_before():
            yield partial(self._add_part, job, part, key)
        for part in cut(job.lines(), size=_line_bytes, most=most, most_bytes=most_bytes):
            key = uuid.uuid4().hex
            job.book.begin(key, tuple(entry.sent for entry in part))
            yield partial(self._add_part, job, part, key)

    def _add_part(self, job: "_Job", part: list[_Line], key: str) -> Steps[None]:
        lines = [entry.line for entry in part]
        try:
            answer = yield from self._exchange(new_items(lines, key))
        except IdempotencyConflict:
            # Begun before with other content or metadata under this key, of which nothing is known:
            # sent as new, what was added is replaced by itself.
            key = uuid.uuid4().hex
            job.book.begin(key, tuple(entry.sent for entry in part))
            answer = yield from self._exchange(new_items(lines, key))
        with reading(ADD):
            added = answers.added(answer, offset=0)
        job.ended(part, key, added)


class _Job:
    """One add_folder() under way; parts end on several threads."""

    def __init__(
        self,
        root: Path,
        book: Journal,
        metadata: MetadataOf | None,
        progress: Progress | None,
        *,
        most_bytes: int,
    ) -> None:
        self.book = book
        self._root, self._metadata, self._progress = root, metadata, progress
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._answers: list[Added] = []
        self._refused: dict[str, str] = {}
        self._again: dict[str, Sent] = {}  # ids that were sent by begun_before()
        self._names: dict[str, str] = {}
        self._done = self._already = 0
        self._total = sum(1 for _ in files_in(root))

    def begun_before(self) -> Iterator[tuple[str, list[_Line]]]:
        """The parts of an earlier run that were not seen answered, read again; those of which a
        file has gone, changed or been answered since are left to lines()."""
        answered = self.book.kept.answered
        for begun in list(self.book.kept.begun.values()):
            if any(
                sent.id in answered and _bare(answered[sent.id]) == _bare(sent)
                for sent in begun.files
            ):
                continue
            try:
                part = [
                    self._read(*self._described(FileInFolder(self._root / sent.id, sent.id)))
                    for sent in begun.files
                ]
            except (OSError, _Refused):
                continue
            if tuple(entry.sent for entry in part) == begun.files:
                self._again |= {sent.id: sent for sent in begun.files}
                yield begun.key, part

    def lines(self) -> Iterator[_Line]:
        """The files that have to be sent, as lines; the others are counted."""
        for file in files_in(self._root):
            if file.id in self._again:
                continue
            try:
                _check_name(file, self._names)
                described = self._described(file)
                if self._is_answered(described[1]):
                    continue
                line = self._read(*described)
            except _Refused as error:
                self._refuse(file.id, str(error))
            except OSError as error:
                self._refuse(file.id, f"cannot be read: {error.strerror or error}")
            else:
                yield line

    def ended(self, part: list[_Line], key: str, added: Added) -> None:
        """A part was answered: into the journal, then into the counts."""
        refused = {entry.id: entry.reason for entry in added.rejected if entry.id is not None}
        self.book.end(key, version=added.gallery_version, refused=refused)
        with self._lock:
            self._answers.append(added)
            self._refused |= refused
            self._tell(len(part))

    def result(self, gallery_version: int) -> FolderAdded:
        """What became of the folder."""
        return FolderAdded(
            added=sum(answer.added for answer in self._answers),
            updated=sum(answer.updated for answer in self._answers),
            already=self._already,
            refused=tuple(
                RefusedFile(_printable(name), reason)
                for name, reason in sorted(self._refused.items())
            ),
            gallery_version=max(
                [gallery_version, *(answer.gallery_version for answer in self._answers)]
            ),
            journal=str(self.book.path),
        )

    def _described(self, file: FileInFolder) -> tuple[FileInFolder, Sent, Json | None]:
        """The file as it is, and its metadata."""
        facts = None if self._metadata is None else self._metadata(file.id)
        stat = file.path.stat()
        return file, Sent(file.id, stat.st_size, stat.st_mtime_ns, _digest(facts)), facts

    def _is_answered(self, now: Sent) -> bool:
        sent = self.book.kept.answered.get(now.id)
        if sent is None:
            return False
        # Where nothing is said of its metadata, what is there stays.
        if (sent if now.facts else _bare(sent)) != now:
            return False
        with self._lock:
            self._already += 1
            self._tell(1)
        return True

    def _read(self, file: FileInFolder, sent: Sent, facts: Json | None) -> _Line:
        content = pictures.encode(file.path)
        item: dict[str, object] = {"id": file.id, "image": pictures.as_base64(content)}
        if facts is not None:
            item["metadata"] = facts
        line = bodies.to_json(item) + b"\n"
        if len(line) > self._most_bytes:
            raise _Refused(
                f"takes {len(line):,} bytes as a request, more than the {self._most_bytes:,} of "
                "the service's max_body_bytes"
            )
        return _Line(sent, line)

    def _refuse(self, item_id: str, reason: str) -> None:
        with self._lock:
            self._refused[item_id] = reason
            self._tell(1)

    def _tell(self, count: int) -> None:
        """Under the lock, so that progress is told in order."""
        self._done += count
        if self._progress is not None:
            self._progress(self._done, max(self._total, self._done))


def _same_gallery(book: Journal, root: Path, service: str, model: str, version: int) -> None:
    """Refuse a journal whose answers say nothing about this gallery."""
    wanted = {"folder": str(root), "service": service, "model": model}
    for name, value in wanted.items():
        if book.kept.head.get(name) != value:
            raise FolderNotAdded(
                f"{book.path} is of the {name} {book.kept.head.get(name)!r}, this is {value!r}: "
                "give another journal=, or delete it to send everything again"
            )
    if version < book.kept.gallery_version:
        raise FolderNotAdded(
            f"the gallery is at version {version}, and {book.path} has an answer of version "
            f"{book.kept.gallery_version}: the gallery was restored or begun anew; delete the "
            "journal to send everything again"
        )


def _check_name(file: FileInFolder, names: dict[str, str]) -> None:
    if file.path.suffix.lower() not in PICTURE_SUFFIXES:
        raise _Refused("not called like a picture: " + ", ".join(sorted(PICTURE_SUFFIXES)))
    try:
        file.id.encode()
    except UnicodeEncodeError:
        raise _Refused("its name is not UTF-8") from None
    # One name in two spellings of Unicode would be two items that nobody can tell apart.
    if not file.id.isascii():
        first = names.setdefault(unicodedata.normalize("NFC", file.id), file.id)
        if first != file.id:
            raise _Refused("a duplicate: the same name is there in another spelling of Unicode")


def _bare(sent: Sent) -> Sent:
    """The file alone, whatever its metadata."""
    return sent._replace(facts="")


def _digest(facts: Json | None) -> str:
    """The same for equal metadata."""
    if facts is None:
        return ""
    content = json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _line_bytes(entry: _Line) -> int:
    return len(entry.line)


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
