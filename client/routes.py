"""The one description of the service's routes, shared by Client and AsyncClient.

In: what the caller passes. Out: steps that yield requests (and waits) and end with a dataclass.
What is asked and how the answer is read is said here; the clients only send.
"""

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias
from urllib.parse import quote

from client import answers, bodies
from client.answers import fields_of, numpy_is_there, reading
from client.bodies import JSON, NDJSON, NPY, cut, to_json
from client.errors import ConnectionFailed, InvpropError, ServiceError, problem
from client.models import (
    Added,
    Deleted,
    Embeddings,
    Grouping,
    GroupingMember,
    Groups,
    Info,
    Item,
    Json,
    ListedGroup,
    Map,
    Neighbours,
    PendingMap,
    Readiness,
)
from client.retry import (
    IDEMPOTENCY_KEY,
    Answer,
    Attempt,
    Request,
    RetryPolicy,
    Route,
    Steps,
    exchange,
)

if TYPE_CHECKING:
    from client.images import ImagesInput

LIVE = Route("GET", "/livez")
READY = Route("GET", "/readyz")
INFO = Route("GET", "/info")
EMBED = Route("POST", "/embed")
ADD = Route("POST", "/items", repeatable=False)
LIST = Route("GET", "/items")
GET = Route("GET", "/items/{item_id}")
DELETE = Route("DELETE", "/items/{item_id}")
DELETE_MANY = Route("POST", "/items/delete")
NEIGHBOURS = Route("POST", "/neighbours")
GROUPS = Route("POST", "/groups")
MAP = Route("GET", "/map")
START_GROUPING = Route("POST", "/groupings")
GROUPINGS = Route("GET", "/groupings")
GROUPING = Route("GET", "/groupings/{grouping}")
GROUPING_GROUPS = Route("GET", "/groupings/{grouping}/groups")
GROUPING_MEMBERS = Route("GET", "/groupings/{grouping}/groups/{group}")
ROUTES = (
    LIVE,
    READY,
    INFO,
    EMBED,
    ADD,
    LIST,
    GET,
    DELETE,
    DELETE_MANY,
    NEIGHBOURS,
    GROUPS,
    MAP,
    START_GROUPING,
    GROUPINGS,
    GROUPING,
    GROUPING_GROUPS,
    GROUPING_MEMBERS,
)

Output: TypeAlias = Literal["embedding", "features"]
OnError: TypeAlias = Literal["raise", "skip"]
Include: TypeAlias = Literal["metadata", "vector"]
Order: TypeAlias = Literal["nearest", "hardest", "step"]
Filter: TypeAlias = Mapping[str, Any]


class Page(NamedTuple):
    """One page of items, and where the next one begins (None: it was the last)."""

    items: tuple[Item, ...]
    next: str | None


