"""What a running service holds, how it becomes ready, and the path of an image to its vector.

In: settings and, for tests, ready-made parts. Out: `embedder`, `gallery` and `embed_images` for the
routes, and the state of every check for /readyz. Parts are loaded in the background, so that
/livez answers from the start.
"""

import asyncio
import contextlib
import importlib.metadata
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, TypeVar

import faiss
import numpy as np
import structlog
from numpy.typing import NDArray

from service.batching import Batcher, BoundedThreads, QueueFull
from service.bodies import EncodedImages
from service.decode import DecoderPool, DecoderUnavailable
from service.embedder import Embedded, Embedder, EmbedderError, OnnxEmbedder
from service.errors import Problem
from service.gallery.logged import LoggedGallery
from service.gallery.protocol import (
    Applied,
    Change,
    Gallery,
    GalleryError,
    IdempotencyConflict,
    StorageError,
)
from service.observability import Metrics
from service.settings import Settings
from trainer.representation.bundle import Bundle, BundleError, open_bundle
from trainer.representation.preprocess import ImageRejected

Result = TypeVar("Result")
Row = tuple[NDArray[np.float32], NDArray[np.float32]]  # embedding (D,), features (F,)

RETRY_AFTER_S = 1
CHECKS = ("model", "decoders", "gallery")
# What stops a start with a message for the operator; anything else is a defect.
START_ERRORS = (BundleError, EmbedderError, GalleryError, DecoderUnavailable)

_log = structlog.get_logger("service")


