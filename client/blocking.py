"""Client: the methods a caller sees, blocking. What they send and how they read the answer is in
client.calls; here is only the running of it. Longer than other files because it is a list of
signatures.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
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
from client.transport import Connection, Transport, public_url

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
        concurrency: requests on their way at once in one call that is sent in parts; they come back
            in order, and take at most about (concurrency + 1) * 16 MiB of memory. 1 sends one
            after the other, as large as the service takes them, in the order of the call.
        transport: another way to send, for tests: an httpx2 transport.
        clock: time and dice, for tests.

    Reads take `min_gallery_version`, a `gallery_version` that was answered before: the answer is of
    that version or a later one, from whichever of several services of one gallery it comes.
    GalleryBehind where it is not there within the retries.

    Pictures may be paths, file:// URLs, folders, bytes, open binary files, PIL images or uint8
    arrays (H, W) or (H, W, 3), one or an iterable of them. What is larger than the service's limits
    (see `info`) is sent in parts and comes back in order. Errors: client.errors.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        max_retries: int = 3,
        concurrency: int = 4,
        transport: Transport | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._calls = Calls(
            RetryPolicy(timeout_s, max_retries, clock),
            concurrency=concurrency,
            service=public_url(base_url),
        )
        self._connection = Connection(base_url, headers_of(api_key), transport, clock)
        self.evaluations = Evaluations(self._calls, self._connection)

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

    def add_folder(
        self,
        folder: str | os.PathLike[str],
        *,
        journal: str | os.PathLike[str] | None = None,
        metadata: MetadataOf | None = None,
        progress: Progress | None = None,
    ) -> FolderAdded:
        """Add every picture below a folder, or go on where that was cut short.

        Args:
            journal: file that keeps what was answered; beside the folder by default. The same call
                sends what is new or changed since, and what was not answered.
            metadata: called with the id of each file, its path from the folder; gives its metadata,
                and a file whose metadata changed is sent again; or None: nothing is said of it, and
                of a file that was sent before what is there stays.
            progress: called with (files done, files there) as parts are answered, from one thread
                at a time; client.progress.meter() makes one that draws.

        Files that cannot be read, are not called like pictures or are rejected by the service are
        listed in `refused`, and tried again by the next call.

        Raises:
            FolderNotAdded: the journal is in use, damaged, or of another folder or gallery.
        """
        return self._connection.run(
            self._calls.add_folder(folder, journal=journal, metadata=metadata, progress=progress)
        )

    def items(
        self,
        *,
        filter: Filter | None = None,
        include_vectors: bool = False,
        page_size: int | None = None,
        min_gallery_version: int | None = None,
    ) -> Iterator[Item]:
        """Iterate over the gallery, a page at a time.

        Args:
            filter: {"field": value or [values]} of the metadata.
            include_vectors: each item with its vector.
            page_size: items per request; None leaves it to the service.
        """
        cursor: str | None = None
        while True:
            page = self._connection.run(
                self._calls.page(
                    filter=filter,
                    include_vectors=include_vectors,
                    page_size=page_size,
                    cursor=cursor,
                    min_gallery_version=min_gallery_version,
                )
            )
            yield from page.items
            if page.next is None:
                return
            cursor = page.next

    def item(
        self, id: str, *, include_vector: bool = False, min_gallery_version: int | None = None
    ) -> Item:
        """One item; ItemNotFound when there is none."""
        return self._connection.run(
            self._calls.item(
                id, include_vector=include_vector, min_gallery_version=min_gallery_version
            )
        )

    def image(self, id: str, *, min_gallery_version: int | None = None) -> bytes:
        """The thumbnail of an item, a WebP of at most 256 pixels; PictureNotFound where the item
        came as a vector."""
        return self._connection.run(self._calls.image(id, min_gallery_version=min_gallery_version))

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
        min_gallery_version: int | None = None,
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
                min_gallery_version=min_gallery_version,
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
        min_gallery_version: int | None = None,
    ) -> Groups:
        """What propagation along the kNN graph reaches from each anchor in 1..steps hops.

        Args:
            ids, images, vectors: exactly one of them, the anchors.
            order: "nearest" or "hardest" (least similar) first, or by "step" of discovery.
            limit: members listed per anchor.
        """
        return self._connection.run(
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

    def start_grouping(
        self,
        *,
        k: int = 4,
        steps: int = 3,
        min_size: int = 3,
        min_gallery_version: int | None = None,
    ) -> Grouping:
        """Have the whole gallery partitioned into groups, in the background; the same parameters
        at the same gallery version are the same grouping. Ask grouping(id) for its state."""
        return self._connection.run(
            self._calls.start_grouping(
                k=k, steps=steps, min_size=min_size, min_gallery_version=min_gallery_version
            )
        )

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
        min_gallery_version: int | None = None,
    ) -> Map | PendingMap:
        """Two coordinates for each item of a sample. "umap" is computed in the background: while
        it is, a PendingMap comes, whose gallery_version is the `version` to ask for again."""
        return self._connection.run(
            self._calls.map(
                method=method,
                sample=sample,
                version=version,
                min_gallery_version=min_gallery_version,
            )
        )

    def datasets(self) -> tuple[Dataset, ...]:
        """The labelled sets that evaluations can run on."""
        return self._connection.run(self._calls.datasets())


class Evaluations:
    """Evaluations on demand: Client.evaluations."""

    def __init__(self, calls: Calls, connection: Connection) -> None:
        self._calls, self._connection = calls, connection

    def submit(
        self,
        protocol: Protocol,
        dataset: str,
        *,
        settings: Json | None = None,
        seed: int = 0,
        idempotency_key: str | None = None,
    ) -> Evaluation:
        """Have an evaluation run in the background.

        Args:
            dataset: the name of one of Client.datasets().
            settings: of the protocol; what is left out has its default.
            idempotency_key: submitting again under the same key gives the same evaluation; without
                it each submit() is one of its own, whose attempts share a key.
        """
        return self._connection.run(
            self._calls.submit(protocol, dataset, settings=settings, seed=seed, key=idempotency_key)
        )

    def get(self, id: str) -> Evaluation:
        """One evaluation as it is now."""
        return self._connection.run(self._calls.evaluation(id))

    def list(self, *, status: str | None = None) -> Iterator[Evaluation]:
        """Iterate over the evaluations, the newest first; or over those of one status."""
        cursor: str | None = None
        while True:
            page = self._connection.run(self._calls.evaluations(status=status, cursor=cursor))
            yield from page.items
            if page.next is None:
                return
            cursor = page.next

    def cancel(self, id: str) -> Evaluation:
        """End one that is queued or running; it has ended within 10 seconds."""
        return self._connection.run(self._calls.cancel(id))

    def wait(self, id: str, *, timeout_s: float | None = None) -> Evaluation:
        """Ask until it has ended, in whatever way: its `status` says which.

        Raises:
            TimedOut: it goes on after timeout_s.
        """
        return self._connection.run(self._calls.wait(id, timeout_s=timeout_s))

    def events(self, id: str) -> Iterator[Evaluation]:
        """The evaluation each time it changes, until it has ended, its report left out: get(id) has
        it. A stream that breaks is taken up again."""
        watch = self._calls.watch(id)
        while not watch.ended:
            failure: ConnectionFailed | ServiceError | None = None
            try:
                for data in self._connection.events(watch.attempt):
                    yield watch.read(data)
            except (ConnectionFailed, ServiceError) as error:
                failure = error
            if not watch.ended:
                self._connection.run(watch.broken(failure))
