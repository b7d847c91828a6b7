"""What add_folder() has sent and what of it was answered, on disk, so that it can be killed.

In: parts that begin and end. Out: which files need no sending, which parts were on their way.
One JSON object a line: a head, then `begin` before a part is sent and `end` (synced to the disk)
once it is answered. A last line without its end was being written at a kill and is dropped.
"""

import contextlib
import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from client.errors import FolderNotAdded

try:
    import fcntl
except ImportError:  # Windows: the journal works, two processes on it are not kept apart
    fcntl = None  # type: ignore[assignment]

SCHEMA = 1


class Sent(NamedTuple):
    """One file as it was when it was sent: another size or time means other content."""

    id: str
    size: int
    mtime_ns: int
    facts: str = ""  # a digest of its metadata, where it was sent with any


@dataclass
class Begun:
    """A part that was sent and not seen answered."""

    key: str  # its Idempotency-Key: sent again under it, it changes nothing twice
    files: tuple[Sent, ...]


@dataclass
class Kept:
    """What a journal says."""

    head: dict[str, Any] = field(default_factory=dict)
    answered: dict[str, Sent] = field(default_factory=dict)
    begun: dict[str, Begun] = field(default_factory=dict)
    gallery_version: int = 0  # the newest that was answered


class Journal:
    """The journal at a path, owned by one process; use it as a context manager.

    Raises:
        FolderNotAdded: in use, or damaged.
        OSError: it cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._broken = False
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if fcntl is not None:
                self._own()
            self.kept, self._end = self._read()
            os.ftruncate(self._file, self._end)
            _sync_folder(path.parent)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it. What is told of parts that end later is not written any more."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def start(self, **head: Any) -> None:
        """Write the head of a new journal."""
        self.kept.head = {"journal": SCHEMA, **head}
        self._append(self.kept.head, synced=True)

    def begin(self, key: str, files: tuple[Sent, ...]) -> None:
        """A part is about to be sent. Not synced: what a power cut takes is sent as new."""
        self._append({"begin": key, "files": files}, synced=False)

    def end(self, key: str, *, version: int, refused: dict[str, str]) -> None:
        """A part was answered: on return this is on the disk."""
        self._append({"end": key, "version": version, "refused": refused}, synced=True)

    def _own(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderNotAdded(
                f"{self.path} is in use: the same folder is being added already; wait for it, or "
                "give another journal="
            ) from None

    def _append(self, line: Any, *, synced: bool) -> None:
        content = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            if self._broken or self._file < 0:
                raise OSError(f"{self.path} is not written any more: a write to it failed before")
            try:
                left = memoryview(content)
                while left:
                    left = left[os.write(self._file, left) :]
                if synced:
                    os.fsync(self._file)
            except OSError:
                # Half a line must not stand before the next one.
                self._broken = True
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._end)
                    self._broken = False
                raise
            self._end += len(content)

    def _read(self) -> tuple[Kept, int]:
        """What the file says, and how many of its bytes are whole lines."""
        kept, end = Kept(), 0
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    _take(kept, json.loads(line), first=number == 1)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise FolderNotAdded(
                        f"{self.path}, line {number}, is damaged or no journal ({error}): give "
                        "another journal=, or delete it to send everything again; items are then "
                        "replaced, not doubled"
                    ) from None
                end += len(line)
        return kept, end


def _take(kept: Kept, line: dict[str, Any], *, first: bool) -> None:
    """Read one line into what is kept."""
    if first:
        if line["journal"] != SCHEMA:
            raise ValueError(f"journal {line['journal']!r}, wanted {SCHEMA}")
        kept.head = line
    elif "begin" in line:
        files = tuple(
            Sent(str(i), int(size), int(time), *map(str, facts))
            for i, size, time, *facts in line["files"]
        )
        kept.begun[line["begin"]] = Begun(line["begin"], files)
    else:
        part = kept.begun.pop(line["end"])
        refused = set(line["refused"])
        # A file that was refused is sent again by the next call: a decoder that was killed or had
        # too little time refuses a picture that is good.
        for sent in part.files:
            if sent.id not in refused:
                kept.answered[sent.id] = sent
        kept.gallery_version = max(kept.gallery_version, int(line["version"]))


def _sync_folder(folder: Path) -> None:
    """Have the name of a new file survive a power cut, where folders can be synced."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
