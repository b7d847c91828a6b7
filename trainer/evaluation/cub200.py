"""Caltech-UCSD Birds 200-2011 as it was published, for which torchvision has no class.

In: a `Cub200Dataset`, whose root holds images/, images.txt, image_class_labels.txt,
train_test_split.txt and classes.txt. Out: its sources of `train` and `test`, classes as published.
"""

from dataclasses import replace

import numpy as np

from trainer.datasets import DataError, ImageSource
from trainer.datasets.files import from_files
from trainer.datasets.source import unusable_name
from trainer.evaluation.dataset_specs import TEST, TRAIN, Cub200Dataset

IMAGES = "images.txt"  # `1 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg` a line
LABELS = "image_class_labels.txt"  # `1 1` a line: the image, its class
SPLIT = "train_test_split.txt"  # `1 0` a line: the image, whether it is a training one
CLASSES = "classes.txt"  # `1 001.Black_footed_Albatross` a line


def open_cub200(spec: Cub200Dataset) -> dict[str, ImageSource]:
    """The published training and test images.

    Raises:
        DataError: a file is missing, damaged, or does not know an image or class of another one.
    """
    names, labels, training, classes = (
        _numbered(spec, name) for name in (IMAGES, LABELS, SPLIT, CLASSES)
    )
    for file, known in ((LABELS, labels), (SPLIT, training)):
        if known.keys() != names.keys():
            number = min(names.keys() ^ known.keys(), key=int)
            raise _wrong(spec, f"{IMAGES} and {file} do not list the same images, first {number}")
    for number, name in names.items():
        if labels[number] not in classes or training[number] not in ("0", "1"):
            raise _wrong(
                spec,
                f"image {number} has the class {labels[number]} and the split {training[number]}: "
                f"wanted a class of {CLASSES}, and 1 for training or 0",
            )
        reason = unusable_name(name)
        if reason or name.startswith("/") or ".." in name.split("/"):
            raise _wrong(spec, f"image {number}: {reason or f'{name!r} lies outside images/'}")
    class_names = tuple(classes[number] for number in sorted(classes, key=int))
    found = {}
    for split, flag in ((TRAIN, "1"), (TEST, "0")):
        chosen = [number for number in sorted(names, key=int) if training[number] == flag]
        if not chosen:
            raise _wrong(spec, f"{SPLIT} gives no image to {split}")
        source = from_files(spec.root / "images", [names[number] for number in chosen], None)
        seats = {name: seat for seat, name in enumerate(class_names)}
        own = np.array([seats[classes[labels[number]]] for number in chosen], np.int64)
        found[split] = replace(source, labels=own, class_names=class_names)
    return found


def _numbered(spec: Cub200Dataset, file: str) -> dict[str, str]:
    """What a file says of each number."""
    path = spec.root / file
    try:
        lines = [line.split(maxsplit=1) for line in path.read_text("utf-8").splitlines()]
        values = {number: value.strip() for number, value in filter(None, lines) if int(number) > 0}
    except (OSError, ValueError) as error:
        raise _wrong(
            spec,
            f"{path} cannot be read ({error}): wanted `NUMBER VALUE` a line, as CUB_200_2011 was "
            "published",
        ) from error
    return values


def _wrong(spec: Cub200Dataset, message: str) -> DataError:
    return DataError(f"data set {spec.name}: {message}")