class Runtime:
    """The parts of one service; use it as `async with runtime.running():`."""

    def __init__(
        self, settings: Settings, *, embedder: Embedder | None, gallery: Gallery | None
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.draining = False
        self.failure: Exception | None = None
        self.bundle: Bundle | None = None
        self.loaded = asyncio.Event()
        self._embedder = embedder
        self._gallery = gallery
        self._given_gallery = gallery is not None
        self._decoders: DecoderPool | None = None
        self._batcher: Batcher[NDArray[np.uint8], Row] | None = None
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
    def gallery(self) -> Gallery:
        """The gallery; a Problem while it is loading."""
        if self._gallery is None or not self.loaded.is_set():
            raise self._loading()
        return self._gallery

    def checks(self) -> dict[str, str]:
        """What /readyz looks at: "ok" or what is wrong with it."""
        missing = "loading" if self.failure is None else f"failed: {self.failure}"
        parts = (self._embedder, self._decoders, self._gallery)
        checks = {n: missing if p is None else "ok" for n, p in zip(CHECKS, parts, strict=True)}
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
            raise _queue_full("searches", full.limit, "max_pending") from None

    async def embed_images(
        self, images: EncodedImages, deadline: float
    ) -> list[Row | ImageRejected]:
        """Decode and embed; one entry for each image, in order.

        Raises:
            Problem: queue_full, decoder_unavailable.
        """
        assert self._batcher is not None
        with self._admission(len(images)):
            outcomes = await asyncio.gather(
                *(self._embed_image(image, deadline) for image in images)
            )
        self.metrics.images_rejected.inc(sum(isinstance(o, ImageRejected) for o in outcomes))
        return outcomes

    async def embed_pixels(self, pixels: NDArray[np.uint8], deadline: float) -> list[Row]:
        """Embed (n, S, S, 3) uint8 that fit the contract already.

        Raises:
            Problem: queue_full.
        """
        batcher = self._batcher
        assert batcher is not None
        with self._admission(len(pixels)):
            return await asyncio.gather(*(batcher.submit(image, deadline) for image in pixels))

    async def apply(self, change: Change) -> Applied:
        """Change the gallery; when it returns, the change is on disk.

        Raises:
            Problem: queue_full, storage_full, storage_failed, idempotency_conflict.
        """
        async with self.stored():
            future = self.gallery.apply(change)
            # Shielded: a client that goes away must not leave a change half known.
            applied = await asyncio.shield(asyncio.wrap_future(future))
        self._report_gallery()
        return applied

    @contextlib.asynccontextmanager
    async def stored(self) -> AsyncIterator[None]:
        """A block whose storage errors become problems."""
        try:
            yield
        except queue.Full:
            raise _queue_full("changes", self.settings.max_pending, "max_pending") from None
        except IdempotencyConflict:
            raise Problem(
                "idempotency_conflict",
                "this Idempotency-Key was used for a request with another content; use a new key "
                "for a new request",
            ) from None
        except StorageError as error:
            code = "storage_full" if error.full else "storage_failed"
            raise Problem(
                code,
                f"{error}. Nothing was changed, searches go on; free space on the disk of the "
                "state directory and send the request again",
                retry_after_s=5,
            ) from None

    @contextlib.contextmanager
    def _admission(self, count: int) -> Iterator[None]:
        assert self._batcher is not None
        try:
            with self._batcher.admit(count):
                self.metrics.queue_size.set(self._batcher.admitted)
                yield
        except QueueFull as full:
            raise _queue_full("images", full.limit, "queue_size") from None
        finally:
            self.metrics.queue_size.set(self._batcher.admitted)

    async def _embed_image(self, image: bytes | ImageRejected, deadline: float) -> Any:
        assert self._decoders is not None
        assert self._batcher is not None
        if isinstance(image, ImageRejected):
            return image
        started = time.perf_counter()
        try:
            pixels = await asyncio.wrap_future(self._decoders.submit(image))
        except ImageRejected as rejection:
            return rejection
        except DecoderUnavailable as error:
            raise Problem("decoder_unavailable", str(error), retry_after_s=RETRY_AFTER_S) from None
        finally:
            self.metrics.decode_duration.observe(time.perf_counter() - started)
        return await self._batcher.submit(pixels, deadline)

    def _run_encoder(self, images: Sequence[NDArray[np.uint8]]) -> list[Row]:
        embedder = self._embedder
        assert embedder is not None
        batch = embedder.prepare(images)
        started = time.perf_counter()
        raw: Embedded = embedder.run(batch)
        self.metrics.inference_duration.observe(time.perf_counter() - started)
        finished = embedder.finish(raw)
        return list(zip(finished.embeddings, finished.features, strict=True))

    def _observe_batch(self, size: int, waits: Sequence[float]) -> None:
        self.metrics.batch_size.observe(size)
        for wait in waits:
            self.metrics.queue_duration.observe(wait)

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
        if self._embedder is None:
            assert self.bundle is not None
            self._embedder = await asyncio.to_thread(
                lambda bundle: OnnxEmbedder(bundle, execution_provider=settings.execution_provider),
                self.bundle,
            )
        embedder = self._embedder
        on_cpu = embedder.execution_provider.startswith("CPU")
        self._batcher = Batcher(
            self._run_encoder,
            max_batch=settings.max_batch,
            queue_size=settings.queue_size,
            workers=settings.resolved_inference_threads() if on_cpu else 1,
            on_batch=self._observe_batch,
        )
        self._batcher.start()
        self._decoders = await asyncio.to_thread(
            lambda: DecoderPool(
                embedder.contract,
                size=settings.resolved_decoder_processes(),
                timeout_s=settings.decode_timeout_s,
                memory_bytes=settings.decoder_memory_bytes,
                lifetime_images=settings.decoder_lifetime_images,
                max_pixels=settings.max_image_pixels,
                max_image_bytes=settings.max_body_bytes,
                on_replaced=lambda reason: self.metrics.decoders_replaced.labels(reason).inc(),
            )
        )
        if self._gallery is None:
            assert self.bundle is not None
            self._gallery = await asyncio.to_thread(
                lambda bundle: LoggedGallery(
                    settings.state,
                    bundle,
                    max_pending=settings.max_pending,
                    idempotency_ttl_s=settings.idempotency_ttl_s,
                ),
                self.bundle,
            )
        self._report_gallery()
        self.metrics.build_info.labels(
            importlib.metadata.version("invprop"), embedder.model_id, embedder.execution_provider
        ).set(1)

    def _report_gallery(self) -> None:
        assert self._gallery is not None
        snapshot = self._gallery.snapshot()
        self.metrics.index_vectors.set(len(snapshot))
        self.metrics.gallery_version.set(snapshot.version)

    async def _close(self) -> None:
        if self._batcher is not None:
            await self._batcher.close()
        if self._decoders is not None:
            await asyncio.to_thread(self._decoders.close)
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


def _queue_full(what: str, limit: int, setting: str) -> Problem:
    return Problem(
        "queue_full",
        f"{limit:,} {what} are waiting already, as many as `{setting}` allows; try again shortly",
        retry_after_s=RETRY_AFTER_S,
        limit=limit,
        setting=setting,
    )
