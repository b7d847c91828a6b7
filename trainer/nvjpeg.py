"""JPEGs decoded on the GPU by nvJPEG, through torchvision: `data.decoder: nvjpeg`.

In: pictures of a batch. Out: their pixels in one block on the device, reduced there to the sizes
that the survey found. Pixels differ a little from Pillow's, which decodes large JPEGs at a
fraction of their size, so it is never chosen by itself. Pictures that are no JPEG, or of another
kind than grey and YCbCr (CMYK, ...), and JPEGs that nvJPEG refuses, go through Pillow and are
counted. Unmeasured on a GPU.
"""

import io
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg

from trainer.augment import Collated
from trainer.datasets import ImageSource, Picture, changed_meanwhile
from trainer.datasets.source import MAX_ASPECT
from trainer.decoding import reduced_or_changed
from trainer.representation.preprocess import ImageRejected
from trainer.representation.quiet import without_warnings

# Encoded JPEGs to pixels (3, h, w) on a device, all or an error.
Decode = Callable[[list[Tensor]], list[Tensor]]

# Decoded at once: 200 MB of pixels on the device, two batches of photos of 500 x 375.
PIXELS_AT_ONCE = 1 << 26
BATCHES_AHEAD = 2  # read from disk while one is in use
MODES = ("L", "RGB")  # as Pillow names what a JPEG's header says

# What undoes each EXIF orientation but 1, on (3, h, w), as Pillow's exif_transpose.
_UPRIGHT: dict[int, Callable[[Tensor], Tensor]] = {
    2: lambda pixels: pixels.flip(2),
    3: lambda pixels: pixels.rot90(2, (1, 2)),
    4: lambda pixels: pixels.flip(1),
    5: lambda pixels: pixels.transpose(1, 2),
    6: lambda pixels: pixels.rot90(3, (1, 2)),
    7: lambda pixels: pixels.transpose(1, 2).rot90(2, (1, 2)),
    8: lambda pixels: pixels.rot90(1, (1, 2)),
}


class Encoded(NamedTuple):
    """A JPEG that nvJPEG may take."""

    content: bytes
    num_pixels: int
    orientation: int  # EXIF's, 1..8


def nvjpeg(device: torch.device) -> Decode:
    """nvJPEG on `device`.

    Raises:
        RuntimeError: this torchvision or this machine has none; found out with a first picture.
    """

    def decode(encoded: list[Tensor]) -> list[Tensor]:
        # torchvision 0.29 announces that a package of its own will take its place.
        with without_warnings():
            made = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
        assert isinstance(made, list)
        return made

    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    decode([_as_tensor(file.getvalue())])
    return decode


