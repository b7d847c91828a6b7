"""torchvision's labelled sets by name and root: torchvision says which files and labels, we decode.

In: `NAME:ROOT`, with what torchvision's own class would have put below ROOT; nothing is downloaded
or unpacked. Out: an `ImageSource` of the training split.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.datasets.arrays import from_images
from trainer.datasets.files import from_files, open_folder
from trainer.datasets.source import DataError, ImageSource

Listing = tuple[Sequence[Path | str], Sequence[int]]  # N files, N labels


@dataclass(frozen=True)
class TorchvisionSet:
    """How one of torchvision's classes is opened and what is taken from it.

    Attributes:
        kind: name of the class in torchvision.datasets.
        wanted: paths below ROOT that must be there.
        read: takes the opened set and ROOT and gives the source; None: `wanted[0]` is a folder
            whose sub-folders are the classes, for which torchvision needs not be asked.
        split: arguments that choose the training split.
    """

    kind: str
    wanted: tuple[str, ...]
    read: Callable[[Any, Path], ImageSource] | None
    split: dict[str, Any] = field(default_factory=dict)


def open_torchvision_set(
    name: str, root: Path, *, split: TorchvisionSet | None = None
) -> ImageSource:
    """One of `TORCHVISION_SETS`: its training split, or what `split` says in its place.

    Raises:
        DataError: files are missing or not those torchvision knows.
    """
    known = split or TORCHVISION_SETS[name]
    missing = [path for path in known.wanted if not (root / path).exists()]
    if missing:
        raise DataError(
            f"{name}:{root} lacks {', '.join(missing)}: torchvision.datasets.{known.kind} wants "
            f"{', '.join(known.wanted)} below {root}. Nothing is downloaded here: put the set there"
        )
    if known.read is None:
        return open_folder(root / known.wanted[0])
    # Imported here: it brings torch, which costs every decoding process seconds and hundreds of MB.
    from torchvision import datasets

    options: dict[str, Any] = dict(known.split)
    if name == "places365":
        options["small"] = not (root / "data_large_standard").is_dir()
    try:
        opened = getattr(datasets, known.kind)(str(root), download=False, **options)
        return known.read(opened, root)
    except (RuntimeError, OSError, ValueError, LookupError, EOFError) as error:
        raise DataError(
            f"{name}:{root} is not what torchvision.datasets.{known.kind} expects ({error}): put "
            "the original files there again; nothing is downloaded here"
        ) from error


def _cifar(opened: Any, root: Path) -> ImageSource:
    return from_images(opened.data, np.asarray(opened.targets))  # (N, 32, 32, 3)


def _svhn(opened: Any, root: Path) -> ImageSource:
    return from_images(np.ascontiguousarray(opened.data.transpose(0, 2, 3, 1)), opened.labels)


def _listing(read: Callable[[Any], Listing]) -> Callable[[Any, Path], ImageSource]:
    """The source of the files and labels that `read` finds in an opened set."""

    def source(opened: Any, root: Path) -> ImageSource:
        files, labels = read(opened)
        names = [Path(file).relative_to(root).as_posix() for file in files]
        # Not every class gives a stable order: SUN397's is the file system's.
        order = sorted(range(len(names)), key=names.__getitem__)
        return from_files(root, [names[i] for i in order], [int(labels[i]) for i in order])

    return source


def _unzipped(pairs: Sequence[tuple[str, int]]) -> Listing:
    return [file for file, _ in pairs], [label for _, label in pairs]


def _caltech101(opened: Any) -> Listing:
    files = [
        Path(opened.root, "101_ObjectCategories", opened.categories[label], f"image_{i:04d}.jpg")
        for i, label in zip(opened.index, opened.y, strict=True)
    ]
    return files, opened.y


_image_files = _listing(lambda opened: (opened._image_files, opened._labels))

TORCHVISION_SETS = {
    "cifar10": TorchvisionSet("CIFAR10", ("cifar-10-batches-py",), _cifar, {"train": True}),
    "cifar100": TorchvisionSet("CIFAR100", ("cifar-100-python",), _cifar, {"train": True}),
    "svhn": TorchvisionSet("SVHN", ("train_32x32.mat",), _svhn, {"split": "train"}),
    # torchvision's class would ask for the devkit too, and unpack archives for hours.
    "imagenet": TorchvisionSet("ImageNet", ("train",), None),
    "places365": TorchvisionSet(
        "Places365",
        ("categories_places365.txt", "places365_train_standard.txt"),
        _listing(lambda opened: _unzipped(opened.imgs)),
        {"split": "train-standard"},
    ),
    "flowers102": TorchvisionSet(
        "Flowers102",
        tuple(f"flowers-102/{name}" for name in ("jpg", "imagelabels.mat", "setid.mat")),
        _image_files,
        {"split": "train"},
    ),
    "pets": TorchvisionSet(
        "OxfordIIITPet",
        ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations"),
        _listing(lambda opened: (opened._images, opened._labels)),
        {"split": "trainval"},
    ),
    "cars": TorchvisionSet(
        "StanfordCars",
        ("stanford_cars/devkit", "stanford_cars/cars_train"),
        _listing(lambda opened: _unzipped(opened._samples)),
        {"split": "train"},
    ),
    "aircraft": TorchvisionSet(
        "FGVCAircraft", ("fgvc-aircraft-2013b/data",), _image_files, {"split": "trainval"}
    ),
    "caltech101": TorchvisionSet(
        "Caltech101",
        ("caltech101/101_ObjectCategories", "caltech101/Annotations"),
        _listing(_caltech101),
    ),
    "dtd": TorchvisionSet("DTD", ("dtd/dtd/images", "dtd/dtd/labels"), _image_files),
    "food101": TorchvisionSet(
        "Food101", ("food-101/images", "food-101/meta"), _image_files, {"split": "train"}
    ),
    "sun397": TorchvisionSet("SUN397", ("SUN397/ClassName.txt",), _image_files),
    "eurosat": TorchvisionSet("EuroSAT", ("eurosat/2750",), None),
}
