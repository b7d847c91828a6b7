"""The pictures of the training report: anchors with near and far positives.

In: what trainer.pictures chose, and the training images. Out: thumbnails as data URIs, and markup.
Correct and wrong are told by sign and word, chosen and not chosen by the kind of frame.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.datasets import ImageSource
from trainer.decode_pool import DecodePool
from trainer.decoding import prepare_all
from trainer.representation.preprocess import InputContract

# 195 of them at most, of noise 9 kB each: 2.4 MB as text; of photos 3 kB.
THUMBNAIL_PX = 96
JPEG_QUALITY = 78

Pictures = Mapping[str, Any]  # see trainer.pictures


def thumbnails(
    pictures: Pictures, train: ImageSource, pool: DecodePool, *, crop_fraction: float
) -> dict[int, str]:
    """A data URI for each seat in `pictures`: the part of the image that the encoder sees.

    Raises:
        DataError: a file can no longer be read.
    """
    seats = sorted({entry["seat"] for entry in _entries(pictures)})
    contract = InputContract(size_px=THUMBNAIL_PX, crop_fraction=crop_fraction)
    images = prepare_all(train.subset(seats), contract, pool)
    return {seat: data_uri(image) for seat, image in zip(seats, images, strict=True)}


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """(H, W, 3) as a JPEG within the page."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def grid(anchors: Sequence[Pictures], shown: Mapping[int, str]) -> str:
    """Markup of some anchors, each with two rows of positives."""
    return f'<div class="anchors">\n{"".join(_anchor(each, shown) for each in anchors)}</div>\n'


def _anchor(anchor: Pictures, shown: Mapping[int, str]) -> str:
    reached, chosen, right = anchor["reached"], anchor["chosen"], anchor["of_its_class"]
    labelled = "" if anchor["label"] is None else f", class {anchor['label']}"
    told = f"reaches {reached}, {chosen} chosen" if reached else "reaches nobody"
    if right is not None and reached:
        told += f"; {right} of {reached} of its class"
    rows = "".join(
        f'<div class="row"><h4>{name}</h4><ul class="tiles">'
        f"{''.join(_tile(each, anchor['label'], shown) for each in anchor[key])}</ul></div>"
        for name, key in (("most similar", "nearest"), ("least similar", "farthest"))
        if anchor[key]
    )
    return (
        f'<article class="anchor"><h3>{escape(anchor["id"])}{labelled} '
        f'<span class="note">{told}</span></h3>'
        f'<img src="{shown[anchor["seat"]]}" alt="anchor {escape(anchor["id"])}">'
        f'<div class="rows">{rows}</div></article>\n'
    )


def _tile(positive: Pictures, label: int | None, shown: Mapping[int, str]) -> str:
    name, hop = escape(positive["id"]), positive["hop"]
    verdict = ""
    if label is not None:
        same = positive["label"] == label
        sign = "✓ same" if same else f"✗ class {positive['label']}"
        verdict = f'<span class="{"same" if same else "other"}">{sign}</span>'
    chosen = "chosen" if positive["chosen"] else "not chosen"
    return (
        f'<li class="tile{" chosen" if positive["chosen"] else ""}" title="{name}, {chosen}">'
        f'<img src="{shown[positive["seat"]]}" alt="{name}, {chosen}">'
        f"<span>{positive['similarity']:.2f} hop {hop}</span>{verdict}</li>"
    )


def _entries(pictures: Pictures) -> Iterator[Pictures]:
    for anchor in (*pictures["first"], *pictures["worst"]):
        yield anchor
        yield from anchor["nearest"]
        yield from anchor["farthest"]
