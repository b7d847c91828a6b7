"""Whatever the caller holds as a picture, as encoded bytes.

In: a path, file:// URL, folder, bytes, an open binary file, a PIL image or a uint8 array.
Out: bytes of an image file. PIL and numpy are only looked at when the caller has imported them.
"""

import base64
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, TypeGuard

from client.paths import FileInFolder, local_path, pictures_in

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    ImageInput: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Image | NDArray[np.uint8]
    ImagesInput: TypeAlias = ImageInput | Iterable[ImageInput]

# Modes that PNG stores without loss; the others hold no more than 8-bit RGB shows.
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"})


def encode(image: "ImageInput") -> bytes:
    """Return the picture as an image file: files and bytes as they are, pixels as PNG.

    Raises:
        TypeError: none of the known kinds, or an array of another shape or type.
        OSError: the path cannot be read.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return local_path(image).read_bytes()
    if _is_pil(image):
        return _png(image)
    if _is_array(image):
        return _png(_picture(image))
    read = getattr(image, "read", None)
    if read is not None:
        content = read()
        if isinstance(content, bytes):
            return content
        raise TypeError(f"{image!r} is open as text: open it with mode 'rb'")
    raise TypeError(
        f"got a {type(image).__name__} as image; wanted a path, bytes, an open binary file, a PIL "
        "image or a uint8 array of (H, W) or (H, W, 3)"
    )


def each(images: "ImagesInput") -> Iterator["ImageInput"]:
    """One by one: a single picture as one, an iterable as it comes, a folder file by file.

    Raises:
        ValueError: an http(s) address, or a folder without pictures.
    """
    if is_prepared(images):
        raise TypeError(
            f"an array of shape {images.shape} is a batch already prepared to the model's input, "
            "which only embed() takes: pass list(array) to have each one read as a picture"
        )
    if isinstance(images, str | os.PathLike):
        path = local_path(images)
        if path.is_dir():
            yield from pictures_in(path)
        else:
            yield images
    elif (
        isinstance(images, bytes | bytearray | memoryview)
        or _is_pil(images)
        or _is_array(images)
        or hasattr(images, "read")
    ):
        yield images  # type: ignore[misc]
    elif isinstance(images, Iterable):
        for image in images:
            if isinstance(image, str | os.PathLike) and local_path(image).is_dir():
                yield from pictures_in(local_path(image))
            else:
                yield image
    else:
        yield images  # encode() says what is wrong with it


def file_name(image: "ImageInput") -> str | None:
    """The picture's id where the caller gives none: the name of its file, or its path from the
    folder that was given; None without a file."""
    if isinstance(image, FileInFolder):
        return image.id
    if isinstance(image, str | os.PathLike):
        return local_path(image).name
    name = getattr(image, "name", None)
    return Path(name).name if isinstance(name, str) else None


def as_base64(content: bytes) -> str:
    """For a place in a JSON document."""
    return base64.b64encode(content).decode("ascii")


def is_prepared(images: object) -> TypeGuard["NDArray[np.uint8]"]:
    """Whether this is a batch (n, S, S, 3): pictures already prepared to the input contract."""
    return _is_array(images) and images.ndim == 4


def npy(rows: "Sequence[NDArray[np.uint8]]") -> bytes:
    """Prepared pictures (S, S, 3) as a .npy file (n, S, S, 3)."""
    import numpy as np

    file = io.BytesIO()
    np.save(file, np.stack(rows), allow_pickle=False)
    return file.getvalue()


def _picture(pixels: "NDArray[np.uint8]") -> "Image":
    right_shape = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if pixels.dtype != "uint8" or not right_shape or 0 in pixels.shape:
        raise TypeError(
            f"got an array of {pixels.dtype} {pixels.shape}; wanted uint8 (H, W) or (H, W, 3), RGB"
        )
    try:
        import PIL.Image
    except ImportError:
        raise TypeError(
            "an array needs Pillow to become a PNG: pip install pillow, or pass encoded bytes"
        ) from None
    return PIL.Image.fromarray(pixels)


def _png(image: "Image") -> bytes:
    if image.mode == "F":
        raise TypeError("floating-point pixels have no fixed range: convert the image to 8 bits")
    exif = image.getexif()  # holds the orientation, which the service applies
    if image.mode not in _PNG_MODES:
        image = image.convert("RGB")
    file = io.BytesIO()
    # Level 1: a fifth of the time of the default for some 10 % more bytes; lossless all the same.
    image.save(file, "PNG", compress_level=1, exif=exif.tobytes() if exif else None)
    return file.getvalue()


def _is_array(value: object) -> TypeGuard["NDArray[np.uint8]"]:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _is_pil(value: object) -> TypeGuard["Image"]:
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(value, pil.Image)
