"""How an image file becomes the uint8 square that an encoder takes. Trainer and service both call
`prepare`, so that one picture has one embedding.

In: bytes, a path or an open file of a picture. Out: (S, S, 3) uint8 RGB as the contract says, or
`ImageRejected` with a reason a person can act on. Scaling to floats, mean and standard deviation
are not here: they are inside the exported graph.
"""

import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from trainer.representation.image_headers import refusal
from trainer.representation.quiet import without_warnings

# Formats that may come from strangers. The trainer adds some for folders that are one's own.
SERVED_FORMATS = ("JPEG", "PNG", "WEBP")

# The header is believed before anything is decoded: 50 Mpx decode to 150 MB of RGB.
MAX_PIXELS = 50_000_000

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_BAND_PIXELS = 2**20  # pixels converted at a time: intermediates stay small beside the picture
# Bytes of memory for a pixel while it is decoded. Pillow keeps RGB in 4 bytes; a mode that is not
# RGB stands beside its conversion; libwebp holds the canvas twice, Pillow a copy and the picture.
_RGB_BYTES, _CONVERTED_BYTES, _WEBP_BYTES = 4, 8, 18
_COEFFICIENT_BYTES = 2 * 3  # of a progressive JPEG, all at once, at its full size

Source = bytes | str | Path | BinaryIO


class ImageRejected(ValueError):
    """A picture that cannot or may not be decoded; the message says what was found and wanted."""


class LargeImage(ImageRejected):
    """A picture that is fine so far, but takes more memory to decode than the caller allowed.

    `takes_bytes` is about what it takes.
    """

    def __init__(self, takes_bytes: int, most_bytes: int) -> None:
        super().__init__(f"decoding takes about {takes_bytes:,} bytes; {most_bytes:,} are allowed")
        self.takes_bytes = takes_bytes


