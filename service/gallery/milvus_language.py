"""How the gallery speaks to Milvus: URLs, literals, and expressions that no caller can write.

In: URLs of an operator; ids and filters of callers. Out: where to connect; texts in which nothing
means more than itself. No pymilvus here: it is wanted by those alone who have a Milvus.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from service.gallery.protocol import Filter, GalleryError

Index = Literal["flat", "hnsw", "gpu_cagra"]
WANTED_URL = "milvus://[USER:PASSWORD@]HOST:PORT/COLLECTION, or milvus+tls://..."
MAX_ROWS = 16_384  # Milvus answers at most so many to one query
TERM_LENGTH = 32  # hexadecimal digits: 128 bits, so that no two fields with values share one
VALUE_BYTES = 65_535  # Milvus' bound on a text
_SCHEMES = {"milvus": "http", "milvus+tls": "https"}
_SCHEMES_OF = {uri: scheme for scheme, uri in _SCHEMES.items()}


class Place(NamedTuple):
    """What a milvus:// URL says."""

    uri: str
    user: str
    password: str
    collection: str

    @property
    def name(self) -> str:
        """For people: without user and password."""
        scheme, _, rest = self.uri.partition("://")
        return f"{_SCHEMES_OF[scheme]}://{rest}/{self.collection}"


def place_of(url: str) -> Place:
    """Read a milvus:// URL.

    Raises:
        GalleryError: it is none; the message holds neither user nor password.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 19530
    except ValueError:
        raise GalleryError(f"the gallery's URL cannot be read; wanted {WANTED_URL}") from None
    name = parts.path.removeprefix("/")
    if parts.scheme not in _SCHEMES or not host or not name.isidentifier() or not name.isascii():
        raise GalleryError(
            f"the gallery's URL cannot be used; wanted {WANTED_URL}, the collection a name of "
            "letters, digits and _"
        )
    host = f"[{host}]" if ":" in host else host
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return Place(f"{_SCHEMES[parts.scheme]}://{host}:{port}", user, password, name)


def quoted(text: str) -> str:
    """A text as a literal of Milvus' expressions: it ends where the text ends, whatever it holds.

    Backslash, quote and line ends are all that has a meaning inside a literal.
    """
    for sign, written in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(sign, written)
    return f'"{text}"'


def any_of(values: Sequence[int | str]) -> str:
    """A list of numbers or texts as a literal."""
    return "[" + ", ".join(quoted(v) if isinstance(v, str) else str(v) for v in values) + "]"


def terms_of(metadata: Mapping[str, Any]) -> list[str]:
    """What an item is found by: one digest for each field whose value is a scalar.

    A filter compares digests, so no name and no value of a caller ever stands in an expression, and
    equal means what it means elsewhere: 1 and 1.0 are, 1 and true are not.
    """
    return [term(k, v) for k, v in metadata.items() if not isinstance(v, dict | list)]


def term(name: str, value: Any) -> str:
    """The digest of a field and its value."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = json.dumps([name, value], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:TERM_LENGTH]


def expression_of(filter: Filter) -> str:
    """The expression that a filter stands for; empty for an empty one."""
    fields = (any_of([term(name, value) for value in values]) for name, values in filter.items())
    return " and ".join(f"array_contains_any(terms, {listed})" for listed in fields)
