"""The pixels that training crops are taken from, batch after batch.

In: what the survey found, and which images make a batch. Out: one block of pixels a batch, on the
device. Images held in memory are gathered here; others are decoded anew, ahead of their use, by
processes that write them straight into shared blocks.
"""

import math
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.augment import Collated
from trainer.datasets import DataError, ImageSource
from trainer.decode_pool import DecodePool, named_death
from trainer.decoding import Part, fill
from trainer.nvjpeg import Decode, DeviceDecoder
from trainer.progress import say
from trainer.shared_block import BlockName, NoMemoryError, SharedBlock

CPU = torch.device("cpu")

# Batches that are decoded while one is in use. Two keep all processes busy: when the first is
# nearly full, those that are done begin with the second.
AHEAD = 2
# Pictures that a process decodes for one message: few, so that a batch is shared out evenly and is
# soon there; a message costs the run 0.1 ms, a picture of 500 x 375 takes 2 ms.
LEAST_PART, LARGEST_PART = 4, 16


class CropStock:
    """The images' pixels: (h, w, 3) as `trainer.datasets.reduced_picture`.

    Besides those held in memory there are AHEAD + 1 shared blocks (one where nothing is decoded) of
    B x H x W x 3 bytes, H and W the largest of all images, at most twice 256/224 of the crop each:
    at 224 px and B = 256 up to 201 MB a block, 154 MB where no photo is longer than 3 : 2.
    """

    def __init__(
        self,
        source: ImageSource,
        stored: Sequence[NDArray[np.uint8]] | None,
        pool: DecodePool,
        *,
        size_px: int,
        sizes: NDArray[np.int32],
        on_device: Decode | None = None,
    ) -> None:
        """`stored` holds N images of `sizes` (N, 2), or is None; then `on_device` may decode."""
        self._source, self._stored, self._pool, self._size_px = source, stored, pool, size_px
        self._sizes = sizes
        self._free: list[_Block] = []
        self._on_device: DeviceDecoder | None = None
        self._said = False
        if on_device is not None:
            self._on_device = DeviceDecoder(source, sizes, size_px=size_px, decode=on_device)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def resident(self) -> bool:
        """Whether all pixels are in memory."""
        return self._stored is not None

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(N, 2): height and width of each image."""
        return self._sizes

    def batches(
        self,
        batches: Iterable[NDArray[np.int64]],
        device: torch.device = CPU,
        *,
        one_shape: bool = False,
    ) -> Iterator[Collated]:
        """Yield for each (B,) array of positions the pixels on `device`, in that order.

        On the CPU a block may be used again once the next batch is asked for: copy what is to
        stay. On a GPU blocks are the caller's. They are copied on a stream of their own, from
        pinned memory, while the GPU computes; the caller's stream waits for that, the host does
        not. The sizes stay on the CPU.

        Args:
            one_shape: all blocks are as large as the largest image of all asks for, so that
                equally many images have one shape; else as large as the batch asks for.

        Raises:
            DataError: a picture is no longer what it was, its process died, or memory is short.
        """
        if self._on_device is not None:
            yield from self._on_device.batches(
                batches,
                lambda indices: self._room(indices, one_shape),
                device,
                threads=self._pool.workers,
            )
            self._say_counts(self._on_device)
            return
        filled = self._gathered if self._stored is not None else self._decoded
        blocks = filled(batches, one_shape, device.type == "cuda")
        if device.type == "cpu":
            yield from (collated for collated, _ in blocks)
        else:
            yield from _copied(blocks, device)

    def _gathered(
        self, batches: Iterable[NDArray[np.int64]], one_shape: bool, pinned: bool
    ) -> "Iterator[tuple[Collated, _Block]]":
        assert self._stored is not None
        for indices in batches:
            block = self._take(len(indices), pinned)
            try:
                collated = block.view(self._sizes[indices], self._room(indices, one_shape))
                rows = collated.pixels.numpy()
                for row, index in zip(rows, indices, strict=True):
                    image = self._stored[index]
                    row[: image.shape[0], : image.shape[1]] = image
                yield collated, block
            finally:
                self._free.append(block)

    def _decoded(
        self, batches: Iterable[NDArray[np.int64]], one_shape: bool, pinned: bool
    ) -> "Iterator[tuple[Collated, _Block]]":
        ahead = AHEAD if self._pool.workers else 0
        waiting: deque[_Filling] = deque()
        try:
            for indices in batches:
                block = self._take(len(indices), pinned)
                collated = block.view(self._sizes[indices], self._room(indices, one_shape))
                waiting.append(_Filling(collated, block, self._begin(indices, collated, block)))
                if len(waiting) > ahead:
                    yield from self._finished(waiting)
            while waiting:
                yield from self._finished(waiting)
        finally:
            for filling in waiting:
                wait(filling.futures)  # nobody may write into a block that is used again
                self._free.append(filling.block)

    def _begin(
        self, indices: NDArray[np.int64], collated: Collated, block: "_Block"
    ) -> list[Future[None]]:
        count, height, width, _ = collated.pixels.shape
        each = -(-count // max(1, self._pool.workers))
        each = min(max(each, LEAST_PART), LARGEST_PART)
        futures = []
        for first in range(0, count, each):
            rows = indices[first : first + each]
            part = Part(
                block=block.name,
                shape=(count, height, width),
                first=first,
                names=tuple(self._source.ids[i] for i in rows),
                pictures=tuple(self._source.pictures[i] for i in rows),
                sizes=tuple((int(h), int(w)) for h, w in self._sizes[rows]),
                size_px=self._size_px,
            )
            with named_death():
                futures.append(self._pool.submit(fill, part))
        return futures

    def _finished(self, waiting: "deque[_Filling]") -> "Iterator[tuple[Collated, _Block]]":
        with named_death():
            for future in waiting[0].futures:
                future.result()
        filling = waiting.popleft()
        try:
            yield filling.collated, filling.block
        finally:
            self._free.append(filling.block)

    def _say_counts(self, decoder: DeviceDecoder) -> None:
        if not self._said:
            counts = (f"{name} {count:,}" for name, count in sorted(decoder.counts.items()))
            say(f"pictures decoded in the first epoch: {', '.join(counts)}")
        self._said = True

    def _room(self, indices: NDArray[np.int64], one_shape: bool) -> tuple[int, int]:
        height, width = (self._sizes if one_shape else self._sizes[indices]).max(axis=0)
        return int(height), int(width)

    def _take(self, count: int, pinned: bool) -> "_Block":
        height, width = self._room(np.arange(0), one_shape=True)
        num_bytes = max(1, count * height * width * 3)
        if self._free and self._free[0].num_bytes >= num_bytes:
            block = self._free.pop(0)
            block.wait_until_copied()
        else:
            self._free.clear()  # larger batches than before
            try:
                block = _Block(num_bytes)
            except NoMemoryError as error:
                raise DataError(
                    f"batches of {count} images of up to {height} x {width} pixels are decoded "
                    f"into {AHEAD + 1} shared blocks: {error}. Lower batch_size or "
                    "encoder.image_size_px, or free memory"
                ) from error
        if pinned:
            block.pin()
        return block


class _Block:
    """Shared memory for a batch, pinned for a GPU, and how far its last copying has come."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.copied: torch.cuda.Event | None = None
        self._shared = SharedBlock(num_bytes)
        self._bytes = torch.frombuffer(self._shared.memory, dtype=torch.uint8)
        self._pinned = False

    @property
    def name(self) -> BlockName:
        return self._shared.name

    def view(self, sizes: NDArray[np.int32], room: tuple[int, int]) -> Collated:
        """The beginning of the block as a batch of images of `sizes`."""
        shape = (len(sizes), *room, 3)
        pixels = self._bytes[: math.prod(shape)].view(shape)
        return Collated(pixels, torch.from_numpy(sizes.astype(np.int64)))

    def pin(self) -> None:
        """Keep the memory in place, so that a GPU copies from it by itself."""
        if self._pinned:
            return
        address = self._bytes.data_ptr()
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(runtime.cudaHostRegister(address, self.num_bytes, 0))
        if code:
            raise DataError(
                f"{self.num_bytes:,} bytes of shared memory cannot be pinned for the GPU (CUDA "
                f"error {code}): raise the limit of locked memory (ulimit -l), or lower batch_size"
            )
        weakref.finalize(self, runtime.cudaHostUnregister, address)
        self._pinned = True

    def wait_until_copied(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()  # over since long: as many batches have come between
            self.copied = None


class _Filling(NamedTuple):
    """A batch that is being decoded."""

    collated: Collated
    block: _Block
    futures: list[Future[None]]


def _copied(blocks: Iterator[tuple[Collated, _Block]], device: torch.device) -> Iterator[Collated]:
    """The batches on a GPU."""
    own = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for collated, block in blocks:
        with torch.cuda.stream(own):
            pixels = collated.pixels.to(device, non_blocking=True)
            block.copied = own.record_event()
        caller = torch.cuda.current_stream(device)
        caller.wait_event(block.copied)
        pixels.record_stream(caller)
        yield collated._replace(pixels=pixels)
