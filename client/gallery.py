"""The items of the gallery: add, list, look at, delete; and their pictures.

In: what the caller passes. Out: steps that end with a dataclass.
"""

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from client import answers, bodies
from client.answers import fields_of, reading
from client.bodies import NDJSON, cut, to_json
from client.errors import InvpropError
from client.models import Added, Deleted, Item, Json
from client.retry import IDEMPOTENCY_KEY, Request, Steps
from client.routes import (
    ADD,
    DELETE,
    DELETE_MANY,
    GET,
    IMAGE,
    LIST,
    Filter,
    at_least,
    item_path,
    json_request,
)
from client.session import Session, in_order

if TYPE_CHECKING:
    from client.images import ImagesInput


class Page(NamedTuple):
    """One page of items, and where the next one begins (None: it was the last)."""

    items: tuple[Item, ...]
    next: str | None


class Gallery(Session):
    """Routes of single items and of many."""

    def add(
        self,
        *,
        images: "ImagesInput | None",
        vectors: Any,
        ids: str | Iterable[str] | None,
        metadata: Json | Iterable[Json | None] | None,
        model: str | None,
    ) -> Steps[Added]:
        limit = yield from self._limits()
        lines = bodies.items_to_add(
            images=images, vectors=vectors, ids=ids, metadata=metadata, model=model
        )
        done: dict[int, Added] = {}
        counts: dict[int, int] = {}

        def parts() -> Iterator[Callable[[], Steps[None]]]:
            offset = 0
            for part in cut(
                lines,
                size=len,
                most=self._most(limit("max_images")) if vectors is None else limit("max_rows"),
                most_bytes=self._most_bytes(limit("max_body_bytes")),
            ):
                yield partial(add, new_items(part, uuid.uuid4().hex), offset, len(part))
                offset += len(part)

        def add(request: Request, offset: int, count: int) -> Steps[None]:
            answer = yield from self._exchange(request)
            with reading(ADD):
                done[offset] = answers.added(answer, offset=offset)
            counts[offset] = count

        try:
            yield from self._together(parts())
        except (InvpropError, OSError, TypeError, ValueError) as error:
            if done:
                error.add_note(
                    f"{sum(counts.values())} items of this add() were answered before that; it "
                    "may be repeated as it is"
                )
            raise
        if not done:
            raise ValueError("got no items to add")
        return answers.added_together(in_order(done))

    def page(
        self,
        *,
        filter: Filter | None,
        include_vectors: bool,
        page_size: int | None,
        cursor: str | None,
        min_gallery_version: int | None,
    ) -> Steps[Page]:
        query: dict[str, str] = {"include": "vector"} if include_vectors else {}
        if page_size is not None:
            query["limit"] = str(page_size)
        if filter is not None:
            query["filter"] = to_json(filter).decode()
        if cursor is not None:
            query["cursor"] = cursor
        answer = yield from self._exchange(
            Request(LIST, LIST.path, query=query, headers=at_least(min_gallery_version))
        )
        with reading(LIST):
            fields = fields_of(answer)
            return Page(tuple(answers.item(item) for item in fields["items"]), fields["next"])

    def item(
        self, item_id: str, *, include_vector: bool, min_gallery_version: int | None
    ) -> Steps[Item]:
        query = {"include": "vector"} if include_vector else {}
        headers = at_least(min_gallery_version)
        answer = yield from self._exchange(
            Request(GET, item_path(GET, item_id), query=query, headers=headers)
        )
        with reading(GET):
            return answers.item(fields_of(answer))

    def image(self, item_id: str, *, min_gallery_version: int | None) -> Steps[bytes]:
        headers = at_least(min_gallery_version)
        answer = yield from self._exchange(
            Request(IMAGE, item_path(IMAGE, item_id), headers=headers)
        )
        with reading(IMAGE):
            kind = answer.headers.get("content-type", "")
            if not kind.startswith("image/"):
                raise ValueError(f"got {kind or 'no content type'}, wanted an image")
        return answer.body

    def delete(self, item_id: str) -> Steps[Deleted]:
        answer = yield from self._exchange(Request(DELETE, item_path(DELETE, item_id)))
        with reading(DELETE):
            return answers.deleted(answer)

    def delete_items(self, ids: Iterable[str]) -> Steps[Deleted]:
        limit = yield from self._limits()
        done: list[Deleted] = []
        for part in cut(
            bodies.ids_of(ids),
            size=bodies.json_bytes,
            most=limit("max_rows"),
            most_bytes=limit("max_body_bytes"),
        ):
            answer = yield from self._exchange(json_request(DELETE_MANY, {"ids": part}))
            with reading(DELETE_MANY):
                done.append(answers.deleted(answer))
        if not done:
            raise ValueError("got no ids to delete")
        return Deleted(
            model=done[-1].model,
            gallery_version=done[-1].gallery_version,
            deleted=sum(part.deleted for part in done),
            missing=tuple(missing for part in done for missing in part.missing),
        )


def new_items(lines: Sequence[bytes], idempotency_key: str) -> Request:
    """The request that adds the items of these NDJSON lines."""
    headers = {"Content-Type": NDJSON, IDEMPOTENCY_KEY: idempotency_key}
    return Request(ADD, ADD.path, headers=headers, body=b"".join(lines))
