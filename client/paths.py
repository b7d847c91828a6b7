"""Names of files: what a caller writes for one, and which files of a folder are pictures.

In: a path, a file:// URL or a folder. Out: paths, and the ids that files get.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What the service decodes, by how such files are called.
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})


@dataclass(frozen=True)
class FileInFolder(os.PathLike[str]):
    """A picture found in a folder."""

    path: Path
    id: str  # its path from the folder, with slashes

    def __fspath__(self) -> str:
        return str(self.path)


def local_path(name: str | os.PathLike[str]) -> Path:
    """The file of this machine that is meant.

    Raises:
        ValueError: an address that somebody would have to fetch.
    """
    if isinstance(name, Path):
        return name  # made anew, it costs as much as reading a small file
    if not isinstance(name, str):
        return Path(name)
    scheme, _, rest = name.partition("://")
    if not rest:
        return Path(name)
    if scheme.lower() == "file":
        url = urlsplit(name)
        if url.netloc not in ("", "localhost"):
            raise ValueError(f"{name!r} is a file of another machine, {url.netloc}: copy it here")
        return Path(unquote(url.path))
    if scheme.lower() in ("http", "https", "ftp", "s3", "gs"):
        raise ValueError(
            f"{name!r} is not fetched, neither by the client nor by the service: download it and "
            "pass its path or its bytes"
        )
    return Path(name)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's pictures: .DS_Store, ._photo.jpg, .git."""
    return name.startswith(".")


def files_in(folder: Path) -> Iterator[FileInFolder]:
    """Every file below the folder, sorted; hidden ones and links to folders are left out.

    Raises:
        OSError: a folder below cannot be listed; nothing is passed over silently.
    """

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(files):
            if not is_hidden(name):
                path = Path(place, name)
                yield FileInFolder(path, path.relative_to(folder).as_posix())


def pictures_in(folder: Path) -> Iterator[FileInFolder]:
    """The files below the folder that are called like pictures.

    Raises:
        ValueError: there are none.
    """
    found = False
    for file in files_in(folder):
        if file.path.suffix.lower() in PICTURE_SUFFIXES:
            found = True
            yield file
    if not found:
        raise ValueError(
            f"{folder} holds no picture: none of its files ends with "
            + ", ".join(sorted(PICTURE_SUFFIXES))
        )
