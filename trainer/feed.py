"""What feeds the training step: the batches of an epoch, on the device before they are asked for.

In: images (`CropStock`) and the recipe. Out: for each step the indices, what was drawn, and pixels.
On a GPU a thread draws and copies ahead while the device computes (pixels as trainer/stock.py does
it); images that fit are copied there once and batches are gathered there. On the CPU nothing runs
ahead but the decoding processes.
"""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.augment import Views, draw_views
from trainer.config import Recipe
from trainer.distributed import Ranks
from trainer.schedule import Position, view_generator
from trainer.stock import CropStock

AHEAD = 4  # batches drawn and copied before they are asked for: hides a late one now and then

Item = TypeVar("Item")


class Batch(NamedTuple):
    """What one step trains on; tensors on the device. B images of all ranks, b of this one."""

    message: Tensor  # (B + 17 b,) float64: indices and drawn views, so that one copy moves them
    like: Views  # of this rank's share, on the host; says of which plan and kinds `message` is
    pixels: Tensor | None  # (b, H, W, 3) uint8; None where all images are resident

    @property
    def indices(self) -> Tensor:
        """(B,) int64 of the joined batch: float64 holds whole numbers up to 2^53."""
        return self.message[: -len(self.like.boxes) * self._width].long()

    @property
    def drawn(self) -> Tensor:
        """(b, 17) float64, for `like.unpack`."""
        return self.message[-len(self.like.boxes) * self._width :].view(-1, self._width)

    @property
    def _width(self) -> int:
        return sum(each[0].numel() for each in self.like if isinstance(each, Tensor))


class Feed:
    """The batches of a run's epochs, in the order of (seed, epoch), for one rank."""

    def __init__(
        self,
        recipe: Recipe,
        stock: CropStock,
        ranks: Ranks,
        device: torch.device,
        *,
        one_shape: bool = False,
    ) -> None:
        """Take the images to the device if it is no CPU and they fit `data.device_limit_bytes`.

        Args:
            one_shape: pixels of all batches have one shape, as a captured step needs it.
        """
        self._recipe, self._stock, self._device = recipe, stock, device
        self._share, self._one_shape = ranks.share(recipe.batch_size), one_shape
        self.resident: Tensor | None = None  # (N, H, W, 3) uint8, all images
        if device.type != "cpu" and stock.resident:
            self.hold(device, recipe.data.device_limit_bytes)

    def hold(self, device: torch.device, limit_bytes: int) -> None:
        """Copy all images to the device, padded to the largest, if that takes so much at most."""
        count = len(self._stock)
        height, width = (int(side) for side in self._stock.sizes.max(axis=0))
        if count * height * width * 3 > limit_bytes:
            return
        together = self._share.stop - self._share.start  # what the stock has room for anyway
        places = [np.arange(n, min(n + together, count)) for n in range(0, count, together)]
        block = torch.empty(count, height, width, 3, dtype=torch.uint8, device=device)
        for own, part in zip(places, self._stock.batches(places, one_shape=True), strict=True):
            block[torch.from_numpy(own).to(device)] = part.pixels.to(device)
        self.resident = block

    def describe(self) -> str:
        """Where the images are, in words for the log."""
        if self.resident is not None:
            return f"images held on the device ({self.resident.nbytes / 1e6:.0f} MB)"
        words = "images in memory" if self._stock.resident else "images decoded for each batch"
        if self._device.type == "cpu":
            return words
        where = ", more than data.device_limit_bytes" if self._stock.resident else ""
        return f"{words} and copied ahead{where}"

    def epoch(self, batches: NDArray[np.int64], start: Position) -> Generator[Batch, None, None]:
        """Yield the batches of the steps after `start`; close it to end its thread.

        On the CPU the pixels of a batch may change once the next one is asked for.

        Args:
            batches: (steps, B) indices of these steps.
        """
        made = self._made(batches, start)
        if self._device.type == "cpu":
            yield from made
            return
        copies = _Copies(self._device)
        with closing(prefetched((copies.begin(batch) for batch in made), AHEAD)) as ahead:
            for begun in ahead:
                yield copies.finish(*begun)

    def _made(self, batches: NDArray[np.int64], start: Position) -> Iterator[Batch]:
        """The batches; messages on the host, pixels where they will be used."""
        recipe, share = self._recipe, self._share
        blocks = None
        if self.resident is None:
            blocks = self._stock.batches(batches[:, share], self._device, one_shape=self._one_shape)
        for step, indices in enumerate(batches, start.step + 1):
            pixels = None if blocks is None else next(blocks).pixels
            # Drawn for the whole batch; nothing that is drawn depends on the sizes of the others'.
            sizes = torch.ones(len(indices), 2, dtype=torch.int64)
            sizes[share] = torch.from_numpy(self._stock.sizes[indices[share]].astype(np.int64))
            generator = view_generator(recipe.seed, start.epoch, step)
            views = draw_views(recipe.augment, sizes, generator).share(share)
            message = torch.cat([torch.from_numpy(indices).double(), views.pack().flatten()])
            yield Batch(message, views, pixels)


class _Copies:
    """Copies of messages to a GPU on a stream of their own, from pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        """Begin the copy, in any thread. torch keeps pinned memory until a copy has read it."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            message = batch.message.pin_memory().to(self._device, non_blocking=True)
            event = self._stream.record_event()
        return batch._replace(message=message), event

    def finish(self, batch: Batch, event: torch.cuda.Event) -> Batch:
        """Let the stream of the steps wait for the copy; the host does not."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        batch.message.record_stream(current)  # or its memory would be reused while it is read
        return batch


def prefetched(items: Iterator[Item], ahead: int) -> Generator[Item, None, None]:
    """Yield `items` in their order; a thread makes up to `ahead` of them before they are asked for.

    What making one raises is raised here, in its turn. Closing drops what was made ahead.
    """
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(ahead))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, items, end))
                yield cast(Item, item)
        finally:
            thread.shutdown(cancel_futures=True)
            close = getattr(items, "close", None)  # of a generator, which may hold processes' work
            if close is not None:
                close()
