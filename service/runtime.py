"""What a running service holds, how it becomes ready, and how it stops.

In: settings and, for tests, ready-made parts. Out: `embedder`, `images` and `gallery` for the
routes, and the state of every check for /readyz. Parts are loaded in the background, so that
/livez answers from the start.
"""

import asyncio
import contextlib
import importlib.metadata
import queue
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

import faiss
import structlog

from service.batching import BoundedThreads, QueueFull
from service.decode import DecoderUnavailable
from service.embedder import Embedder, EmbedderError, OnnxEmbedder
from service.errors import RETRY_AFTER_S, Problem, over_limit, queue_full
from service.gallery.choice import SearchOptions
from service.gallery.logged import LoggedGallery
from service.gallery.protocol import (
    Applied,
    Change,
    Gallery,
    GalleryError,
    GalleryRetired,
    IdempotencyConflict,
    Snapshot,
    StorageError,
    TooManyMatches,
)
from service.images import ImagePath
from service.keys import ApiKeys
from service.observability import Metrics
from service.settings import Settings
from trainer.representation.bundle import Bundle, BundleError, open_bundle

Result = TypeVar("Result")
CHECKS = ("model", "decoders", "gallery")
# What stops a start with a message for the operator; anything else is a defect.
START_ERRORS = (BundleError, EmbedderError, GalleryError, DecoderUnavailable)

_log = structlog.get_logger("service")


