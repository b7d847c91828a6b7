"""Images of a partition to vectors, with every core or the GPU: decoder processes and the encoder
of the service, so that a picture gets the vector that /embed gives.

In: a source, an encoder, decoders. Out: vectors in the order of the images, and the rejected ones
with reasons. Reading, decoding and encoding go on beside each other, a bounded number ahead.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from service.bulk.parts import Rejected
from service.bulk.sources import Source, Unreadable
from service.decode import DecoderPool
from service.decoder_child import Pixels
from service.embedder import CPU, Embedder
from service.settings import Settings
from trainer.representation.preprocess import ImageRejected

# Nobody waits for an answer here: a picture may take as long as a busy machine needs.
DECODE_TIMEOUT_S = 60.0


class Embedded(NamedTuple):
    """A partition."""

    ids: list[tuple[str, int]]  # id, number in the source; n
    vectors: NDArray[np.float32]  # (n, dim)
    rejected: list[Rejected]


class BulkEmbedder:
    """Decoders and encoder; use it in a `with`.

    Args:
        vectors: `embedding` (dim D, unit length) or `features` (dim F).
        settings: of the service: decoders, threads, batch, limits.

    Raises:
        DecoderUnavailable: a decoder process does not start.
    """

    def __init__(self, embedder: Embedder, vectors: str, settings: Settings) -> None:
        on_cpu = embedder.execution_provider == CPU
        self._embedder = embedder
        self._wants_features = vectors == "features"
        self.dim = embedder.feature_dim if self._wants_features else embedder.embedding_dim
        self._max_batch = settings.max_batch
        self._most_bytes = settings.max_body_bytes
        self._workers = settings.resolved_inference_threads() if on_cpu else 1
        self._threads = ThreadPoolExecutor(self._workers, "encoder")
        # All cores, where the service keeps some for answers.
        self._decoding = settings.decoder_processes or settings.resolved_inference_threads()
        self._decoders = DecoderPool(
            embedder.contract,
            size=self._decoding,
            timeout_s=max(DECODE_TIMEOUT_S, settings.decode_timeout_s),
            memory_bytes=settings.decoder_memory_bytes,
            lifetime_images=settings.decoder_lifetime_images,
            max_pixels=settings.max_image_pixels,
            max_image_bytes=settings.max_body_bytes,
            max_large_waiting=settings.max_large_waiting,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._decoders.close()

    def embed(
        self, source: Source, first: int, last: int, advance: Callable[[int], object]
    ) -> Embedded:
        """Images first..last-1 of a source.

        Args:
            advance: told how many more images are done.

        Raises:
            SourceError, TableError: the source cannot be read any more.
            DecoderUnavailable, EmbedderError: no image can be embedded.
        """
        ids: list[tuple[str, int]] = []
        rejected: list[Rejected] = []
        parts: list[NDArray[np.float32]] = []
        batch: list[Pixels] = []
        running: deque[Future[NDArray[np.float32]]] = deque()

        def collect(most: int) -> None:
            while len(running) > most:
                parts.append(running.popleft().result())
                advance(len(parts[-1]))

        def run() -> None:
            running.append(self._threads.submit(self._run, batch.copy()))
            batch.clear()
            collect(2 * self._workers)

        for number, pixels in self._decoded(source, first, last):
            if isinstance(pixels, str):
                rejected.append(Rejected(source.ids[number], number, pixels))
                advance(1)
                continue
            ids.append((source.ids[number], number))
            batch.append(pixels)
            if len(batch) == self._max_batch:
                run()
        if batch:
            run()
        collect(0)
        vectors = np.concatenate([np.empty((0, self.dim), np.float32), *parts])
        return Embedded(ids, vectors, rejected)

    def _decoded(self, source: Source, first: int, last: int) -> Iterator[tuple[int, Pixels | str]]:
        """(number, pixels or the reason why there are none), in order."""
        sender = object()  # one for all: large images wait for each other here
        waiting: deque[tuple[int, Future[Pixels] | str]] = deque()
        ahead = 2 * self._max_batch + 4 * self._decoding
        try:
            for number, content in source.read(first, last):
                waiting.append((number, self._submit(content, sender)))
                if len(waiting) > ahead:
                    yield _settled(*waiting.popleft())
            while waiting:
                yield _settled(*waiting.popleft())
        finally:
            for _, future in waiting:
                if not isinstance(future, str):
                    future.cancel()

    def _submit(self, content: bytes | Unreadable, sender: object) -> Future[Pixels] | str:
        if isinstance(content, Unreadable):
            return content.reason
        if len(content) > self._most_bytes:
            return (
                f"it has {len(content):,} bytes, at most {self._most_bytes:,} (max_body_bytes) are "
                "decoded"
            )
        return self._decoders.submit(content, sender=sender)

    def _run(self, images: Sequence[Pixels]) -> NDArray[np.float32]:
        embedder = self._embedder
        found = embedder.finish(embedder.run(embedder.prepare(images)))
        return found.features if self._wants_features else found.embeddings


def _settled(number: int, decoded: Future[Pixels] | str) -> tuple[int, Pixels | str]:
    if isinstance(decoded, str):
        return number, decoded
    try:
        return number, decoded.result()
    except ImageRejected as rejection:
        return number, str(rejection)
