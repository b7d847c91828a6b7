"""One model in service: its encoder, its path of images and its gallery, which change together.

In: a bundle and settings. Out: the parts, and the one that a request works with from its beginning
to its end, whatever becomes the current one meanwhile.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from service.bodies import EncodedImages
from service.embedder import Embedder, OnnxEmbedder
from service.gallery.protocol import Gallery, Vectors
from service.images import ImagePath
from service.settings import Settings
from trainer.representation.bundle import Bundle
from trainer.representation.preprocess import ImageRejected

_EMBEDDED_TOGETHER = 16  # originals given to the encoder at a time while a gallery is built


@dataclass(frozen=True, eq=False)
class Serving:
    """The parts that answer for one model."""

    embedder: Embedder
    images: ImagePath
    gallery: Gallery
    bundle: Bundle | None  # None: the parts were given
    speed: Mapping[str, Any] | None  # what the bundle says was timed at its export


# (whose it is, what a request works with): set when a request begins, see Runtime.pin.
pinned: ContextVar[tuple[object, Serving] | None] = ContextVar("pinned", default=None)


def load_embedder(bundle: Bundle, settings: Settings) -> Embedder:
    """The bundle's encoder as the settings want it; takes a while.

    Raises:
        EmbedderError, BundleError: it cannot be had so.
    """
    return OnnxEmbedder(
        bundle,
        execution_provider=settings.execution_provider,
        precision=settings.precision,
    )


class EmbedOriginals:
    """Embeds stored pictures from a thread, by an image path that lives on an event loop."""

    def __init__(
        self, images: ImagePath, loop: asyncio.AbstractEventLoop, settings: Settings
    ) -> None:
        self._images = images
        self._loop = loop
        self._together = min(_EMBEDDED_TOGETHER, settings.queue_size)

    def __call__(self, contents: Sequence[bytes]) -> list[Vectors | str]:
        """A vector of each picture, or in words why there is none; see gallery.successor.Embed."""
        embedded: list[Vectors | str] = []
        for start in range(0, len(contents), self._together):
            part: EncodedImages = [*contents[start : start + self._together]]
            outcomes = asyncio.run_coroutine_threadsafe(
                self._images.embed(part, float("inf")), self._loop
            ).result()
            embedded += [str(o) if isinstance(o, ImageRejected) else o[0] for o in outcomes]
        return embedded
