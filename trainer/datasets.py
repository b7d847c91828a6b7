"""Where images come from: a folder, a packed .npz, or the built-in sample of digits.

In: SOURCE of the command line. Out: an `ImageSource` with stable ids, labels for the monitor only,
a fingerprint, and every image as the encoder will see it after training. No torch in here: the
decoding processes import this module.
"""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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

DIGITS = "digits"
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

Picture = Path | NDArray[np.uint8]  # a file, or pixels (H, W[, 1 or 3])


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
        ids: N different strings: relative POSIX paths, or zero-padded indices.
        pictures: N files or arrays of pixels.
        labels: (N,) int64 classes 0..C-1, read by the kNN monitor only; None where unknown.
        fingerprint: sha256 (hex) of what was found: relative paths and sizes, or all bytes.
        skipped: files that are left out from the start, before any is opened.
        other_files: how many files in the folder are no images by their name.
    """

    ids: tuple[str, ...]
    pictures: Sequence[Picture]
    labels: NDArray[np.int64] | None
    fingerprint: str
    skipped: tuple[Skipped, ...] = ()
    other_files: int = 0

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


def open_source(source: str) -> ImageSource:
    """Open SOURCE: `digits`, a folder of images, or a packed .npz.

    Raises:
        DataError: nothing there, no image in it, or arrays of another form.
    """
    if source == DIGITS:
        return _digits()
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.is_file() and path.suffix == ".npz":
        return _packed(path)
    if path.exists():
        raise DataError(f"{source} is neither a folder nor an .npz file")
    raise DataError(f"{source} does not exist: give a folder of images, an .npz file or {DIGITS!r}")


def prepared_picture(picture: Picture, contract: InputContract) -> NDArray[np.uint8]:
    """(S, S, 3): one image as at evaluation and in the service."""
    if isinstance(picture, Path):
        return prepare(picture, contract, formats=TRAIN_FORMATS)
    return fit_array(picture, contract)


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
    if isinstance(picture, Path):
        return decode(picture, formats=TRAIN_FORMATS, least_side_px=least_side_px)
    pixels = picture[:, :, 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture
    return Image.fromarray(pixels).convert("RGB")


def _digits() -> ImageSource:
    # Imported here: scikit-learn takes a second, which every decoding process would pay.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # 0..16 in steps of one becomes 0..255; 16 x 15.9375 = 255.
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    return _from_arrays(images, np.asarray(bunch.target))


def _packed(path: Path) -> ImageSource:
    try:
        arrays = dict(_members(path))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as an .npz of plain arrays: {error}") from error
    if "images" not in arrays:
        raise DataError(
            f"{path} has no array 'images', only {sorted(arrays)}: "
            "wanted `images` uint8 (N, H, W[, C]) and, if known, `labels` (N,)"
        )
    images, labels = arrays["images"], arrays.get("labels")
    shape = images.shape
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in shape:
        raise DataError(
            f"{path}: `images` is {images.dtype} {shape}, wanted uint8 (N, H, W) or (N, H, W, C) "
            "and no side of 0; scale other ranges to 0..255 first"
        )
    if images.ndim == 4 and shape[3] not in (1, 3):
        raise DataError(f"{path}: `images` has {shape[3]} channels, wanted 1 (grey) or 3 (RGB)")
    if labels is not None and labels.shape != (len(images),):
        raise DataError(f"{path}: `labels` is {labels.shape} for {len(images)} images")
    return _from_arrays(images, labels)


def _members(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    if not zipfile.is_zipfile(path):  # np.load would take a renamed .npy as well
        raise ValueError("it is no zip archive")
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            yield name, arrays[name]


def _from_arrays(images: NDArray[np.uint8], labels: NDArray[np.generic] | None) -> ImageSource:
    count = len(images)
    classes = None
    if labels is not None:
        classes = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    width = len(str(count - 1))
    return ImageSource(
        ids=tuple(str(i).zfill(width) for i in range(count)),
        pictures=list(images),  # views
        labels=classes,
        fingerprint=digest.hexdigest(),
    )


def _folder(root: Path) -> ImageSource:
    names, skipped, other_files = [], [], 0
    digest = hashlib.sha256()
    for path in _walk(root):
        if path.suffix.lower() not in SUFFIXES:
            other_files += 1
            continue
        name = path.relative_to(root).as_posix()
        reason = _unusable_name(name)
        if reason:
            skipped.append(Skipped(name.encode("utf-8", "replace").decode(), reason))
            continue
        names.append(name)
        digest.update(f"{name}\0{path.stat().st_size}\n".encode())
    if not names:
        raise DataError(
            f"{root} holds no image, {other_files} other files and {len(skipped)} unusable names: "
            f"wanted files ending in {', '.join(sorted(SUFFIXES))}"
        )
    return ImageSource(
        ids=tuple(names),
        pictures=[root / name for name in names],
        labels=_labels_from_folders(names),
        fingerprint=digest.hexdigest(),
        skipped=tuple(skipped),
        other_files=other_files,
    )


def _walk(root: Path) -> Iterator[Path]:
    """Files below `root` in sorted order, without hidden ones; linked folders are not entered."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _unusable_name(name: str) -> str | None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8: rename it"
    if len(name) > MAX_ID_LENGTH:
        return f"its path has {len(name)} characters, at most {MAX_ID_LENGTH} can be an id"
    return None


def _labels_from_folders(names: Sequence[str]) -> NDArray[np.int64] | None:
    """The top sub-folder of each image as its class; None where that says nothing."""
    tops = [name.split("/")[0] if "/" in name else "" for name in names]
    classes, labels = np.unique(tops, return_inverse=True)
    if "" in classes or len(classes) < 2:
        return None
    return labels.astype(np.int64)