class Calls:
    """One method per route. Holds the retry policy, and the service's facts once they are known.

    The methods return steps, see client.retry: nothing happens until a client runs them.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._info: Info | None = None

    def live(self) -> Steps[bool]:
        try:
            answer = yield from self._probe(LIVE)
        except ConnectionFailed:
            return False
        return answer.status < 300

    def ready(self) -> Steps[Readiness]:
        try:
            answer = yield from self._probe(READY)
        except ConnectionFailed as error:
            return Readiness("unreachable", {"connection": str(error)})
        if answer.status >= 400 and answer.status != 503:
            raise problem(answer.status, answer.headers, answer.body, now=self._policy.clock.now())
        with reading(READY):
            return answers.readiness(answer)

    def info(self) -> Steps[Info]:
        answer = yield from self._exchange(Request(INFO, INFO.path))
        with reading(INFO):
            self._info = answers.info(fields_of(answer))
        return self._info

    def embed(
        self, images: "ImagesInput", *, output: Output, on_error: OnError
    ) -> Steps[Embeddings]:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        limit = yield from self._limits()
        query = {"output": output} | ({"on_error": "skip"} if on_error == "skip" else {})
        # A .npy body has no place for "this one was rejected".
        accept = NPY if numpy_is_there() and on_error == "raise" else JSON
        parts: list[Embeddings] = []
        offset = 0
        for count, media_type, body in bodies.embed_bodies(
            images, most=limit("max_images"), most_bytes=limit("max_body_bytes")
        ):
            headers = {"Accept": accept, "Content-Type": media_type}
            request = Request(EMBED, EMBED.path, query=query, headers=headers, body=body)
            with _counting_from(offset):
                answer = yield from self._exchange(request)
            with reading(EMBED):
                parts.append(answers.embeddings(answer, count=count, offset=offset, output=output))
            offset += count
        if not parts:
            raise ValueError("got no images to embed")
        with reading(EMBED):
            return answers.joined(parts)

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
        most = limit("max_images" if vectors is None else "max_rows")
        done: list[Added] = []
        sent = 0
        try:
            for part in cut(lines, size=len, most=most, most_bytes=limit("max_body_bytes")):
                headers = {"Content-Type": NDJSON, IDEMPOTENCY_KEY: uuid.uuid4().hex}
                request = Request(ADD, ADD.path, headers=headers, body=b"".join(part))
                answer = yield from self._exchange(request)
                with reading(ADD):
                    done.append(answers.added(answer, offset=sent))
                sent += len(part)
        except (InvpropError, OSError, TypeError, ValueError) as error:
            if done:
                error.add_note(f"the first {sent} items of this add() were answered before that")
            raise
        if not done:
            raise ValueError("got no items to add")
        return Added(
            model=done[-1].model,
            gallery_version=done[-1].gallery_version,
            added=sum(part.added for part in done),
            updated=sum(part.updated for part in done),
            rejected=tuple(rejected for part in done for rejected in part.rejected),
        )

    def page(
        self, *, filter: Filter | None, page_size: int | None, cursor: str | None
    ) -> Steps[Page]:
        query: dict[str, str] = {}
        if page_size is not None:
            query["limit"] = str(page_size)
        if filter is not None:
            query["filter"] = to_json(filter).decode()
        if cursor is not None:
            query["cursor"] = cursor
        answer = yield from self._exchange(Request(LIST, LIST.path, query=query))
        with reading(LIST):
            fields = fields_of(answer)
            return Page(tuple(answers.item(item) for item in fields["items"]), fields["next"])

    def item(self, item_id: str, *, include_vector: bool) -> Steps[Item]:
        query = {"include": "vector"} if include_vector else {}
        answer = yield from self._exchange(Request(GET, _item_path(item_id), query=query))
        with reading(GET):
            return answers.item(fields_of(answer))

    def delete(self, item_id: str) -> Steps[Deleted]:
        answer = yield from self._exchange(Request(DELETE, _item_path(item_id)))
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
            answer = yield from self._exchange(_json_request(DELETE_MANY, {"ids": part}))
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
        parts = yield from self._ask(NEIGHBOURS, images, vectors, ids, options, most=most)
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
    ) -> Steps[Groups]:
        options = {"k": k, "steps": steps, "order": order, "limit": limit}
        service_limit = yield from self._limits()
        most = service_limit("max_group_walk") // max(1, _walk_length(k, steps))
        parts = yield from self._ask(GROUPS, images, vectors, ids, options, most=most)
        with reading(GROUPS):
            return Groups(
                model=str(parts[-1]["model"]),
                gallery_version=int(parts[-1]["gallery_version"]),
                results=tuple(answers.group(row) for part in parts for row in part["results"]),
            )

    def start_grouping(self, *, k: int, steps: int, min_size: int) -> Steps[Grouping]:
        options = {"k": k, "steps": steps, "min_size": min_size}
        answer = yield from self._exchange(_json_request(START_GROUPING, options))
        with reading(START_GROUPING):
            return answers.grouping(fields_of(answer))

    def groupings(self) -> Steps[tuple[Grouping, ...]]:
        answer = yield from self._exchange(Request(GROUPINGS, GROUPINGS.path))
        with reading(GROUPINGS):
            return tuple(answers.grouping(entry) for entry in fields_of(answer)["items"])

    def grouping(self, grouping_id: str) -> Steps[Grouping]:
        path = _path(GROUPING, grouping=grouping_id)
        answer = yield from self._exchange(Request(GROUPING, path))
        with reading(GROUPING):
            return answers.grouping(fields_of(answer))

    def grouping_groups(
        self, grouping_id: str, *, cursor: str | None
    ) -> Steps[tuple[tuple[ListedGroup, ...], str | None]]:
        path = _path(GROUPING_GROUPS, grouping=grouping_id)
        query = {} if cursor is None else {"cursor": cursor}
        answer = yield from self._exchange(Request(GROUPING_GROUPS, path, query=query))
        with reading(GROUPING_GROUPS):
            fields = fields_of(answer)
            return tuple(answers.listed_group(entry) for entry in fields["items"]), fields["next"]

    def grouping_members(
        self, grouping_id: str, group: int, *, cursor: str | None
    ) -> Steps[tuple[tuple[GroupingMember, ...], str | None]]:
        path = _path(GROUPING_MEMBERS, grouping=grouping_id, group=str(group))
        query = {} if cursor is None else {"cursor": cursor}
        answer = yield from self._exchange(Request(GROUPING_MEMBERS, path, query=query))
        with reading(GROUPING_MEMBERS):
            fields = fields_of(answer)
            members = tuple(answers.grouping_member(entry) for entry in fields["items"])
            return members, fields["next"]

    def map(
        self, *, method: str, sample: int | None, version: int | None
    ) -> Steps[Map | PendingMap]:
        query = {"method": method}
        query |= {} if sample is None else {"sample": str(sample)}
        query |= {} if version is None else {"version": str(version)}
        answer = yield from self._exchange(Request(MAP, MAP.path, query=query))
        with reading(MAP):
            return answers.map_or_pending(answer)

    def _ask(
        self, route: Route, images: Any, vectors: Any, ids: Any, options: Json, *, most: int
    ) -> Steps[list[Json]]:
        """Ask with exactly one kind of query, in as many requests as the limits want."""
        given = {"images": images, "vectors": vectors, "ids": ids}
        kinds = [kind for kind, value in given.items() if value is not None]
        if len(kinds) != 1:
            raise ValueError(
                f"give exactly one of images, vectors and ids; got {', '.join(kinds) or 'none'}"
            )
        (kind,) = kinds
        limit = yield from self._limits()
        parts: list[Json] = []
        offset = 0
        for part in cut(
            bodies.query_values(kind, given[kind]),
            size=bodies.json_bytes,
            most=min(most, limit("max_images" if kind == "images" else "max_rows")),
            most_bytes=limit("max_body_bytes") - len(to_json(options)),
        ):
            with _counting_from(offset):
                answer = yield from self._exchange(_json_request(route, {kind: part, **options}))
            with reading(route):
                fields = fields_of(answer)
                if len(fields["results"]) != len(part):
                    raise ValueError(f"{len(fields['results'])} results for {len(part)} queries")
            parts.append(fields)
            offset += len(part)
        if not parts:
            raise ValueError(f"got no {kind} to ask with")
        return parts

    def _limits(self) -> Steps["_LimitOf"]:
        info = self._info or (yield from self.info())
        return _LimitOf(info)

    def _probe(self, route: Route) -> Steps[Answer]:
        """Ask once: "not ready" is an answer here, not a reason to ask again."""
        answer = yield Attempt(Request(route, route.path), self._policy.timeout_s)
        assert answer is not None  # an Attempt is answered or thrown at
        return answer

    def _exchange(self, request: Request) -> Steps[Answer]:
        return exchange(request, self._policy)


class _LimitOf(NamedTuple):
    """The service's limits by name."""

    info: Info

    def __call__(self, name: str) -> int:
        with reading(INFO):
            return int(self.info.limits[name].limit)


@contextmanager
def _counting_from(offset: int) -> Iterator[None]:
    """Let the problems of one part count the pictures as the caller counts them."""
    try:
        yield
    except ServiceError as error:
        raise error.shifted(offset) from None


def _json_request(route: Route, value: Json) -> Request:
    headers = {"Content-Type": JSON, "Accept": JSON}
    return Request(route, route.path, headers=headers, body=to_json(value))


def _item_path(item_id: str) -> str:
    if not item_id:
        raise ValueError("an id has at least one character")
    # "." and ".." would be taken out of the URL on its way.
    name = item_id.replace(".", "%2E") if item_id in (".", "..") else quote(item_id, safe="")
    return GET.path.replace("{item_id}", name)


def _path(route: Route, **names: str) -> str:
    path = route.path
    for name, value in names.items():
        path = path.replace("{" + name + "}", quote(value, safe=""))
    return path


def _walk_length(k: int, steps: int) -> int:
    """k + k^2 + ... + k^steps: the walks of one anchor, which the service counts."""
    return sum(k**step for step in range(1, steps + 1)) if k > 0 and 0 < steps < 64 else 1
