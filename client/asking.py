"""Embeddings, neighbours and groups: what is asked of pictures, vectors and ids.

In: what the caller passes. Out: steps that end with a dataclass. What is over the limits, or more
than a part, is asked in several requests and comes back in order.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from client import answers, bodies
from client.answers import fields_of, numpy_is_there, reading
from client.bodies import JSON, NPY, cut, to_json
from client.models import Embeddings, Groups, Json, Neighbours
from client.retry import Request, Route, Steps
from client.routes import (
    EMBED,
    GROUPS,
    NEIGHBOURS,
    Filter,
    Include,
    OnError,
    Order,
    Output,
    json_request,
)
from client.session import Session, counting_from, in_order

if TYPE_CHECKING:
    from client.images import ImagesInput


class Asking(Session):
    """Routes that read what they are given and change nothing."""

    def embed(
        self, images: "ImagesInput", *, output: Output, on_error: OnError
    ) -> Steps[Embeddings]:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        limit = yield from self._limits()
        query = {"output": output} | ({"on_error": "skip"} if on_error == "skip" else {})
        # A .npy body has no place for "this one was rejected".
        accept = NPY if numpy_is_there() and on_error == "raise" else JSON
        done: dict[int, Embeddings] = {}

        def parts() -> Iterator[Callable[[], Steps[None]]]:
            offset = 0
            for count, media_type, body in bodies.embed_bodies(
                images,
                most=self._most(limit("max_images")),
                most_bytes=self._most_bytes(limit("max_body_bytes")),
            ):
                headers = {"Accept": accept, "Content-Type": media_type}
                request = Request(EMBED, EMBED.path, query=query, headers=headers, body=body)
                yield partial(embed, request, offset, count)
                offset += count

        def embed(request: Request, offset: int, count: int) -> Steps[None]:
            with counting_from(offset):
                answer = yield from self._exchange(request)
            with reading(EMBED):
                done[offset] = answers.embeddings(answer, count=count, offset=offset, output=output)

        yield from self._together(parts())
        if not done:
            raise ValueError("got no images to embed")
        with reading(EMBED):
            return answers.joined(in_order(done))

    def neighbours(
        self,
        *,
        images: "ImagesInput | None",
        vectors: Any,
        ids: str | Iterable[str] | None,
        k: int,
        filter: Filter | None,
        exact: bool | None,
        include: Sequence[Include],
        min_gallery_version: int | None,
    ) -> Steps[Neighbours]:
        options: dict[str, Any] = {"k": k}
        if filter is not None:
            options["filter"] = filter
        if exact is not None:
            options["exact"] = exact
        if include:
            options["include"] = list(include)
        limit = yield from self._limits()
        most = limit("max_results") // max(1, k)
        given = {"images": images, "vectors": vectors, "ids": ids}
        parts = yield from self._ask(
            NEIGHBOURS, given, options, most=most, min_gallery_version=min_gallery_version
        )
        with reading(NEIGHBOURS):
            return Neighbours(
                model=str(parts[-1]["model"]),
                gallery_version=int(parts[-1]["gallery_version"]),
                exact=all(part["exact"] for part in parts),
                results=tuple(
                    tuple(answers.neighbour(entry) for entry in row)
                    for part in parts
                    for row in part["results"]
                ),
            )

    def groups(
        self,
        *,
        ids: str | Iterable[str] | None,
        images: "ImagesInput | None",
        vectors: Any,
        k: int,
        steps: int,
        order: Order,
        limit: int,
        min_gallery_version: int | None,
    ) -> Steps[Groups]:
        options = {"k": k, "steps": steps, "order": order, "limit": limit}
        service_limit = yield from self._limits()
        most = service_limit("max_group_walk") // max(1, _walk_length(k, steps))
        given = {"images": images, "vectors": vectors, "ids": ids}
        parts = yield from self._ask(
            GROUPS, given, options, most=most, min_gallery_version=min_gallery_version
        )
        with reading(GROUPS):
            return Groups(
                model=str(parts[-1]["model"]),
                gallery_version=int(parts[-1]["gallery_version"]),
                results=tuple(answers.group(row) for part in parts for row in part["results"]),
            )

    def _ask(
        self,
        route: Route,
        given: Mapping[str, Any],
        options: Json,
        *,
        most: int,
        min_gallery_version: int | None,
    ) -> Steps[list[Json]]:
        """Ask with exactly one kind of query, in as many requests as the limits want.

        Returns:
            the answers in the order of what was asked.
        """
        kinds = [kind for kind, value in given.items() if value is not None]
        if len(kinds) != 1:
            raise ValueError(
                f"give exactly one of images, vectors and ids; got {', '.join(kinds) or 'none'}"
            )
        (kind,) = kinds
        limit = yield from self._limits()
        of_images = kind == "images"
        most = min(most, limit("max_images" if of_images else "max_rows"))
        done: dict[int, Json] = {}

        def parts() -> Iterator[Callable[[], Steps[None]]]:
            offset = 0
            for part in cut(
                bodies.query_values(kind, given[kind]),
                size=bodies.json_bytes,
                most=self._most(most) if of_images else most,
                most_bytes=self._most_bytes(limit("max_body_bytes")) - len(to_json(options)),
            ):
                request = json_request(
                    route, {kind: part, **options}, min_gallery_version=min_gallery_version
                )
                yield partial(ask, request, offset, len(part))
                offset += len(part)

        def ask(request: Request, offset: int, count: int) -> Steps[None]:
            with counting_from(offset):
                answer = yield from self._exchange(request)
            with reading(route):
                fields = fields_of(answer)
                if len(fields["results"]) != count:
                    raise ValueError(f"{len(fields['results'])} results for {count} queries")
            done[offset] = fields

        yield from self._together(parts())
        if not done:
            raise ValueError(f"got no {kind} to ask with")
        return in_order(done)


def _walk_length(k: int, steps: int) -> int:
    """k + k^2 + ... + k^steps: the walks of one anchor, which the service counts."""
    return sum(k**step for step in range(1, steps + 1)) if k > 0 and 0 < steps < 64 else 1
