"""A directory that is either whole or not there: bundles and checkpoints are written this way.

In: named files as bytes, whole or in pieces. Out: a directory whose manifest.json holds the size
and sha256 of each. Written under a temporary name, every file and the directory synchronised to
disk, then renamed; an older one of the same name is exchanged for it in one step.
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST = "manifest.json"

# Names while writing; what a killed writer left behind is recognised by them.
_UNFINISHED = re.compile(r"\.(?P<name>.+)\.(new|old)-[0-9a-f]{12}")
# Linux: swap two paths in one step. Values of AT_FDCWD and RENAME_EXCHANGE in its headers.
_HERE, _EXCHANGE = -100, 2


# The content of a file: all of it, or pieces in their order, each asked for when it is written.
Content = bytes | Iterable[bytes | memoryview]


class ArtifactError(Exception):
    """A directory that is not what its manifest says; the message names the file."""


def write_artifact(
    directory: str | Path, files: Mapping[str, Content], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Write `files` and a manifest of `facts` plus their hashes as one directory, all or nothing.

    An older artifact of the same name is replaced only when the new one is complete on disk, in one
    step where the system can (Linux), so that even a kill leaves one of the two. On any error
    nothing of the new one is left behind and the older one stays.

    Returns:
        the manifest as written: `facts` with `files` = {path: {sha256, size_bytes}}.

    Raises:
        OSError: the directory cannot be written (full disk, no permission).
        ArtifactError: `directory` exists and is no artifact, so replacing it would destroy it.
    """
    directory = Path(directory)
    if directory.exists() and not (directory / MANIFEST).is_file():
        raise ArtifactError(
            f"{directory} exists and has no {MANIFEST}: it is not replaced; choose another name"
        )
    manifest: dict[str, Any] = dict(facts)
    directory.parent.mkdir(parents=True, exist_ok=True)
    token = _token()
    fresh = directory.parent / f".{directory.name}.new-{token}"
    retired = directory.parent / f".{directory.name}.old-{token}"
    remove_unfinished(directory.parent, only=directory.name)
    placed = False
    try:
        fresh.mkdir()
        entries = {}
        for name, content in files.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            entries[name] = _write_synchronised(path, content)
        manifest["files"] = dict(sorted(entries.items()))
        _write_synchronised(fresh / MANIFEST, json.dumps(manifest, indent=1).encode())
        for folder, _, _ in os.walk(fresh):
            _synchronise_directory(Path(folder))
        if directory.exists() and _exchange(fresh, directory):
            placed = True
            fresh.rename(retired)
        else:
            if directory.exists():
                directory.rename(retired)
            fresh.rename(directory)
            placed = True
        _synchronise_directory(directory.parent)
    except BaseException:
        shutil.rmtree(directory if placed else fresh, ignore_errors=True)
        older = fresh if placed and fresh.exists() else retired
        if older.exists() and not directory.exists():
            older.rename(directory)
        raise
    shutil.rmtree(retired, ignore_errors=True)
    return manifest


def remove_artifact(directory: Path) -> None:
    """Remove an artifact so that no half of it is ever seen under its name.

    Raises:
        OSError: it cannot be moved away; it stays whole.
    """
    retired = directory.with_name(f".{directory.name}.old-{_token()}")
    directory.rename(retired)
    shutil.rmtree(retired, ignore_errors=True)  # what is left, `remove_unfinished` takes


def remove_unfinished(parent: str | Path, *, only: str | None = None) -> None:
    """Remove what writers that were killed left in `parent`; nobody may be writing there.

    Args:
        only: the name of the artifact whose leftovers are meant; None for all.
    """
    for path in list(Path(parent).iterdir()):
        match = _UNFINISHED.fullmatch(path.name)
        if match and only in (None, match["name"]):
            shutil.rmtree(path, ignore_errors=True)


def file_entries(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """What a manifest says of `files`: {name: {sha256, size_bytes}}, sorted by name."""
    return {
        name: _entry(hashlib.sha256(content).hexdigest(), len(content))
        for name, content in sorted(files.items())
    }


def open_artifact(directory: str | Path) -> dict[str, Any]:
    """Return the manifest after checking the size and hash of every file it names.

    Raises:
        ArtifactError: no manifest, or a file missing, of another size or of another content.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name in manifest["files"]:
        verify_file(directory, manifest, name)
    return manifest


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read manifest.json and check its form, without looking at the other files."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} is missing: {directory} is incomplete or no artifact"
        ) from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        raise ArtifactError(f"{path} lists no files")
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise ArtifactError(f"{path} names {name!r}, which lies outside {directory}")
        if not isinstance(entry, dict) or not {"sha256", "size_bytes"} <= set(entry):
            raise ArtifactError(f"{path} gives no sha256 and size_bytes for {name!r}")
    return manifest  # type: ignore[no-any-return]


def verify_file(directory: Path, manifest: Mapping[str, Any], name: str) -> Path:
    """Check one file against the manifest and return its path."""
    path, entry = directory / name, manifest["files"][name]
    try:
        size = path.stat().st_size
        if size != entry["size_bytes"]:
            raise ArtifactError(
                f"{path} has {size} bytes, its manifest says {entry['size_bytes']}: "
                "it was cut short or replaced"
            )
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a name that no file system takes
        raise ArtifactError(f"{str(path)!a} cannot be read: {error}") from error
    if digest != entry["sha256"]:
        raise ArtifactError(
            f"{path} is damaged or was replaced: its sha256 is {digest[:16]}..., its manifest says "
            f"{str(entry['sha256'])[:16]}..."
        )
    return path


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _token() -> str:
    return uuid.uuid4().hex[:12]


def _entry(sha256: str, size_bytes: int) -> dict[str, Any]:
    return {"sha256": sha256, "size_bytes": size_bytes}


def _write_synchronised(path: Path, content: Content) -> dict[str, Any]:
    """Write a file and give its entry of the manifest, made of the very bytes that were written."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        for piece in (content,) if isinstance(content, bytes) else content:
            left = memoryview(piece).cast("B")
            digest.update(left)
            size += len(left)
            while left:
                left = left[os.write(file.fileno(), left) :]
        os.fsync(file.fileno())
    return _entry(digest.hexdigest(), size)


def _synchronise_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot synchronise a directory
            raise
    finally:
        os.close(descriptor)
