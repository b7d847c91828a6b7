"""Images that fit into memory as pixels: a packed .npz, the built-in digits.

In: an .npz of plain arrays. Out: an `ImageSource` whose pictures are views of one array.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.datasets.source import DataError, ImageSource, classes_of


def open_digits() -> ImageSource:
    """scikit-learn's 1,797 handwritten digits, 8 x 8."""
    # Imported here: scikit-learn takes a second, which every decoding process would pay.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # 0..16 in steps of one becomes 0..255; 16 x 15.9375 = 255.
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    return from_images(images, np.asarray(bunch.target))


def open_packed(path: Path) -> ImageSource:
    """An .npz with `images`, or `pixels` and `shapes` where they differ in size; perhaps `labels`.

    Raises:
        DataError: damaged, or arrays of another form.
    """
    try:
        arrays = dict(_members(path))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as an .npz of plain arrays: {error}") from error
    ragged = {"pixels", "shapes"} <= set(arrays)
    if ragged == ("images" in arrays):
        found = "both forms" if ragged else "no array 'images', only"
        raise DataError(
            f"{path} has {found} {sorted(arrays)}: wanted `images` uint8 (N, H, W[, C]), or "
            "`pixels` uint8 (all of them) and `shapes` (N, 2 or 3); if known, `labels` (N,)"
        )
    labels = arrays.get("labels")
    count = len(arrays["shapes"] if ragged else arrays["images"])
    if labels is not None and labels.shape != (count,):
        raise DataError(f"{path}: `labels` is {labels.shape} for {count} images")
    if ragged:
        return _ragged(path, arrays["pixels"], arrays["shapes"], labels)
    images = arrays["images"]
    shape = images.shape
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in shape:
        raise DataError(
            f"{path}: `images` is {images.dtype} {shape}, wanted uint8 (N, H, W) or (N, H, W, C) "
            "and no side of 0; scale other ranges to 0..255 first"
        )
    if images.ndim == 4 and shape[3] not in (1, 3):
        raise DataError(f"{path}: `images` has {shape[3]} channels, wanted 1 (grey) or 3 (RGB)")
    return from_images(images, labels)


def from_images(images: NDArray[np.uint8], labels: NDArray[np.generic] | None) -> ImageSource:
    """The source of N images (N, H, W[, 1 or 3]) of one size, with labels (N,) of any kind."""
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    return _from_pictures(list(images), labels, digest.hexdigest())  # views


def _ragged(
    path: Path,
    pixels: NDArray[Any],
    shapes: NDArray[Any],
    labels: NDArray[np.generic] | None,
) -> ImageSource:
    if pixels.dtype != np.uint8 or pixels.ndim != 1:
        raise DataError(
            f"{path}: `pixels` is {pixels.dtype} {pixels.shape}, wanted uint8 (total,), one image "
            "after the other in rows; scale other ranges to 0..255 first"
        )
    if shapes.dtype.kind not in "iu" or shapes.ndim != 2 or shapes.shape[1] not in (2, 3):
        raise DataError(
            f"{path}: `shapes` is {shapes.dtype} {shapes.shape}, wanted integers (N, 2) for "
            "(H, W) or (N, 3) for (H, W, C)"
        )
    shapes = shapes.astype(np.int64)
    wrong = (shapes < 1).any(axis=1)
    if shapes.shape[1] == 3:
        wrong |= ~np.isin(shapes[:, 2], (1, 3))
    if len(shapes) == 0 or wrong.any():
        worst = (
            f"row {wrong.argmax()} is {shapes[wrong.argmax()]}" if wrong.any() else "it is empty"
        )
        raise DataError(
            f"{path}: `shapes` must hold sides of at least 1 and 1 or 3 channels, but {worst}"
        )
    ends = shapes.prod(axis=1).cumsum()
    if ends[-1] != len(pixels):
        raise DataError(
            f"{path}: `shapes` ask for {ends[-1]} values, `pixels` holds {len(pixels)}: "
            "wanted the product of each row, summed"
        )
    digest = hashlib.sha256(repr(shapes.shape).encode())
    digest.update(shapes.data)
    digest.update(np.ascontiguousarray(pixels).data)
    pictures = [
        pixels[end - shape.prod() : end].reshape(shape)
        for end, shape in zip(ends, shapes, strict=True)
    ]
    return _from_pictures(pictures, labels, digest.hexdigest())


def _from_pictures(
    pictures: list[NDArray[np.uint8]], labels: NDArray[np.generic] | None, fingerprint: str
) -> ImageSource:
    width = len(str(len(pictures) - 1))
    classes = classes_of(labels)
    return ImageSource(
        ids=tuple(str(i).zfill(width) for i in range(len(pictures))),
        pictures=pictures,
        labels=classes.labels,
        fingerprint=fingerprint,
        class_names=classes.names,
    )


def _members(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    if not zipfile.is_zipfile(path):  # np.load would take a renamed .npy as well
        raise ValueError("it is no zip archive")
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            yield name, arrays[name]
