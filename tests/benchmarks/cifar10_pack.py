"""CIFAR-10 as the benchmarks read it: a pack of JPEG mosaics, 50,000 + 10,000 images of 32 px.

In: the pack, an .npz with `tile`, `labels_train`, `labels_test` and pages `train_0`, `test_0`, ...
Out: pixels and labels. The JPEGs are near-lossless (4:4:4, quality 95); figures say so.
"""

import io
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PACK = Path(__file__).parents[3] / "shared" / "data" / "cifar10_jpeg444_q95.npz"


class Labelled(NamedTuple):
    """Images and their classes."""

    images: NDArray[np.uint8]  # (N, 32, 32, 3)
    labels: NDArray[np.int64]  # (N,)


def read_pack(split: Literal["train", "test"], path: Path = PACK) -> Labelled:
    """Read one split, sorted by class as it is stored.

    Raises:
        SystemExit: the pack is not there.
    """
    if not path.is_file():
        raise SystemExit(f"{path} is not there: give the pack of CIFAR-10 with --pack")
    with np.load(path) as pack:
        height, width = pack["tile"]
        labels = pack[f"labels_{split}"].astype(np.int64)
        tiles = []
        for name in sorted(name for name in pack.files if name.startswith(f"{split}_")):
            page = np.asarray(Image.open(io.BytesIO(pack[name].tobytes())).convert("RGB"))
            rows, columns = page.shape[0] // height, page.shape[1] // width
            grid = page.reshape(rows, height, columns, width, 3).swapaxes(1, 2)
            tiles.append(grid.reshape(-1, height, width, 3))
    return Labelled(np.concatenate(tiles)[: len(labels)], labels)


def balanced(data: Labelled, per_class: int, seed: int) -> Labelled:
    """Draw `per_class` images of each class, shuffled."""
    draw = np.random.default_rng(seed)
    chosen = np.concatenate(
        [
            draw.permutation(np.flatnonzero(data.labels == label))[:per_class]
            for label in np.unique(data.labels)
        ]
    )
    chosen = draw.permutation(chosen)
    return Labelled(data.images[chosen], data.labels[chosen])
