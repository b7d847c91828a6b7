"""Client and AsyncClient: the methods a caller sees. What they send and how they read the answer is
in client.routes; here is only the running of it, blocking or not.
"""

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

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
from client.retry import SYSTEM_CLOCK, Clock, RetryPolicy
from client.routes import Calls, Filter, Include, OnError, Order, Output
from client.transport import AsyncConnection, AsyncTransport, Connection, Transport

if TYPE_CHECKING:
    from client.images import ImagesInput


class Client:
    """A service at `base_url`, blocking. Use it as a context manager, from one or more threads.

    Args:
        base_url: such as http://127.0.0.1:8000; a path in it is a prefix of every route.
        api_key: sent as a bearer token.
        timeout_s: the longest silence of one attempt: connecting, or between two pieces of data.
        max_retries: how often a request is sent again after a lost connection or the statuses 429,
            502, 503 and 504, waiting as long as Retry-After says plus a random time that doubles.
            All attempts and waits of one request together take at most timeout_s * (max_retries +
            1), 2 minutes by default. What writes carries an Idempotency-Key, so that a repetition
            changes nothing.
        transport: another way to send, for tests: an httpx2 transport.
        clock: time and dice, for tests.

    Pictures may be paths, bytes, open binary files, PIL images or uint8 arrays (H, W) or (H, W, 3),
    one or an iterable of them. What is larger than the service's limits (see `info`) is sent in
    parts and comes back in order. Errors: client.errors.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        max_retries: int = 3,
        transport: Transport | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._calls = Calls(RetryPolicy(timeout_s, max_retries, clock))
        self._connection = Connection(base_url, _headers(api_key), transport, clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    def live(self) -> bool:
        """Whether the process answers."""
        return self._connection.run(self._calls.live())

    def ready(self) -> Readiness:
        """Whether model and gallery are loaded; asks once, and no answer is "not ready" too."""
        return self._connection.run(self._calls.ready())

    def info(self) -> Info:
        """The model, the limits, and what else the service says of itself."""
        return self._connection.run(self._calls.info())

    def embed(
        self, images: "ImagesInput", *, output: Output = "embedding", on_error: OnError = "raise"
    ) -> Embeddings:
        """Embed pictures.

        Args:
            images: also an array uint8 (n, S, S, 3): pictures already prepared to the model's
                input contract, which are taken as they are.
            output: "embedding": (n, D) of unit length; "features": (n, F) of the backbone.
            on_error: "raise" ImageRejected when a picture cannot be decoded, or "skip" it: its row
                is NaN (None without numpy) and `errors` says why.
        """
        return self._connection.run(self._calls.embed(images, output=output, on_error=on_error))

    def add(
        self,
        images: "ImagesInput | None" = None,
        *,
        vectors: Any = None,
        ids: str | Iterable[str] | None = None,
        metadata: Json | Iterable[Json | None] | None = None,
        model: str | None = None,
    ) -> Added:
        """Add items to the gallery, or replace those of the same id.

        Args:
            images: pictures; iterables are read as they are sent.
            vectors: instead of images, (n, D) rows of the model's embedding.
            ids: one for each, 1..512 characters; without it pictures from files are named after
                their files.
            metadata: one JSON object (or None) for each.
            model: the model_id that made the vectors; another than the service's is ModelMismatch.

        What was answered survives a crash of the service. A call that fails half-way may be
        repeated as it is.
        """
        return self._connection.run(
            self._calls.add(images=images, vectors=vectors, ids=ids, metadata=metadata, model=model)
        )

    def items(
        self, *, filter: Filter | None = None, page_size: int | None = None
    ) -> Iterator[Item]:
        """Iterate over the gallery, a page at a time.

        Args:
            filter: {"field": value or [values]} of the metadata.
            page_size: items per request; None leaves it to the service.
        """
        cursor: str | None = None
        while True:
            page = self._connection.run(
                self._calls.page(filter=filter, page_size=page_size, cursor=cursor)
            )
            yield from page.items
            if page.next is None:
                return
            cursor = page.next

    def item(self, id: str, *, include_vector: bool = False) -> Item:
        """One item; ItemNotFound when there is none."""
        return self._connection.run(self._calls.item(id, include_vector=include_vector))

    def delete(self, id: str) -> Deleted:
        """Delete one item. ItemNotFound when there is none (any more: a retry may find that the
        first attempt, whose answer was lost, had done it)."""
        return self._connection.run(self._calls.delete(id))

    def delete_items(self, ids: Iterable[str]) -> Deleted:
        """Delete items; `missing` names those that were not there."""
        return self._connection.run(self._calls.delete_items(ids))

    def neighbours(
        self,
        *,
        images: "ImagesInput | None" = None,
        vectors: Any = None,
        ids: str | Iterable[str] | None = None,
        k: int = 10,
        filter: Filter | None = None,
        exact: bool | None = None,
        include: Sequence[Include] = (),
    ) -> Neighbours:
        """The k items most similar to each query: exactly one of images, vectors (n, D) and ids.

        Args:
            k: 1..1000; fewer come back where the gallery holds fewer.
            filter: {"field": value or [values]} of the metadata.
            exact: None leaves the choice to the service; the answer says which it was.
            include: "metadata" and "vector" of each neighbour.

        A query by id leaves that item out.
        """
        return self._connection.run(
            self._calls.neighbours(
                images=images,
                vectors=vectors,
                ids=ids,
                k=k,
                filter=filter,
                exact=exact,
                include=include,
            )
        )

    def groups(
        self,
        *,
        ids: str | Iterable[str] | None = None,
        images: "ImagesInput | None" = None,
        vectors: Any = None,
        k: int = 4,
        steps: int = 3,
        order: Order = "nearest",
        limit: int = 200,
    ) -> Groups:
        """What propagation along the kNN graph reaches from each anchor in 1..steps hops.

        Args:
            ids, images, vectors: exactly one of them, the anchors.
            order: "nearest" or "hardest" (least similar) first, or by "step" of discovery.
            limit: members listed per anchor.
        """
        return self._connection.run(
            self._calls.groups(
                ids=ids, images=images, vectors=vectors, k=k, steps=steps, order=order, limit=limit
            )
        )

    def start_grouping(self, *, k: int = 4, steps: int = 3, min_size: int = 3) -> Grouping:
        """Have the whole gallery partitioned into groups, in the background; the same parameters
        at the same gallery version are the same grouping. Ask grouping(id) for its state."""
        return self._connection.run(self._calls.start_grouping(k=k, steps=steps, min_size=min_size))

    def groupings(self) -> tuple[Grouping, ...]:
        """The groupings that are kept or under way, the newest first."""
        return self._connection.run(self._calls.groupings())

    def grouping(self, id: str) -> Grouping:
        """One grouping with its sizes; GroupingNotFound when there is none."""
        return self._connection.run(self._calls.grouping(id))

    def grouping_groups(self, id: str) -> Iterator[ListedGroup]:
        """Iterate over the groups of a grouping, the largest first, a page at a time."""
        cursor: str | None = None
        while True:
            page, cursor = self._connection.run(self._calls.grouping_groups(id, cursor=cursor))
            yield from page
            if cursor is None:
                return

    def grouping_members(self, id: str, group: int) -> Iterator[GroupingMember]:
        """Iterate over the members of a group: the representative, then by closeness to it."""
        cursor: str | None = None
        while True:
            page, cursor = self._connection.run(
                self._calls.grouping_members(id, group, cursor=cursor)
            )
            yield from page
            if cursor is None:
                return

    def map(
        self,
        method: Literal["pca", "umap"] = "pca",
        *,
        sample: int | None = None,
        version: int | None = None,
    ) -> Map | PendingMap:
        """Two coordinates for each item of a sample. "umap" is computed in the background: while
        it is, a PendingMap comes, whose gallery_version is the `version` to ask for again."""
        return self._connection.run(self._calls.map(method=method, sample=sample, version=version))


class AsyncClient:
    """The same as Client for asyncio: methods are awaited, `items` is for `async for`.

    Pictures are read and encoded in a thread, so that the event loop stays free.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        max_retries: int = 3,
        transport: AsyncTransport | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._calls = Calls(RetryPolicy(timeout_s, max_retries, clock))
        self._connection = AsyncConnection(base_url, _headers(api_key), transport, clock)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """See Client.close."""
        await self._connection.close()

    async def live(self) -> bool:
        """See Client.live."""
        return await self._connection.run(self._calls.live())

    async def ready(self) -> Readiness:
        """See Client.ready."""
        return await self._connection.run(self._calls.ready())

    async def info(self) -> Info:
        """See Client.info."""
        return await self._connection.run(self._calls.info())

    async def embed(
        self, images: "ImagesInput", *, output: Output = "embedding", on_error: OnError = "raise"
    ) -> Embeddings:
        """See Client.embed."""
        return await self._connection.run(
            self._calls.embed(images, output=output, on_error=on_error)
        )

    async def add(
        self,
        images: "ImagesInput | None" = None,
        *,
        vectors: Any = None,
        ids: str | Iterable[str] | None = None,
        metadata: Json | Iterable[Json | None] | None = None,
        model: str | None = None,
    ) -> Added:
        """See Client.add."""
        return await self._connection.run(
            self._calls.add(images=images, vectors=vectors, ids=ids, metadata=metadata, model=model)
        )

    async def items(
        self, *, filter: Filter | None = None, page_size: int | None = None
    ) -> AsyncIterator[Item]:
        """See Client.items."""
        cursor: str | None = None
        while True:
            page = await self._connection.run(
                self._calls.page(filter=filter, page_size=page_size, cursor=cursor)
            )
            for item in page.items:
                yield item
            if page.next is None:
                return
            cursor = page.next

    async def item(self, id: str, *, include_vector: bool = False) -> Item:
        """See Client.item."""
        return await self._connection.run(self._calls.item(id, include_vector=include_vector))

    async def delete(self, id: str) -> Deleted:
        """See Client.delete."""
        return await self._connection.run(self._calls.delete(id))

    async def delete_items(self, ids: Iterable[str]) -> Deleted:
        """See Client.delete_items."""
        return await self._connection.run(self._calls.delete_items(ids))

    async def neighbours(
        self,
        *,
        images: "ImagesInput | None" = None,
        vectors: Any = None,
        ids: str | Iterable[str] | None = None,
        k: int = 10,
        filter: Filter | None = None,
        exact: bool | None = None,
        include: Sequence[Include] = (),
    ) -> Neighbours:
        """See Client.neighbours."""
        return await self._connection.run(
            self._calls.neighbours(
                images=images,
                vectors=vectors,
                ids=ids,
                k=k,
                filter=filter,
                exact=exact,
                include=include,
            )
        )

    async def groups(
        self,
        *,
        ids: str | Iterable[str] | None = None,
        images: "ImagesInput | None" = None,
        vectors: Any = None,
        k: int = 4,
        steps: int = 3,
        order: Order = "nearest",
        limit: int = 200,
    ) -> Groups:
        """See Client.groups."""
        return await self._connection.run(
            self._calls.groups(
                ids=ids, images=images, vectors=vectors, k=k, steps=steps, order=order, limit=limit
            )
        )

    async def start_grouping(self, *, k: int = 4, steps: int = 3, min_size: int = 3) -> Grouping:
        """See Client.start_grouping."""
        return await self._connection.run(
            self._calls.start_grouping(k=k, steps=steps, min_size=min_size)
        )

    async def groupings(self) -> tuple[Grouping, ...]:
        """See Client.groupings."""
        return await self._connection.run(self._calls.groupings())

    async def grouping(self, id: str) -> Grouping:
        """See Client.grouping."""
        return await self._connection.run(self._calls.grouping(id))

    async def grouping_groups(self, id: str) -> AsyncIterator[ListedGroup]:
        """See Client.grouping_groups."""
        cursor: str | None = None
        while True:
            page, cursor = await self._connection.run(
                self._calls.grouping_groups(id, cursor=cursor)
            )
            for entry in page:
                yield entry
            if cursor is None:
                return

    async def grouping_members(self, id: str, group: int) -> AsyncIterator[GroupingMember]:
        """See Client.grouping_members."""
        cursor: str | None = None
        while True:
            page, cursor = await self._connection.run(
                self._calls.grouping_members(id, group, cursor=cursor)
            )
            for entry in page:
                yield entry
            if cursor is None:
                return

    async def map(
        self,
        method: Literal["pca", "umap"] = "pca",
        *,
        sample: int | None = None,
        version: int | None = None,
    ) -> Map | PendingMap:
        """See Client.map."""
        return await self._connection.run(
            self._calls.map(method=method, sample=sample, version=version)
        )


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