class Runtime:
    """The parts of one service; use it as `async with runtime.running():`."""

    def __init__(
        self,
        settings: Settings,
        *,
        embedder: Embedder | None,
        gallery: Gallery | None,
        keys: ApiKeys,
    ) -> None:
        self.settings = settings
        self.keys = keys
        self.metrics = Metrics()
        self.draining = False
        self.failure: Exception | None = None
        self.bundle: Bundle | None = None
        self.speed: Mapping[str, Any] | None = None  # what the bundle says was timed at its export
        self.loaded = asyncio.Event()
        self._embedder = embedder
        self._gallery = gallery
        self._given_gallery = gallery is not None
        self._images: ImagePath | None = None
        self._compute = BoundedThreads(
            settings.resolved_search_threads(),
            max_pending=settings.max_pending,
            # OpenMP counts per calling thread; searches of several requests share the cores.
            initializer=lambda: faiss.omp_set_num_threads(1),
        )

    @property
    def embedder(self) -> Embedder:
        """The encoder; a Problem while it is loading."""
        if self._embedder is None or not self.loaded.is_set():
            raise self._loading()
        return self._embedder

    @property
    def images(self) -> ImagePath:
        """The path from images to vectors; a Problem while it is loading."""
        if self._images is None or not self.loaded.is_set():
            raise self._loading()
        return self._images

    @property
    def gallery(self) -> Gallery:
        """The gallery; a Problem while it is loading."""
        if self._gallery is None or not self.loaded.is_set():
            raise self._loading()
        return self._gallery

    def checks(self) -> dict[str, str]:
        """What /readyz looks at: "ok" or what is wrong with it."""
        missing = "loading" if self.failure is None else f"failed: {self.failure}"
        decoders = self._images if self._images is not None and self._images.running else None
        parts = (self._embedder, decoders, self._gallery)
        checks = {n: missing if p is None else "ok" for n, p in zip(CHECKS, parts, strict=True)}
        self.keys.refresh()
        if self.keys.failure is not None:
            checks["keys"] = "the API keys cannot be read; the log says why"
        if self._gallery is not None and (trouble := self._gallery.trouble()) is not None:
            checks["gallery"] = trouble
        if self.draining:
            checks["accepting"] = "the service is stopping"
        return checks

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load in the background, and release everything at the end."""
        loading = asyncio.create_task(self._load())
        try:
            yield
        finally:
            await loading
            await self._close()

    @contextlib.asynccontextmanager
    async def deadline(self) -> AsyncIterator[float]:
        """A block that must end within `request_timeout_s`; gives its deadline on time.monotonic.

        Raises:
            Problem: deadline_exceeded.
        """
        allowed = self.settings.request_timeout_s
        try:
            async with asyncio.timeout(allowed):
                yield time.monotonic() + allowed
        except TimeoutError:
            raise Problem(
                "deadline_exceeded",
                f"there was no answer within {allowed:g} s; ask for less at a time, or try again "
                "when less is going on",
                retry_after_s=RETRY_AFTER_S,
                limit=allowed,
                setting="request_timeout_s",
            ) from None

    async def compute(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call something that takes the CPU in a thread, off the event loop.

        Raises:
            Problem: queue_full.
        """
        try:
            return await self._compute.run(function, *arguments)
        except QueueFull as full:
            raise queue_full("searches", full.limit, "max_pending") from None

    async def apply(self, change: Change) -> Applied:
        """Change the gallery; when it returns, the change is on disk.

        Raises:
            Problem: queue_full, storage_full, storage_failed, gallery_retired,
                idempotency_conflict, too_many.
        """
        async with self.stored():
            future = self.gallery.apply(change)
            # Shielded: a client that goes away must not leave a change half known.
            return await asyncio.shield(asyncio.wrap_future(future))

    @contextlib.asynccontextmanager
    async def stored(self) -> AsyncIterator[None]:
        """A block whose storage errors become problems."""
        try:
            yield
        except queue.Full:
            raise queue_full("changes", self.settings.max_pending, "max_pending") from None
        except TooManyMatches as error:
            most = self.settings.max_rows
            raise over_limit("too_many", "items found", error.count, "max_rows", most) from None
        except IdempotencyConflict:
            raise Problem(
                "idempotency_conflict",
                "this Idempotency-Key was used for a request with another content; use a new key "
                "for a new request",
            ) from None
        except GalleryRetired as error:
            raise Problem(
                "gallery_retired",
                f"{error}. Nothing was changed; send the request again: once this service runs "
                "the other bundle, it is answered for that model",
                retry_after_s=5,
            ) from None
        except StorageError as error:
            code = "storage_full" if error.full else "storage_failed"
            cure = "free space on its disk" if error.full else "mend what is named"
            raise Problem(
                code,
                f"{error}. Nothing is acknowledged, searches go on; {cure} and send the request "
                "again",
                retry_after_s=5,
            ) from None

    def generation(self) -> dict[str, Any]:
        """What /info says of the gallery's snapshots on disk."""
        if not isinstance(self._gallery, LoggedGallery):
            return {}
        return {"generation": self._gallery.generation_seq}

    def database(self) -> dict[str, Any]:
        """What /info says of where the gallery is kept; nothing of a gallery that was given."""
        if not isinstance(self._gallery, LoggedGallery):
            return {}
        return {
            "database": self._gallery.database.version,
            "read_only": self._gallery.is_retired,
            "staleness_s": round(self._gallery.staleness_s(), 3),
        }

    async def _load(self) -> None:
        try:
            await self._load_parts()
        except START_ERRORS as error:
            self.failure = error  # whoever runs the application says it
        except Exception as error:  # noqa: BLE001 - a door: the process ends with this defect
            self.failure = error
            _log.error("start_failed", exc_info=error)
        else:
            self.loaded.set()

    async def _load_parts(self) -> None:
        settings = self.settings
        if self._embedder is None or self._gallery is None:
            self.bundle = await asyncio.to_thread(open_bundle, settings.bundle)
            self.speed = self.bundle.speed()
        if self._embedder is None:
            assert self.bundle is not None
            self._embedder = await asyncio.to_thread(
                lambda bundle: OnnxEmbedder(
                    bundle,
                    execution_provider=settings.execution_provider,
                    precision=settings.precision,
                ),
                self.bundle,
            )
        embedder = self._embedder
        _log.info(
            "encoder_loaded",
            model=embedder.model_id,
            precision=embedder.precision,
            asked=settings.precision,
            execution_provider=embedder.execution_provider,
        )
        self._images = ImagePath(embedder, settings=settings, metrics=self.metrics)
        await self._images.start()
        if self._gallery is None:
            assert self.bundle is not None
            self._gallery = await asyncio.to_thread(
                lambda bundle: LoggedGallery(
                    settings.state,
                    bundle,
                    url=settings.database_url(),
                    search=SearchOptions(
                        settings.resolved_search_memory_bytes(),
                        settings.exact_items,
                        settings.snapshot_every,
                    ),
                    follow_interval_s=settings.follow_interval_s,
                    max_staleness_s=settings.max_staleness_s,
                    max_pending=settings.max_pending,
                    idempotency_ttl_s=settings.idempotency_ttl_s,
                ),
                self.bundle,
            )
        if isinstance(self._gallery, LoggedGallery):
            self.metrics.gallery_staleness.set_function(self._gallery.staleness_s)
            self.metrics.gallery_lag.set_function(self._gallery.lag)
            gallery = self._gallery
            self.metrics.generation_seq.set_function(lambda: gallery.generation_seq)
            self.metrics.log_damaged.set_function(lambda: gallery.is_damaged)
        self._gallery.on_change(self._report_snapshot)
        self._report_snapshot(self._gallery.snapshot())
        self.metrics.build_info.labels(
            importlib.metadata.version("invprop"),
            embedder.model_id,
            embedder.execution_provider,
            embedder.precision,
        ).set(1)

    def _report_snapshot(self, snapshot: Snapshot) -> None:
        self.metrics.index_vectors.set(len(snapshot))
        self.metrics.gallery_version.set(snapshot.version)
        index = snapshot.index()
        self.metrics.index_bytes.clear()
        self.metrics.index_bytes.labels(index["index"]).set(index["bytes"])

    async def _close(self) -> None:
        if self._images is not None:
            await self._images.close()
        await asyncio.to_thread(self._compute.close)
        if self._gallery is not None and not self._given_gallery:
            await asyncio.to_thread(self._gallery.close)

    def _loading(self) -> Problem:
        waiting = [name for name, state in self.checks().items() if state != "ok"]
        return Problem(
            "loading",
            f"not ready yet: {', '.join(waiting) or 'starting'}; /readyz says when it is",
            retry_after_s=RETRY_AFTER_S,
        )
