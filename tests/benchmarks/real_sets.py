"""Parts of CIFAR-10, Fashion-MNIST and WM-811K as the packed arrays that evaluations read.

In: `../shared/data`, and how many images of each class; fewer where a class has fewer. Out:
train.npz and test.npz in a folder. Drawn by seed 0.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.cifar10_pack import balanced, read_pack

DATA = Path(__file__).parents[3] / "shared" / "data"


def cifar10(root: Path, per_class: Mapping[str, int]) -> None:
    """32 px, RGB, from the near-lossless JPEG pack."""
    for split, count in per_class.items():
        few = balanced(read_pack(split, DATA / FILES["cifar10"]), count, seed=0)  # type: ignore[arg-type]
        np.savez(root / f"{split}.npz", images=few.images, labels=few.labels)


def fashion(root: Path, per_class: Mapping[str, int]) -> None:
    """28 px, grey."""
    with np.load(DATA / FILES["fashion"], allow_pickle=False) as arrays:
        for split, count in per_class.items():
            rows = _drawn(arrays[f"y_{split}"], count)
            images, labels = arrays[f"x_{split}"][rows], arrays[f"y_{split}"][rows]
            np.savez(root / f"{split}.npz", images=images, labels=labels)


def wm811k(root: Path, per_class: Mapping[str, int]) -> None:
    """Wafer maps, each of a size of its own."""
    with np.load(DATA / FILES["wm811k"], allow_pickle=False) as arrays:
        for split, count in per_class.items():
            shapes, labels = arrays[f"shape_{split}"].astype(np.int64), arrays[f"labels_{split}"]
            ends, maps = shapes.prod(axis=1).cumsum(), arrays[f"maps_{split}"]
            rows = _drawn(labels, count)
            pixels = [maps[ends[i] - shapes[i].prod() : ends[i]] for i in rows]
            np.savez(
                root / f"{split}.npz",
                pixels=np.concatenate(pixels),
                shapes=shapes[rows],
                labels=labels[rows],
            )


FILES = {
    "cifar10": "cifar10_jpeg444_q95.npz",
    "fashion": "fashion_mnist.npz",
    "wm811k": "wm811k_42951.npz",
}
WRITE: Mapping[str, Callable[[Path, Mapping[str, int]], None]] = {
    "cifar10": cifar10,
    "fashion": fashion,
    "wm811k": wm811k,
}


def _drawn(labels: NDArray[np.integer], count: int) -> NDArray[np.int64]:
    draw = np.random.default_rng(0)
    parts = [
        draw.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)
    ]
    return np.concatenate(parts)
