"""The path of an image to its vector: admission, decoder process, micro-batch, encoder.

In: encoded images, or pixels that fit the contract already. Out: embeddings and features in order,
or for each image why it was rejected. How many are on the path is bounded over all requests.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.admission import Rates
from service.batching import Batcher, QueueFull, WaitTooLong
from service.bodies import EncodedImages
from service.decode import DecoderPool, DecodersBusy
from service.decoder_child import DecoderUnavailable
from service.embedder import Embedded, Embedder
from service.errors import RETRY_AFTER_S, Problem, queue_full
from service.metrics import Metrics
from service.settings import Settings
from trainer.representation.preprocess import ImageRejected

Row = tuple[NDArray[np.float32], NDArray[np.float32]]  # embedding (D,), features (F,)
PicturedRow = tuple[Row, bytes]  # with a thumbnail
Outcome = TypeVar("Outcome")
Outcome_co = TypeVar("Outcome_co", covariant=True)
Decoded = TypeVar("Decoded")


class ImagePath:
    """Decoders and encoder with their queues; to be started and closed on the event loop."""

    def __init__(
        self, embedder: Embedder, *, settings: Settings, metrics: Metrics, rates: Rates
    ) -> None:
        self.metrics = metrics
        self._embedder = embedder
        self._settings = settings
        self._rates = rates
        self._decoders: DecoderPool | None = None
        on_cpu = embedder.execution_provider.startswith("CPU")
        self._batcher: Batcher[NDArray[np.uint8], Row] = Batcher(
            self._run_encoder,
            max_batch=settings.max_batch,
            queue_size=settings.queue_size,
            max_wait_s=settings.max_queue_wait_s,
            workers=settings.resolved_inference_threads() if on_cpu else 1,
            on_batch=self._observe_batch,
        )
        # Read when somebody asks, not written with every image.
        metrics.queue_size.set_function(lambda: self._batcher.admitted)
        metrics.queue_oldest.set_function(lambda: self._batcher.oldest_wait_s)
        metrics.decode_queue_size.set_function(
            lambda: 0 if self._decoders is None else self._decoders.waiting
        )

    @property
    def running(self) -> bool:
        """Whether the decoder processes stand ready."""
        return self._decoders is not None

    async def start(self) -> None:
        """Start the decoder processes and the batches.

        Raises:
            DecoderUnavailable: a process does not start.
        """
        self._batcher.start()
        self._decoders = await asyncio.to_thread(self._start_decoders)

    async def close(self) -> None:
        """End the processes and threads; what still waits is cancelled."""
        await self._batcher.close()
        if self._decoders is not None:
            await asyncio.to_thread(self._decoders.close)

    async def embed(self, images: EncodedImages, deadline: float) -> list[Row | ImageRejected]:
        """Decode and embed; one entry for each image, in order.

        Raises:
            Problem: queue_full, decoder_unavailable.
        """
        return await self._embed_all(images, deadline, self._embed_image)

    async def embed_pictured(
        self, images: EncodedImages, deadline: float
    ) -> list[PicturedRow | ImageRejected]:
        """As `embed`, with a thumbnail of each image."""
        return await self._embed_all(images, deadline, self._embed_pictured)

    async def _embed_all(
        self, images: EncodedImages, deadline: float, embed: "_EmbedOne[Outcome]"
    ) -> list[Outcome]:
        with self._admission(len(images)):
            if len(images) == 1:  # no task for it
                outcomes = [await embed(images[0], deadline, None)]
            else:
                outcomes = await self._embed_together(images, deadline, embed)
        self.metrics.images_rejected.inc(sum(isinstance(o, ImageRejected) for o in outcomes))
        return outcomes

    async def embed_pixels(self, pixels: NDArray[np.uint8], deadline: float) -> list[Row]:
        """Embed (n, S, S, 3) uint8 that fit the contract already.

        Raises:
            Problem: queue_full.
        """
        with self._admission(len(pixels)):
            rows = [self._batcher.submit(image, deadline) for image in pixels]
            return [await rows[0]] if len(rows) == 1 else await asyncio.gather(*rows)

    def _start_decoders(self) -> DecoderPool:
        settings = self._settings
        return DecoderPool(
            self._embedder.contract,
            size=settings.resolved_decoder_processes(),
            timeout_s=settings.decode_timeout_s,
            memory_bytes=settings.decoder_memory_bytes,
            lifetime_images=settings.decoder_lifetime_images,
            max_pixels=settings.max_image_pixels,
            max_image_bytes=settings.max_body_bytes,
            max_large_waiting=settings.max_large_waiting,
            on_replaced=lambda reason: self.metrics.decoders_replaced.labels(reason).inc(),
            on_decoded=self._observe_decode,
        )

    def refuse_when_full(self) -> None:
        """Before a body is read: nobody need send or parse what could not be admitted.

        Raises:
            Problem: queue_full.
        """
        with _as_problems():
            self._batcher.check_room()

    @contextlib.contextmanager
    def _admission(self, count: int) -> Iterator[None]:
        self._rates.take_images(count)
        with _as_problems(), self._batcher.admit(count):
            yield

    async def _embed_together(
        self, images: EncodedImages, deadline: float, embed: "_EmbedOne[Outcome]"
    ) -> list[Outcome]:
        sender = object()
        tasks = [asyncio.create_task(embed(image, deadline, sender)) for image in images]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # when one of them ends the request, nobody waits for the others
                task.cancel()

    async def _embed_image(
        self, image: bytes | ImageRejected, deadline: float, sender: object
    ) -> Row | ImageRejected:
        assert self._decoders is not None
        decoded = await _decoded(self._decoders.submit, image, deadline, sender)
        if isinstance(decoded, ImageRejected):
            return decoded
        return await self._batcher.submit(decoded, deadline)

    async def _embed_pictured(
        self, image: bytes | ImageRejected, deadline: float, sender: object
    ) -> PicturedRow | ImageRejected:
        assert self._decoders is not None
        decoded = await _decoded(self._decoders.submit_pictured, image, deadline, sender)
        if isinstance(decoded, ImageRejected):
            return decoded
        return await self._batcher.submit(decoded.pixels, deadline), decoded.thumbnail

    def _run_encoder(self, images: Sequence[NDArray[np.uint8]]) -> list[Row]:
        embedder = self._embedder
        batch = embedder.prepare(images)
        started = time.perf_counter()
        raw: Embedded = embedder.run(batch)
        self.metrics.inference_duration.observe(time.perf_counter() - started)
        finished = embedder.finish(raw)
        return list(zip(finished.embeddings, finished.features, strict=True))

    def _observe_decode(self, waited_s: float, took_s: float) -> None:
        self.metrics.decode_queue_duration.observe(waited_s)
        self.metrics.decode_duration.observe(took_s)

    def _observe_batch(self, size: int, waits: Sequence[float], reason: str) -> None:
        self.metrics.batch_size.observe(size)
        self.metrics.batches.labels(reason).inc()
        for wait in waits:
            self.metrics.queue_duration.observe(wait)


@contextlib.contextmanager
def _as_problems() -> Iterator[None]:
    try:
        yield
    except QueueFull as full:
        raise queue_full("images", full.limit, "queue_size") from None
    except WaitTooLong as wait:
        raise Problem(
            "queue_full",
            f"the images before it would take about {wait.expected_s:.1f} s, longer than "
            "`max_queue_wait_s` allows; try again shortly",
            retry_after_s=max(RETRY_AFTER_S, math.ceil(wait.expected_s - wait.limit_s)),
            limit=wait.limit_s,
            setting="max_queue_wait_s",
        ) from None


class _EmbedOne(Protocol[Outcome_co]):
    def __call__(
        self, image: bytes | ImageRejected, deadline: float, sender: object, /
    ) -> Coroutine[Any, Any, Outcome_co]: ...


class _Submit(Protocol[Decoded]):
    def __call__(self, image: bytes, *, deadline: float, sender: object) -> Future[Decoded]: ...


async def _decoded(
    submit: _Submit[Decoded], image: bytes | ImageRejected, deadline: float, sender: object
) -> Decoded | ImageRejected:
    if isinstance(image, ImageRejected):
        return image
    try:
        return await asyncio.wrap_future(submit(image, deadline=deadline, sender=sender or image))
    except ImageRejected as rejection:
        return rejection
    except DecodersBusy as busy:
        raise queue_full("large images", busy.limit, "max_large_waiting") from None
    except DecoderUnavailable as error:
        raise Problem("decoder_unavailable", str(error), retry_after_s=RETRY_AFTER_S) from None
