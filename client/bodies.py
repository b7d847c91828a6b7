"""Request bodies: pictures, vectors, ids and items, cut into parts that the service's limits allow.

In: what the caller holds, lists or iterables that are read as they are sent. Out: bytes and JSON
values, one part at a time.
"""

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from client import images as pictures

if TYPE_CHECKING:
    from client.images import ImagesInput

JSON = "application/json"
NPY = "application/x-npy"
NDJSON = "application/x-ndjson"

T = TypeVar("T")

# Left free of every body for what surrounds the parts: the boundary's end, a .npy header, options.
ENVELOPE_BYTES = 1024
# "--" boundary, Content-Disposition, Content-Type and line ends around one picture: 162 and its
# number.
PART_BYTES = 256


def cut(
    values: Iterable[T], *, size: Callable[[T], int], most: int, most_bytes: int
) -> Iterator[list[T]]:
    """Yield lists of at most `most` values and `most_bytes`; a larger value goes alone, so that
    the service says what it thinks of it."""
    part: list[T] = []
    part_bytes = 0
    for value in values:
        value_bytes = size(value)
        if part and (len(part) >= most or part_bytes + value_bytes > most_bytes - ENVELOPE_BYTES):
            yield part
            part, part_bytes = [], 0
        part.append(value)
        part_bytes += value_bytes
    if part:
        yield part


def embed_bodies(
    images: "ImagesInput", *, most: int, most_bytes: int
) -> Iterator[tuple[int, str, bytes]]:
    """Yield (how many pictures, media type, body) of each request to embed `images`."""
    if pictures.is_prepared(images):
        for rows in cut(images, size=_row_bytes, most=most, most_bytes=most_bytes):
            yield len(rows), NPY, pictures.npy(rows)
        return
    encoded = (pictures.encode(image) for image in pictures.each(images))
    for part in cut(encoded, size=_part_bytes, most=most, most_bytes=most_bytes):
        media_type, body = multipart(part)
        yield len(part), media_type, body


def multipart(contents: Sequence[bytes]) -> tuple[str, bytes]:
    """Media type and body of multipart/form-data with one part `images` for each content."""
    boundary = uuid.uuid4().hex
    lines: list[bytes] = []
    for index, content in enumerate(contents):
        head = (
            f"--{boundary}\r\n"
            f'Content-Disposition: form-data; name="images"; filename="{index}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        lines += [head.encode(), content, b"\r\n"]
    lines.append(f"--{boundary}--\r\n".encode())
    return f"multipart/form-data; boundary={boundary}", b"".join(lines)


def query_values(kind: str, given: Any) -> Iterator[Any]:
    """The JSON values of a query: base64 of images, rows of vectors, ids."""
    if kind == "images":
        return (pictures.as_base64(pictures.encode(image)) for image in pictures.each(given))
    return iter(ids_of(given) if kind == "ids" else rows_of(given))


def json_bytes(value: Any) -> int:
    """The size of a query's value in a JSON body."""
    return len(value) + 4 if isinstance(value, str) and value.isascii() else len(to_json(value)) + 1


def to_json(value: Any) -> bytes:
    """Compact JSON. NaN and infinity are a ValueError: JSON has none."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def ids_of(ids: str | Iterable[str]) -> Iterable[str]:
    """One id as one, many as they come."""
    for item_id in [ids] if isinstance(ids, str) else ids:
        if not isinstance(item_id, str):
            raise TypeError(f"ids are strings, got {item_id!r}")
        yield item_id


def rows_of(vectors: Any) -> Iterator[list[float]]:
    """Each vector as a list of floats: from an array (n, dim) or (dim,), or from an iterable."""
    rows = iter(vectors)
    first = next(rows, None)
    if first is None:
        return
    if isinstance(first, int | float) or getattr(first, "ndim", None) == 0:  # one vector
        yield [float(value) for value in chain([first], rows)]
        return
    for row in chain([first], rows):
        yield [float(value) for value in row]


def items_to_add(
    *,
    images: "ImagesInput | None",
    vectors: Any,
    ids: str | Iterable[str] | None,
    metadata: Mapping[str, Any] | Iterable[Mapping[str, Any] | None] | None,
    model: str | None,
) -> Iterator[bytes]:
    """Yield one NDJSON line for each item.

    Raises:
        ValueError: not exactly one of images and vectors; ids or metadata of another length; an id
            twice; no id and no file to name the item after.
    """
    if (images is None) == (vectors is None):
        raise ValueError("give exactly one of images and vectors")
    if model is not None and vectors is None:
        raise ValueError("model= says which model made the vectors; the service embeds images")
    values: Iterator[Any] = pictures.each(images) if vectors is None else rows_of(vectors)  # type: ignore[arg-type]
    id_values = None if ids is None else iter(ids_of(ids))
    metadata_values = iter([metadata] if isinstance(metadata, Mapping) else metadata or [])
    seen: set[str] = set()
    count = 0
    for count, value in enumerate(values, start=1):
        item_id = next(id_values, None) if id_values is not None else pictures.file_name(value)
        if item_id is None:
            raise ValueError(
                f"item {count - 1} has no id: "
                + ("there are fewer ids than items" if ids is not None else "give ids=")
            )
        if item_id in seen:
            raise ValueError(f"the id {item_id!r} is there twice: give ids= that differ")
        seen.add(item_id)
        item: dict[str, Any] = {"id": item_id}
        if vectors is None:
            item["image"] = pictures.as_base64(pictures.encode(value))
        else:
            item["vector"] = value
        if model is not None:
            item["model"] = model
        if metadata is not None:
            facts = next(metadata_values, _NOTHING_LEFT)
            if facts is _NOTHING_LEFT:
                raise ValueError(f"there are {count - 1} metadata and more items")
            if facts is not None:
                item["metadata"] = facts
        yield to_json(item) + b"\n"
    left = [
        name
        for name, rest in (("ids", id_values), ("metadata", metadata_values))
        if rest is not None and next(rest, _NOTHING_LEFT) is not _NOTHING_LEFT
    ]
    if left:
        raise ValueError(f"there are more {' and '.join(left)} than the {count} items")


_NOTHING_LEFT: Any = object()


def _part_bytes(content: bytes) -> int:
    return len(content) + PART_BYTES


def _row_bytes(row: Any) -> int:
    return int(row.nbytes)
