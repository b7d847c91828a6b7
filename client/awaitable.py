"""AsyncClient: the methods of client.blocking, to be awaited. A test compares the signatures."""

import os
from collections.abc import AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from client.calls import Calls, headers_of
from client.errors import ConnectionFailed, ServiceError
from client.folders import MetadataOf, Progress
from client.models import (
    Added,
    Dataset,
    Deleted,
    Embeddings,
    Evaluation,
    FolderAdded,
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
from client.routes import Filter, Include, OnError, Order, Output, Protocol
from client.transport import AsyncConnection, AsyncTransport, public_url

if TYPE_CHECKING:
    from client.images import ImagesInput


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
        concurrency: int = 4,
        transport: AsyncTransport | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._calls = Calls(
            RetryPolicy(timeout_s, max_retries, clock),
            concurrency=concurrency,
            service=public_url(base_url),
        )
        self._connection = AsyncConnection(base_url, headers_of(api_key), transport, clock)
        self.evaluations = AsyncEvaluations(self._calls, self._connection)

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

    async def add_folder(
        self,
        folder: str | os.PathLike[str],
        *,
        journal: str | os.PathLike[str] | None = None,
        metadata: MetadataOf | None = None,
        progress: Progress | None = None,
    ) -> FolderAdded:
        """See Client.add_folder."""
        return await self._connection.run(
            self._calls.add_folder(folder, journal=journal, metadata=metadata, progress=progress)
        )

    async def items(
        self,
        *,
        filter: Filter | None = None,
        include_vectors: bool = False,
        page_size: int | None = None,
        min_gallery_version: int | None = None,
    ) -> AsyncIterator[Item]:
        """See Client.items."""
        cursor: str | None = None
        while True:
            page = await self._connection.run(
                self._calls.page(
                    filter=filter,
                    include_vectors=include_vectors,
                    page_size=page_size,
                    cursor=cursor,
                    min_gallery_version=min_gallery_version,
                )
            )
            for item in page.items:
                yield item
            if page.next is None:
                return
            cursor = page.next

    async def item(
        self, id: str, *, include_vector: bool = False, min_gallery_version: int | None = None
    ) -> Item:
        """See Client.item."""
        return await self._connection.run(
            self._calls.item(
                id, include_vector=include_vector, min_gallery_version=min_gallery_version
            )
        )

    async def image(self, id: str, *, min_gallery_version: int | None = None) -> bytes:
        """See Client.image."""
        return await self._connection.run(
            self._calls.image(id, min_gallery_version=min_gallery_version)
        )

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
        min_gallery_version: int | None = None,
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
                min_gallery_version=min_gallery_version,
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
        min_gallery_version: int | None = None,
    ) -> Groups:
        """See Client.groups."""
        return await self._connection.run(
            self._calls.groups(
                ids=ids,
                images=images,
                vectors=vectors,
                k=k,
                steps=steps,
                order=order,
                limit=limit,
                min_gallery_version=min_gallery_version,
            )
        )

    async def start_grouping(
        self,
        *,
        k: int = 4,
        steps: int = 3,
        min_size: int = 3,
        min_gallery_version: int | None = None,
    ) -> Grouping:
        """See Client.start_grouping."""
        return await self._connection.run(
            self._calls.start_grouping(
                k=k, steps=steps, min_size=min_size, min_gallery_version=min_gallery_version
            )
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
        min_gallery_version: int | None = None,
    ) -> Map | PendingMap:
        """See Client.map."""
        return await self._connection.run(
            self._calls.map(
                method=method,
                sample=sample,
                version=version,
                min_gallery_version=min_gallery_version,
            )
        )

    async def datasets(self) -> tuple[Dataset, ...]:
        """See Client.datasets."""
        return await self._connection.run(self._calls.datasets())


class AsyncEvaluations:
    """Evaluations on demand: AsyncClient.evaluations."""

    def __init__(self, calls: Calls, connection: AsyncConnection) -> None:
        self._calls, self._connection = calls, connection

    async def submit(
        self,
        protocol: Protocol,
        dataset: str,
        *,
        settings: Json | None = None,
        seed: int = 0,
        idempotency_key: str | None = None,
    ) -> Evaluation:
        """See Evaluations.submit."""
        return await self._connection.run(
            self._calls.submit(protocol, dataset, settings=settings, seed=seed, key=idempotency_key)
        )

    async def get(self, id: str) -> Evaluation:
        """See Evaluations.get."""
        return await self._connection.run(self._calls.evaluation(id))

    async def list(self, *, status: str | None = None) -> AsyncIterator[Evaluation]:
        """See Evaluations.list."""
        cursor: str | None = None
        while True:
            page = await self._connection.run(self._calls.evaluations(status=status, cursor=cursor))
            for found in page.items:
                yield found
            if page.next is None:
                return
            cursor = page.next

    async def cancel(self, id: str) -> Evaluation:
        """See Evaluations.cancel."""
        return await self._connection.run(self._calls.cancel(id))

    async def wait(self, id: str, *, timeout_s: float | None = None) -> Evaluation:
        """See Evaluations.wait."""
        return await self._connection.run(self._calls.wait(id, timeout_s=timeout_s))

    async def events(self, id: str) -> AsyncIterator[Evaluation]:
        """See Evaluations.events."""
        watch = self._calls.watch(id)
        while not watch.ended:
            failure: ConnectionFailed | ServiceError | None = None
            try:
                async for data in self._connection.events(watch.attempt):
                    yield watch.read(data)
            except (ConnectionFailed, ServiceError) as error:
                failure = error
            if not watch.ended:
                await self._connection.run(watch.broken(failure))