class DeviceDecoder:
    """Decodes batches on a device; `counts` says how many pictures went which way."""

    def __init__(
        self, source: ImageSource, sizes: NDArray[np.int32], *, size_px: int, decode: Decode
    ) -> None:
        """`sizes` (N, 2) are those that the survey found, `decode` is `nvjpeg(device)`."""
        self._source, self._sizes, self._size_px = source, sizes, size_px
        self._decode = decode
        self.counts: Counter[str] = Counter()

    def batches(
        self,
        batches: Iterable[NDArray[np.int64]],
        room: Callable[[NDArray[np.int64]], tuple[int, int]],
        device: torch.device,
        *,
        threads: int,
    ) -> Iterator[Collated]:
        """Yield for each (B,) array of positions its pixels on `device`, (B, H, W, 3).

        Args:
            room: H and W of a batch.
            threads: that read files, and decode what nvJPEG does not.

        Raises:
            DataError: a picture is no longer what the survey found.
        """
        waiting: deque[tuple[NDArray[np.int64], list[Future[Encoded | NDArray[np.uint8]]]]] = (
            deque()
        )
        with ThreadPoolExecutor(max(1, threads)) as pool:
            try:
                for indices in batches:
                    waiting.append((indices, [pool.submit(self._read, i) for i in indices]))
                    if len(waiting) > BATCHES_AHEAD:
                        yield self._block(*waiting.popleft(), room, device)
                while waiting:
                    yield self._block(*waiting.popleft(), room, device)
            finally:
                for _, futures in waiting:
                    for future in futures:
                        future.cancel()

    def _read(self, index: int) -> Encoded | NDArray[np.uint8]:
        name, picture = self._source.ids[index], self._source.pictures[index]
        try:
            found = read_jpeg(picture)
        except (ImageRejected, OSError) as error:
            raise changed_meanwhile(name, error) from error
        if found is not None:
            return found
        return self._with_pillow(index)

    def _with_pillow(self, index: int) -> NDArray[np.uint8]:
        height, width = self._sizes[index].tolist()
        name, picture = self._source.ids[index], self._source.pictures[index]
        return reduced_or_changed(name, picture, (height, width), self._size_px)

    def _block(
        self,
        indices: NDArray[np.int64],
        futures: "Sequence[Future[Encoded | NDArray[np.uint8]]]",
        room: Callable[[NDArray[np.int64]], tuple[int, int]],
        device: torch.device,
    ) -> Collated:
        sizes = torch.from_numpy(self._sizes[indices].astype(np.int64))
        pixels = torch.zeros((len(indices), *room(indices), 3), dtype=torch.uint8, device=device)
        group: list[tuple[int, Encoded]] = []

        def put(row: int, image: Tensor) -> None:
            height, width = sizes[row].tolist()
            pixels[row, :height, :width] = image

        def finish() -> None:
            for (row, encoded), made in zip(group, self._decoded(group), strict=True):
                height, width = sizes[row].tolist()
                if made is None:
                    self.counts["Pillow (refused by nvJPEG)"] += 1
                    put(row, torch.from_numpy(self._with_pillow(int(indices[row])).copy()))
                else:
                    self.counts["nvJPEG"] += 1
                    turn = _UPRIGHT.get(encoded.orientation)
                    put(row, reduce(turn(made) if turn else made, (height, width)))
            group.clear()

        for row, future in enumerate(futures):
            found = future.result()
            if isinstance(found, np.ndarray):
                self.counts["Pillow (of another kind)"] += 1
                put(row, torch.from_numpy(found.copy()))
                continue
            if sum(each.num_pixels for _, each in group) + found.num_pixels > PIXELS_AT_ONCE:
                finish()
            group.append((row, found))
        finish()
        return Collated(pixels, sizes)

    def _decoded(self, group: Sequence[tuple[int, Encoded]]) -> Iterable[Tensor | None]:
        """The pixels of each, None where nvJPEG does not take it: it names none of a list."""
        encoded = [_as_tensor(each.content) for _, each in group]
        if not encoded:
            return []
        try:
            return self._decode(encoded)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if len(group) == 1:
                return [None]
            return [one for each in group for one in self._decoded([each])]


def read_jpeg(picture: Picture) -> Encoded | None:
    """The encoded picture where nvJPEG may take it, by its header; None: another kind.

    Raises:
        ImageRejected, OSError: it cannot be read.
    """
    if isinstance(picture, np.ndarray):
        return None
    content = picture.read_bytes() if isinstance(picture, Path) else picture.read()
    if not content.startswith(b"\xff\xd8\xff"):
        return None
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            if image.mode not in MODES:
                return None
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            return Encoded(content, image.width * image.height, orientation)
    except (OSError, SyntaxError, ValueError):
        return None  # Pillow's decoding will say what is wrong with it


def reduce(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(h, w, 3) uint8 of `size` from upright (3, H, W): as `reduced_picture`, whole-pixel crop."""
    height, width = pixels.shape[1:]
    kept_width = min(width, round(height * MAX_ASPECT))
    kept_height = min(height, round(width * MAX_ASPECT))
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    pixels = pixels[:, top : top + kept_height, left : left + kept_width]
    if (kept_height, kept_width) != size:
        smaller = functional.interpolate(
            pixels[None].float(), size, mode="bilinear", antialias=True
        )
        pixels = smaller[0].round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 0)


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
