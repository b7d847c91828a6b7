"""The files of the web page, as they are sent: read once, hashed, compressed once.

In: the directory service/static. Out: each file's bytes, plain and gzip, and one version for all of
them: the hash of every name and content. The version stands in the address of every file, so that a
browser may keep them for ever and modules that import each other by relative addresses are always
of one version.
"""

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

STATIC = Path(__file__).with_name("static")
INDEX = "index.html"
_MARK = b"@version"  # in index.html, where the version comes
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class PageFile:
    """One file of the page."""

    plain: bytes
    compressed: bytes  # gzip
    media_type: str
    etag: str  # of the plain form; the compressed one has its own, see `etag_of`

    def etag_of(self, is_compressed: bool) -> str:
        """Two forms are two representations (RFC 9110, 8.8.3)."""
        return f'"{self.etag}-gzip"' if is_compressed else f'"{self.etag}"'


@dataclass(frozen=True)
class Page:
    """The whole page."""

    version: str
    index: PageFile
    files: Mapping[str, PageFile]  # by name relative to the directory; the index is not among them


def read_page(directory: Path = STATIC) -> Page:
    """Read every file of the page.

    Raises:
        ValueError: a file is of a kind that the page has no media type for.
        OSError: a file cannot be read.
    """
    contents = {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    version = digest.hexdigest()[:16]
    index = _file(INDEX, contents.pop(INDEX).replace(_MARK, version.encode()))
    return Page(version, index, {name: _file(name, text) for name, text in contents.items()})


def _file(name: str, content: bytes) -> PageFile:
    media_type = _MEDIA_TYPES.get(Path(name).suffix)
    if media_type is None:
        raise ValueError(f"{name}: no file of the page; those end in {', '.join(_MEDIA_TYPES)}")
    etag = hashlib.sha256(content).hexdigest()[:32]
    return PageFile(content, gzip.compress(content, 9, mtime=0), media_type, etag)
