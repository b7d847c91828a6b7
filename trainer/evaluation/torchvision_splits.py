"""The splits that torchvision's sets were published with.

In: a set's name and root. Out: its sources by split; a set that was published undivided is all
`train`, for the caller to divide. Whose published training set comes in two halves that are usually
joined (`trainval`), has no `validation` here.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from trainer.datasets import ImageSource
from trainer.datasets.torchvision_sets import TORCHVISION_SETS, open_torchvision_set
from trainer.evaluation.dataset_specs import TEST, TRAIN, VALIDATION


class _Published(NamedTuple):
    """How a split other than the training one is asked for."""

    arguments: dict[str, Any]  # of torchvision's class
    wanted: tuple[str, ...] | None = None  # paths below root; None: those of the training split


_SPLITS: dict[str, dict[str, _Published]] = {
    "cifar10": {TEST: _Published({"train": False})},
    "cifar100": {TEST: _Published({"train": False})},
    "svhn": {TEST: _Published({"split": "test"}, ("test_32x32.mat",))},
    "imagenet": {TEST: _Published({}, ("val",))},
    "places365": {
        TEST: _Published({"split": "val"}, ("categories_places365.txt", "places365_val.txt"))
    },
    "flowers102": {
        VALIDATION: _Published({"split": "val"}),
        TEST: _Published({"split": "test"}),
    },
    "pets": {TEST: _Published({"split": "test"})},
    "cars": {
        TEST: _Published(
            {"split": "test"},
            ("stanford_cars/cars_test_annos_withlabels.mat", "stanford_cars/cars_test"),
        )
    },
    "aircraft": {TEST: _Published({"split": "test"})},
    "dtd": {VALIDATION: _Published({"split": "val"}), TEST: _Published({"split": "test"})},
    "food101": {TEST: _Published({"split": "test"})},
}


def open_torchvision_splits(name: str, root: Path) -> dict[str, ImageSource]:
    """The splits of one of `TORCHVISION_SETS`.

    Raises:
        DataError: files are missing or not those torchvision knows.
    """
    known = TORCHVISION_SETS[name]
    found = {TRAIN: open_torchvision_set(name, root)}
    for split, published in _SPLITS.get(name, {}).items():
        asked = replace(known, split=published.arguments, wanted=published.wanted or known.wanted)
        found[split] = open_torchvision_set(name, root, split=asked)
    return found