@dataclass(frozen=True)
class InputContract:
    """What the encoder was trained to see; stored in its bundle and obeyed by everyone.

    The largest central square of the upright image, reduced to `crop_fraction` of its side, is
    resized to `size_px`. Transparent parts are laid on white, 16-bit grey is scaled to 8 bits,
    embedded colour profiles are ignored, only the first frame of an animation counts.
    """

    size_px: int  # side of the square the encoder takes, 8..1024
    crop_fraction: float = 1.0  # share of the short side that is kept, in (0, 1]
    resample: str = "bilinear"  # nearest, bilinear or bicubic; area-averaging when shrinking
    jpeg_draft: bool = True  # JPEGs may be decoded at 1/2, 1/4 or 1/8 while still large enough

    def __post_init__(self) -> None:
        if not 8 <= self.size_px <= 1024:
            raise ValueError(f"size_px must be in 8..1024, got {self.size_px}")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction must be in (0, 1], got {self.crop_fraction}")
        if self.resample not in _RESAMPLE:
            raise ValueError(f"resample must be one of {list(_RESAMPLE)}, got {self.resample!r}")

    def as_dict(self) -> dict[str, object]:
        """The contract as it stands in a bundle's manifest."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "InputContract":
        """Read a contract; an unknown or missing field or a value out of range is a ValueError."""
        known = {field.name for field in dataclasses.fields(cls)}
        if set(values) != known:
            raise ValueError(f"an input contract has the fields {sorted(known)}, got {values}")
        return cls(**values)  # type: ignore[arg-type]


def prepare(
    source: Source,
    contract: InputContract,
    *,
    formats: tuple[str, ...] = SERVED_FORMATS,
    max_pixels: int = MAX_PIXELS,
    most_bytes: int | None = None,
) -> NDArray[np.uint8]:
    """Decode a picture and bring it to the contract: (S, S, 3) uint8 RGB, S = contract.size_px.

    Raises:
        LargeImage: `most_bytes` is given and decoding would take more memory than that.
        ImageRejected: not one of `formats`, more than `max_pixels`, truncated or damaged, or made
            to take long (scans, frames, chunks).
        OSError: `source` is a path that cannot be opened.
    """
    least_side = None
    if contract.jpeg_draft:
        least_side = int(np.ceil(contract.size_px / contract.crop_fraction))
    image = decode(
        source,
        formats=formats,
        max_pixels=max_pixels,
        least_side_px=least_side,
        most_bytes=most_bytes,
    )
    return fit(image, contract)


def fit(image: Image.Image, contract: InputContract) -> NDArray[np.uint8]:
    """Bring an upright RGB image to the contract: (S, S, 3) uint8."""
    width, height = image.size
    side = min(width, height) * contract.crop_fraction
    left, top = (width - side) / 2, (height - side) / 2
    square = image.resize(
        (contract.size_px, contract.size_px),
        _RESAMPLE[contract.resample],
        box=(left, top, left + side, top + side),  # no copy of the crop, no giant intermediate
    )
    return np.asarray(square)


def fit_array(pixels: NDArray[np.uint8], contract: InputContract) -> NDArray[np.uint8]:
    """Bring one decoded image, (H, W), (H, W, 1) or (H, W, 3) uint8, to the contract."""
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or min(pixels.shape[:2]) < 1:
        raise ImageRejected(f"wanted uint8 (H, W[, 1 or 3]), got {pixels.dtype} {pixels.shape}")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim == 3 and pixels.shape[2] != 3:
        raise ImageRejected(f"wanted 1 or 3 channels, got {pixels.shape[2]}")
    return fit(Image.fromarray(pixels).convert("RGB"), contract)


def decode(
    source: Source,
    *,
    formats: tuple[str, ...] = SERVED_FORMATS,
    max_pixels: int = MAX_PIXELS,
    least_side_px: int | None = None,
    most_bytes: int | None = None,
) -> Image.Image:
    """Decode a picture to an upright RGB image.

    Args:
        source: encoded bytes, a path, or a binary file at its start.
        formats: Pillow's names of the formats to try.
        max_pixels: width x height allowed, read from the header before decoding.
        least_side_px: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as its short
            side keeps this many pixels; None always decodes it whole.
        most_bytes: memory that decoding may take, estimated from the header; None for any.

    Raises:
        LargeImage: decoding would take more than `most_bytes`.
        ImageRejected: not one of `formats`, more than `max_pixels`, truncated or damaged, or made
            to take long (scans, frames, chunks).
        OSError: `source` is a path that cannot be opened.
    """
    if isinstance(source, str | Path):
        source = Path(source).read_bytes()
    content = source if isinstance(source, bytes) else source.read()
    if not content:
        raise ImageRejected("the file is empty (0 bytes)")
    # Pillow warns of large and of odd files; the limits here are our own, and oddness that does
    # not stop the decoder does not matter.
    with without_warnings():
        try:
            return _decode(content, formats, max_pixels, least_side_px, most_bytes)
        except ImageRejected:
            raise
        # A decoder fed with damage raises nearly anything: OSError, SyntaxError, struct.error, ...
        except Exception as error:
            raise ImageRejected(_reason(error, formats, max_pixels)) from error


def _decode(
    content: bytes,
    formats: tuple[str, ...],
    max_pixels: int,
    least_side_px: int | None,
    most_bytes: int | None,
) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(content), formats=formats)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageRejected(
            f"the image has {width} x {height} = {width * height:,} pixels; at most "
            f"{max_pixels:,} are decoded: scale it down"
        )
    kind = image.format or ""
    reason = refusal(content, kind, pixels=width * height, max_pixels=max_pixels)
    if reason is not None:
        raise ImageRejected(reason)
    if kind == "JPEG" and least_side_px is not None:
        scale = least_side_px / min(width, height)
        image.draft(None, (int(np.ceil(width * scale)), int(np.ceil(height * scale))))
    if most_bytes is not None and (takes := _decoding_bytes(image, width * height)) > most_bytes:
        raise LargeImage(takes, most_bytes)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image)


def _decoding_bytes(image: Image.Image, whole_pixels: int) -> int:
    """About how much memory decoding an opened picture takes at most; `whole_pixels` before any
    draft."""
    pixels = image.size[0] * image.size[1]
    if image.format == "WEBP":
        return pixels * _WEBP_BYTES
    converted = image.mode != "RGB" or "transparency" in image.info
    takes = pixels * (_CONVERTED_BYTES if converted else _RGB_BYTES)
    if "progressive" in image.info:
        takes += whole_pixels * _COEFFICIENT_BYTES
    return takes


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageRejected("floating-point pixels have no fixed range: save the image with 8 bits")
    plain = image.mode not in (*_SIXTEEN_BIT_MODES, *_ALPHA_MODES)
    if plain and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB")
    width, height = image.size
    rows = max(1, _BAND_PIXELS // width)
    if rows >= height:
        return _band_to_rgb(image)
    whole = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height)))
        whole.paste(_band_to_rgb(band), (0, top))
    return whole


def _band_to_rgb(image: Image.Image) -> Image.Image:
    """Some rows, each pixel by itself: 16-bit grey scaled, transparent parts laid on white."""
    if image.mode in _SIXTEEN_BIT_MODES:
        # convert("L") would clip at 255; 65535 / 257 = 255 exactly.
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    layer = image.convert("RGBA")
    ground = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(ground, layer).convert("RGB")


def _reason(error: Exception, formats: tuple[str, ...], max_pixels: int) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"this is no readable {', '.join(formats)} image"
    if isinstance(error, Image.DecompressionBombError):
        # Pillow's own check comes first; its message holds the size.
        size = str(error).rstrip(".")
        return f"{size}; at most {max_pixels:,} pixels are decoded: scale it down"
    return f"the image is damaged or cut short ({type(error).__name__}: {error})"
