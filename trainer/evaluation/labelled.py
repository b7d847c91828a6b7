"""What a labelled data set is: splits of images with classes, perhaps several an image, and boxes.

In: what trainer.evaluation.datasets found. Out: read-only values with a fingerprint.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.datasets import ImageSource
from trainer.evaluation.dataset_specs import TEST, TRAIN, VALIDATION
from trainer.evaluation.job import JobError


class Boxes(NamedTuple):
    """The objects of one image."""

    corners: NDArray[np.float32]  # (M, 4): left, top, right, bottom in pixels, from 0
    labels: NDArray[np.int64]  # (M,) 0..C-1
    difficult: NDArray[np.bool_]  # (M,) neither found nor missed counts


@dataclass(frozen=True)
class LabelledSplit:
    """N images with what is known of them.

    Attributes:
        source: ids and pictures; its `labels` (N,) are 0..C-1, None where an image has several.
        targets: (N, C) int8: 1 the class is there, 0 it is not, -1 difficult: not counted. Only
            where an image has several classes.
        boxes: N, where the set has them.
    """

    source: ImageSource
    targets: NDArray[np.int8] | None = None
    boxes: tuple[Boxes, ...] | None = None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) classes 0..C-1.

        Raises:
            JobError: an image has several.
        """
        if self.source.labels is None:
            raise JobError(
                "the images of this data set have several classes each: ask for voc07_svm or "
                "detection, or give a data set with one class an image"
            )
        return self.source.labels

    def subset(self, rows: Sequence[int] | NDArray[np.int64]) -> "LabelledSplit":
        """The images at `rows`, in that order."""
        return LabelledSplit(
            self.source.subset(rows),
            None if self.targets is None else self.targets[np.asarray(rows, np.int64)],
            None if self.boxes is None else tuple(self.boxes[int(row)] for row in rows),
        )


@dataclass(frozen=True)
class LabelledDataset:
    """A data set whose splits share their classes.

    Attributes:
        name, kind: as registered.
        splits: `train` and `test`, perhaps `validation`; no image is in two of them.
        class_names: C.
        fingerprint: sha256 (hex) of the splits' images by name and size (or bytes), and labels.
        divided_by_seed: the set has no test split of its own.
        max_skipped: share of broken images that is left out.
        published_as: torchvision's name of the set, None of other kinds.
    """

    name: str
    kind: str
    splits: Mapping[str, LabelledSplit]
    class_names: tuple[str, ...]
    fingerprint: str
    divided_by_seed: bool
    max_skipped: float
    published_as: str | None = None

    @property
    def train(self) -> LabelledSplit:
        """What may be learned from."""
        return self.splits[TRAIN]

    @property
    def test(self) -> LabelledSplit:
        """What is counted, and decides nothing."""
        return self.splits[TEST]

    @property
    def validation(self) -> LabelledSplit | None:
        """What settings may be chosen on; None where the set has none of its own."""
        return self.splits.get(VALIDATION)


def fingerprint_of(split: LabelledSplit) -> str:
    """sha256 (hex) of the images of a split as its source names and sizes them, and their order."""
    digest = hashlib.sha256(split.source.fingerprint.encode())
    for name in split.source.ids:
        digest.update(f"{name}\0".encode())
    return digest.hexdigest()


def fingerprint_of_all(splits: Mapping[str, LabelledSplit], class_names: Sequence[str]) -> str:
    """sha256 (hex) of the splits and their labels."""
    digest = hashlib.sha256("\0".join(class_names).encode())
    for name, split in sorted(splits.items()):
        digest.update(f"\n{name} {fingerprint_of(split)}\n".encode())
        for values in (split.source.labels, split.targets):
            digest.update(b"" if values is None else np.ascontiguousarray(values).tobytes())
        for boxes in split.boxes or ():
            for part in boxes:
                digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
