"""What /neighbours and /groups have in common: a query is images, vectors or ids.

In: a request in any of the forms of the contract. Out: its options and its queries as unit vectors,
with the row of each that is an item of the snapshot.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from starlette.datastructures import QueryParams

from service import bodies
from service.bodies import EncodedImages
from service.errors import Problem
from service.gallery.protocol import Rows, Snapshot, Vectors
from service.gallery.vectors import as_unit, as_unit_rows
from service.runtime import Runtime
from service.schemas.groups import GroupsRequest
from service.schemas.neighbours import NeighboursRequest
from trainer.representation.preprocess import ImageRejected

# So many numbers are brought to unit length sooner than another thread is asked to (0.1 ms).
INLINE_NUMBERS = 16_384
_KNOWN_BYTES = 256  # length of a query string up to which its options are remembered
_SOURCES = ("images", "vectors", "ids")

Options = TypeVar("Options", NeighboursRequest, GroupsRequest)
ACCEPTED = (bodies.JSON, bodies.MULTIPART, bodies.NPY, *bodies.IMAGES)


@dataclass(frozen=True)
class Queries:
    """What was asked for, resolved against one snapshot."""

    snapshot: Snapshot
    vectors: Vectors  # (B, D) unit length
    rows: Rows  # (B,) row of an item, -1 for what came as image or vector

    @property
    def by_id(self) -> bool:
        """Whether the queries are items."""
        return bool(len(self.rows)) and bool(self.rows[0] >= 0)


@dataclass(frozen=True)
class _Source:
    images: EncodedImages | None = None
    vectors: Vectors | None = None
    ids: Sequence[str] | None = None


async def read(
    request: Request, runtime: Runtime, model: type[Options], deadline: float
) -> tuple[Options, Queries]:
    """Read the options and the queries of a request.

    Raises:
        Problem: anything that is wrong with them.
    """
    options, source = await _parse(request, runtime, model)
    vectors = source.vectors
    if source.images is not None:
        vectors = await _embed(runtime, source.images, deadline)
    await runtime.caught_up(request)
    snapshot = runtime.gallery.snapshot()  # after the embedding: the newest state answers
    if source.ids is not None:
        rows, own = await runtime.read(snapshot, _items_of, snapshot, source.ids)
        return options, Queries(snapshot, own, rows)
    assert vectors is not None
    return options, Queries(snapshot, vectors, np.full(len(vectors), -1, np.int64))


async def _parse(
    request: Request, runtime: Runtime, model: type[Options]
) -> tuple[Options, _Source]:
    settings, dim = runtime.settings, runtime.embedder.embedding_dim
    kind = bodies.content_type(request)
    if kind == bodies.JSON:
        body = await request.body()
        return await runtime.compute(_parse_json, body, model, runtime)
    query: bytes = request.scope["query_string"]
    options = (_known_options if len(query) <= _KNOWN_BYTES else _options)(model, query)
    if kind == bodies.NPY:
        array = bodies.parse_npy(await request.body(), "<f4", (None, dim))
        if not len(array):
            raise Problem("invalid_request", "the .npy holds no vector")
        bodies.check_count("vectors", len(array), settings, "max_rows")
        if array.size <= INLINE_NUMBERS:
            return options, _Source(vectors=_unit_rows(array, dim))
        return options, _Source(vectors=await runtime.compute(_unit_rows, array, dim))
    if kind == bodies.MULTIPART:
        async with bodies.read_form(request, settings) as form:
            named = await bodies.form_images(form, settings)
        return options, _Source(images=[image for _, image in named])
    if kind in bodies.IMAGES:
        return options, _Source(images=[await request.body()])
    raise bodies.unsupported(request, ACCEPTED)


def _options(model: type[Options], query: bytes) -> Options:
    names = [name for name in model.model_fields if name not in _SOURCES]
    return bodies.validate(model, bodies.query_options(dict(QueryParams(query)), names))


# Most callers ask for the same again and again; the models are frozen.
_known_options = functools.lru_cache(maxsize=256)(_options)


def _parse_json(body: bytes, model: type[Options], runtime: Runtime) -> tuple[Options, _Source]:
    settings = runtime.settings
    options = bodies.validate(model, bodies.parse_json(body))
    given = [n for n in ("images", "vectors", "ids") if getattr(options, n) is not None]
    if len(given) != 1:
        got = " and ".join(given) if given else "none of them"
        raise Problem("invalid_request", f"wanted exactly one of images, vectors, ids; got {got}")
    if options.images is not None:
        bodies.check_count("images", len(options.images), settings, "max_images")
        return options, _Source(images=[bodies.decode_image_text(t) for t in options.images])
    if options.ids is not None:
        bodies.check_count("ids", len(options.ids), settings, "max_rows")
        return options, _Source(ids=options.ids)
    if not isinstance(options.vectors, list) or not options.vectors:
        raise Problem("invalid_request", "vectors: wanted a list of vectors, at least one")
    bodies.check_count("vectors", len(options.vectors), settings, "max_rows")
    return options, _Source(vectors=_unit_rows(options.vectors, runtime.embedder.embedding_dim))


def _unit_rows(values: Sequence[Any] | Vectors, dim: int) -> Vectors:
    together = as_unit_rows(values, dim)
    if together is not None:
        return together
    rows = []  # one of them is wrong: which?
    for index, value in enumerate(values):
        try:
            rows.append(as_unit(value, dim))
        except ValueError as error:
            raise Problem("invalid_request", f"vectors.{index}: {error}", index=index) from None
    return np.stack(rows)


async def _embed(runtime: Runtime, images: EncodedImages, deadline: float) -> Vectors:
    outcomes = await runtime.images.embed(images, deadline)
    rows = [o for o in outcomes if not isinstance(o, ImageRejected)]
    if len(rows) < len(outcomes):
        raise rejected_images(outcomes)
    return np.stack([embedding for embedding, _ in rows])


def rejected_images(outcomes: Sequence[Any]) -> Problem:
    """The problem of a request in which some image was rejected."""
    errors = rejections(outcomes)
    first = errors[0]
    return Problem(
        "image_rejected",
        f"{len(errors)} of {len(outcomes)} images rejected; image {first['index']}: "
        f"{first['reason']}",
        errors=errors,
    )


def rejections(outcomes: Sequence[Any]) -> list[dict[str, Any]]:
    """[{index, reason}] of the outcomes that are rejections."""
    return [
        {"index": index, "reason": str(outcome)}
        for index, outcome in enumerate(outcomes)
        if isinstance(outcome, ImageRejected)
    ]


def _items_of(snapshot: Snapshot, ids: Sequence[str]) -> tuple[Rows, Vectors]:
    rows = snapshot.rows_of(ids)
    missing = [ids[place] for place in np.flatnonzero(rows < 0).tolist()]
    if missing:
        raise Problem(
            "item_not_found",
            f"{len(missing)} of {len(ids)} ids are not in the gallery, such as {missing[0]!r}",
            ids=missing[:100],
        )
    return rows, snapshot.vectors(rows)
