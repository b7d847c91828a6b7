"""Small data and recipes that the trainer's tests share."""

import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.trainer.pretraining import run
from trainer.augment import Collated
from trainer.config import Recipe, load_recipe

__all__ = ["run"]  # a fixture

# A run of a second: a small encoder on 8 px images.
TINY = (
    "epochs=2",
    "batch_size=8",
    "device=cpu",
    "encoder.image_size_px=8",
    "encoder.dim=8",
    "bank.num_neighbours=2",
    "loss.num_background=16",
    "loss.steps=2",
    "loss.num_positives=4",
    "loss.warmup_epochs=1",
    "monitor.every_epochs=1",
    "checkpoint.every_epochs=1",
    "export.variants=[]",  # tests/trainer/test_variants.py makes them
)


@pytest.fixture
def tiny_overrides() -> tuple[str, ...]:
    return TINY


@pytest.fixture
def tiny_recipe() -> Callable[..., Recipe]:
    """Make the recipe `digits` tiny, with further overrides."""

    def make(*overrides: str) -> Recipe:
        return load_recipe("digits", [*TINY, *overrides])

    return make


@pytest.fixture
def packed(tmp_path: Path) -> Callable[..., Path]:
    """Write an .npz of random images in two classes, the second one brighter."""

    def write(count: int = 40, *, side: int = 10, labels: bool = True) -> Path:
        draw = np.random.default_rng(0)
        classes = np.arange(count) % 2
        images = draw.integers(0, 128, (count, side, side, 3)) + 100 * classes[:, None, None, None]
        path = tmp_path / "packed.npz"
        arrays = {"images": images.astype(np.uint8)}
        if labels:
            arrays["labels"] = classes
        np.savez(path, **arrays)
        return path

    return write


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder of `count` small PNGs, nested in two classes or flat."""

    def write(count: int = 20, *, nested: bool = True) -> Path:
        root = tmp_path / "pictures"
        draw = np.random.default_rng(0)
        for i in range(count):
            folder = root / ("dark", "light")[i % 2] if nested else root
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 128, (12 + i % 3, 12, 3)) + 100 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
        return root

    return write


@pytest.fixture(scope="session")
def huge_png() -> bytes:
    """The header of a PNG of 20,000 x 20,000 pixels: nobody may try to decode what follows."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)), (b"IDAT", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    return content


@pytest.fixture
def images_of() -> Callable[[Iterable[Collated]], list[list[np.ndarray]]]:
    """Copy each batch's images, (h, w, 3), out of its block before the next one is asked for."""

    def copied(batches: Iterable[Collated]) -> list[list[np.ndarray]]:
        return [
            [
                row[:height, :width].numpy().copy()
                for row, (height, width) in zip(block.pixels, block.sizes.tolist(), strict=True)
            ]
            for block in batches
        ]

    return copied
