"""What a source of images is: stable ids, pictures read when asked for, labels, a fingerprint.

In: what a reader of this package found. Out: an `ImageSource`, and every image as the encoder will
see it after training. No torch in this package at import: the decoding processes import it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.representation.bundle import MAX_ID_LENGTH
from trainer.representation.preprocess import (
    SERVED_FORMATS,
    ImageRejected,
    InputContract,
    decode,
    fit_array,
    prepare,
)

# A folder of one's own is trusted with more formats than strangers are.
TRAIN_FORMATS = (*SERVED_FORMATS, "BMP", "TIFF", "PPM")
JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
PPM_SUFFIXES = (".ppm", ".pgm", ".pbm", ".pnm")
SUFFIXES = frozenset((*JPEG_SUFFIXES, *PPM_SUFFIXES, ".png", ".webp", ".bmp", ".tif", ".tiff"))
# Stored training images keep at most this ratio of long to short side, around the centre: a crop
# of ratio up to 4/3 hardly ever needs more, and one panorama would set the memory of a batch.
MAX_ASPECT = 2.0
# A stored training image has this short side for each pixel of a crop, as 256 has for 224.
STORED_PER_CROP = 256 / 224


class Stored(Protocol):
    """An encoded picture inside a larger file; small, so that it travels to decoding processes."""

    def read(self) -> bytes:
        """The encoded picture.

        Raises:
            ImageRejected, OSError: it cannot be read from its file.
        """


# A file, a part of a file, or pixels (H, W[, 1 or 3]).
Picture = Path | Stored | NDArray[np.uint8]


class DataError(ValueError):
    """Images that cannot be trained on; the message says what was found, wanted, and to do."""


@dataclass(frozen=True)
class Skipped:
    """A file that is left out of training."""

    id: str
    reason: str


@dataclass(frozen=True)
class ImageSource:
    """N images, in a stable order.

    Attributes:
        ids: N different strings of at most 512 characters: relative paths, or zero-padded indices.
        pictures: N files, parts of files, or arrays of pixels.
        labels: (N,) int64 classes 0..C-1, read by the kNN monitor only; None where unknown.
        fingerprint: sha256 (hex) of what was found: names and sizes, or all bytes.
        skipped: pictures that are left out from the start, before any is opened.
        other_files: how many files, or members of shards, are no images by their name.
        class_names: C texts, what the classes are called where they come from; None as `labels`.
    """

    ids: tuple[str, ...]
    pictures: Sequence[Picture]
    labels: NDArray[np.int64] | None
    fingerprint: str
    skipped: tuple[Skipped, ...] = ()
    other_files: int = 0
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> "ImageSource":
        """The images at `indices`, in that order; what was skipped and the fingerprint stay."""
        rows = [int(i) for i in indices]
        return replace(
            self,
            ids=tuple(self.ids[i] for i in rows),
            pictures=[self.pictures[i] for i in rows],
            labels=None if self.labels is None else self.labels[rows],
        )

    def prepared(
        self, indices: Sequence[int] | NDArray[np.int64], contract: InputContract
    ) -> NDArray[np.uint8]:
        """(B, S, S, 3): images as at evaluation and in the service, S = contract.size_px.

        Raises:
            DataError: a file can no longer be read; the first pass over the data could.
        """
        side = contract.size_px
        images = np.empty((len(indices), side, side, 3), np.uint8)
        for row, index in enumerate(indices):
            try:
                images[row] = prepared_picture(self.pictures[index], contract)
            except (ImageRejected, OSError) as error:
                raise changed_meanwhile(self.ids[index], error) from error
        return images


def prepared_picture(picture: Picture, contract: InputContract) -> NDArray[np.uint8]:
    """(S, S, 3): one image as at evaluation and in the service."""
    if isinstance(picture, np.ndarray):
        return fit_array(picture, contract)
    encoded = picture if isinstance(picture, Path) else picture.read()
    return prepare(encoded, contract, formats=TRAIN_FORMATS)


def reduced_picture(picture: Picture, size_px: int) -> NDArray[np.uint8]:
    """(h, w, 3): one image with its short side shrunk to what crops of `size_px` are taken from.

    Smaller images stay as they are; of very long ones the middle is kept, see `MAX_ASPECT`.

    Raises:
        ImageRejected, OSError: the file cannot be decoded.
    """
    short_side = round(size_px * STORED_PER_CROP)
    image = _open_picture(picture, short_side)
    width, height = image.size
    kept_width = min(width, round(height * MAX_ASPECT))
    kept_height = min(height, round(width * MAX_ASPECT))
    scale = min(1.0, short_side / min(kept_width, kept_height))
    size = (max(1, round(kept_width * scale)), max(1, round(kept_height * scale)))
    if size == image.size:
        return np.asarray(image)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    box = (left, top, left + kept_width, top + kept_height)
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=box))


def split(
    labels: NDArray[np.int64] | None, count: int, *, holdout: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide 0..count-1 into (training, held out), both ascending; the share holds in each class.

    Without labels nothing is held out: the held-out images serve the kNN accuracy alone.
    """
    everything, draw = np.arange(count), np.random.default_rng([seed, count])
    if labels is None or holdout == 0:
        return everything, everything[:0]
    held = np.zeros(count, bool)
    for label in np.unique(labels):
        members = draw.permutation(np.flatnonzero(labels == label))
        held[members[: round(len(members) * holdout)]] = True
    return everything[~held], everything[held]


def changed_meanwhile(name: str, error: Exception) -> DataError:
    """The error for an image that was readable when the run began."""
    return DataError(
        f"{name} could be read when the run began and cannot any more ({error}): "
        "restore it, or start a new run without it"
    )


def _open_picture(picture: Picture, least_side_px: int) -> Image.Image:
    if isinstance(picture, np.ndarray):
        pixels = picture[:, :, 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture
        return Image.fromarray(pixels).convert("RGB")
    encoded = picture if isinstance(picture, Path) else picture.read()
    return decode(encoded, formats=TRAIN_FORMATS, least_side_px=least_side_px)


def unusable_name(name: str) -> str | None:
    """Why a name cannot be an id; None where it can."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8: rename it"
    if len(name) > MAX_ID_LENGTH:
        return f"its path has {len(name)} characters, at most {MAX_ID_LENGTH} can be an id"
    return None


def printable(name: str) -> str:
    """A name that may hold bytes of no character, for a report."""
    return name.encode("utf-8", "replace").decode()


class Classes(NamedTuple):
    """The classes of N images; both None where they are unknown."""

    labels: NDArray[np.int64] | None  # (N,) 0..C-1
    names: tuple[str, ...] | None  # C


UNKNOWN_CLASSES = Classes(None, None)


def classes_of(values: Sequence[object] | NDArray[np.generic] | None) -> Classes:
    """Classes 0..C-1 of N labels of any one kind, numbered in the labels' order."""
    if values is None:
        return UNKNOWN_CLASSES
    names, labels = np.unique(np.asarray(values), return_inverse=True)
    return Classes(labels.astype(np.int64), tuple(map(str, names.tolist())))
