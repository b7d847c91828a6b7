"""What POST /items is given: items with an image or a vector each, checked one by one.

In: multipart parts or NDJSON lines. Out: drafts in order, and for everything that cannot become an
item the reason, so that one bad line does not cost the others.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from pydantic import ValidationError

from service import bodies
from service.errors import Problem, validation_problem
from service.gallery.protocol import Vectors
from service.gallery.vectors import as_unit
from service.schemas.items import ItemLine
from service.settings import Settings
from trainer.representation.bundle import MAX_ID_LENGTH
from trainer.representation.preprocess import ImageRejected

MAX_METADATA_DEPTH = 32  # orjson writes 254 levels, and answers wrap metadata in some of their own


@dataclass(frozen=True)
class Draft:
    """An item whose image, where it has one, is not embedded yet."""

    id: str
    content: bytes | Vectors  # encoded image, or (D,) unit length
    metadata: Mapping[str, Any]
    line: int | None


@dataclass
class Upload:
    """What one request wants to store."""

    drafts: list[Draft] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    _ids: set[str] = field(default_factory=set)

    def add(self, draft: Draft) -> None:
        """Take a draft, unless its id stood in this request before."""
        if "\0" in draft.id:
            self.reject(draft.id, "the id holds a NUL character, which is not kept", draft.line)
        elif draft.id in self._ids:
            self.reject(
                draft.id, "the id stands in this request twice; the first one counts", draft.line
            )
        else:
            self._ids.add(draft.id)
            self.drafts.append(draft)

    def reject(self, item_id: str | None, reason: str, line: int | None = None) -> None:
        """Note what cannot become an item."""
        entry = {"id": item_id, "reason": reason}
        self.rejected.append(entry if line is None else {**entry, "line": line})

    def digest(self) -> str:
        """The same for the same content, however it was packed into a body."""
        digest = hashlib.sha256()
        for draft in self.drafts:
            is_image = isinstance(draft.content, bytes)
            content = draft.content if isinstance(draft.content, bytes) else draft.content.tobytes()
            head = [draft.id, is_image, len(content), draft.metadata]
            digest.update(orjson.dumps(head, option=orjson.OPT_SORT_KEYS))
            digest.update(content)
        digest.update(orjson.dumps(self.rejected))
        return digest.hexdigest()


def from_form(
    named: Sequence[tuple[str, bytes]], metadata: bytes | None, settings: Settings
) -> Upload:
    """Multipart: ids are the file names, `metadata` a JSON list aligned with the images."""
    listed: Any = [{}] * len(named)
    if metadata is not None:
        if (number := _inexact(metadata)) is not None:
            raise Problem(
                "invalid_request",
                f"metadata: the number {number} has more than 64 bits and would not be kept as it "
                "is; send it as a string",
            )
        listed = bodies.parse_json(metadata, "the part metadata")
        if not isinstance(listed, list) or len(listed) != len(named):
            got = f"{len(listed)} entries" if isinstance(listed, list) else "no list"
            raise Problem(
                "invalid_request",
                f"metadata: wanted a JSON list of {len(named)} objects, one for each image; "
                f"got {got}",
            )
    upload = Upload()
    for (name, content), entry in zip(named, listed, strict=True):
        if not 1 <= len(name) <= MAX_ID_LENGTH:
            upload.reject(
                name[:MAX_ID_LENGTH] or None,
                f"the file name is the id: wanted 1..{MAX_ID_LENGTH} characters, got {len(name)}",
            )
        elif not isinstance(entry, dict):
            upload.reject(name, "its metadata is no JSON object")
        elif (reason := _too_much(entry, settings)) is not None:
            upload.reject(name, reason)
        else:
            upload.add(Draft(name, content, entry, None))
    return upload


def from_ndjson(body: bytes, settings: Settings, *, model_id: str, dim: int) -> Upload:
    """NDJSON: one item a line; empty lines are skipped.

    Raises:
        Problem: too many lines or images; a vector of another model (model_mismatch).
    """
    lines = [(n, line) for n, line in enumerate(body.split(b"\n"), 1) if line.strip()]
    bodies.check_count("lines", len(lines), settings, "max_rows")
    if not lines:
        raise Problem("invalid_request", "the body holds no line; wanted one JSON object a line")
    upload = Upload()
    for number, line in lines:
        _read_line(upload, number, line, settings, model_id, dim)
    images = sum(isinstance(draft.content, bytes) for draft in upload.drafts)
    bodies.check_count("images", images, settings, "max_images")
    return upload


def _read_line(
    upload: Upload, number: int, line: bytes, settings: Settings, model_id: str, dim: int
) -> None:
    if len(line) > settings.max_line_bytes:
        limit = f"{settings.max_line_bytes:,} (max_line_bytes)"
        upload.reject(None, f"the line has {len(line):,} bytes, at most {limit} are read", number)
        return
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        upload.reject(None, f"the line is no JSON: {error}", number)
        return
    item_id = values.get("id") if isinstance(values, dict) else None
    known_id = item_id if isinstance(item_id, str) and len(item_id) <= MAX_ID_LENGTH else None
    if (number_text := _inexact(line)) is not None:
        upload.reject(
            known_id,
            f"the number {number_text} has more than 64 bits and would not be kept as it is; send "
            "it as a string",
            number,
        )
        return
    try:
        item = ItemLine.model_validate(values)
    except ValidationError as error:
        upload.reject(known_id, validation_problem(error.errors()).detail, number)
        return
    if item.model is not None and item.model != model_id:
        raise Problem(
            "model_mismatch",
            f"line {number} comes from model {item.model!r}, this service runs {model_id!r}; "
            "embed the image with this service. Nothing of the request was stored",
            line=number,
            model=model_id,
        )
    content: bytes | Vectors | ImageRejected
    reason = _too_much(item.metadata, settings)
    if (item.image is None) == (item.vector is None):
        reason = "wanted exactly one of image and vector"
    if reason is not None:
        upload.reject(item.id, reason, number)
        return
    try:
        if item.image is None:
            content = as_unit(item.vector, dim)
        else:
            content = bodies.decode_image_text(item.image)
    except ValueError as error:
        upload.reject(item.id, str(error), number)
        return
    if isinstance(content, ImageRejected):
        upload.reject(item.id, str(content), number)
        return
    upload.add(Draft(item.id, content, item.metadata, number))


# Such a run of digits can stand in a string or behind a decimal point too: _inexact looks closely.
_MANY_DIGITS = re.compile(rb"[0-9]{19}")


def _inexact(text: bytes) -> str | None:
    """An integer of a JSON text that orjson reads as a float, None where there is none."""
    if _MANY_DIGITS.search(text) is None:
        return None
    found: list[str] = []

    def look(digits: str) -> int:
        if not -(2**63) <= int(digits) < 2**64:
            found.append(digits[:40])
        return 0

    json.loads(text, parse_int=look)
    return found[0] if found else None


def _too_much(metadata: Mapping[str, Any], settings: Settings) -> str | None:
    if _deeper_than(metadata, MAX_METADATA_DEPTH):
        return f"its metadata are nested deeper than {MAX_METADATA_DEPTH} levels"
    size = len(orjson.dumps(metadata))
    if size <= settings.max_metadata_bytes:
        return None
    return (
        f"its metadata take {size:,} bytes as JSON, at most {settings.max_metadata_bytes:,} "
        "(max_metadata_bytes) are kept"
    )


def _deeper_than(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested deeper; level by level, so that depth costs no stack."""
    level = [value]
    for _ in range(levels):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
            if isinstance(inner, Mapping | list)
        ]
        if not level:
            return False
    return True
