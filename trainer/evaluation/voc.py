"""Trees as PASCAL VOC's: several classes an image, objects with boxes, some of them difficult.

In: a `VocDataset`. Out: splits with targets (N, C) and boxes, read from Annotations/*.xml as the
set's own tools count: a class of which an image shows difficult objects alone is left out of it.
"""

import xml.etree.ElementTree as xml
from pathlib import Path

import numpy as np

from trainer.datasets import DataError
from trainer.datasets.files import from_files
from trainer.evaluation.dataset_specs import TEST, TRAIN, VocDataset
from trainer.evaluation.labelled import Boxes, LabelledSplit

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
SEARCHED = "JPEGImages", "Annotations", "ImageSets/Main"


def open_voc(spec: VocDataset) -> tuple[dict[str, LabelledSplit], tuple[str, ...]]:
    """The splits and the C classes of a VOC tree.

    Raises:
        DataError: parts of the tree are missing or damaged, an unknown class, a class without a
            training image, one class only.
    """
    class_names = spec.class_names or VOC_CLASSES
    for name in (TRAIN, TEST):
        if name not in spec.splits:
            raise _wrong(spec, f"splits names no {name}: wanted the lists of both train and test")
    if len(class_names) < 2:
        raise _wrong(spec, "it has one class only: there is nothing to tell apart")
    splits = {name: _split(spec, where, class_names) for name, where in spec.splits.items()}
    targets = splits[TRAIN].targets
    assert targets is not None  # _split gives them
    absent = [
        name
        for name, there in zip(class_names, (targets == 1).any(axis=0), strict=True)
        if not there
    ]
    if absent:
        raise _wrong(
            spec,
            f"the class {absent[0]!r} and {len(absent) - 1} more have no training image: name in "
            "class_names those that the set has",
        )
    return splits, class_names


def _split(spec: VocDataset, where: str, class_names: tuple[str, ...]) -> LabelledSplit:
    """The images of one list, or of several joined by `+`, each perhaps of a tree of its own."""
    names: list[str] = []
    boxes: list[Boxes] = []
    for place in where.split("+"):
        tree, _, listed = place.rpartition("/")
        for key in _keys(spec, tree, listed):
            names.append(f"{tree}/JPEGImages/{key}.jpg".lstrip("/"))
            boxes.append(_boxes(spec, spec.root / tree / "Annotations" / f"{key}.xml", class_names))
    if len(set(names)) < len(names):
        raise _wrong(spec, f"{where} names an image twice")
    source = from_files(spec.root, names, None)
    targets = np.zeros((len(names), len(class_names)), np.int8)
    for row, found in enumerate(boxes):
        targets[row, found.labels[found.difficult]] = -1
        targets[row, found.labels[~found.difficult]] = 1
    return LabelledSplit(source, targets, tuple(boxes))


def _keys(spec: VocDataset, tree: str, listed: str) -> list[str]:
    root = spec.root / tree
    if ".." in tree.split("/") or tree.startswith("/"):
        raise _wrong(spec, f"the tree {tree!r} lies outside root: wanted a folder below it")
    missing = [name for name in SEARCHED if not (root / name).is_dir()]
    if missing:
        raise _wrong(
            spec,
            f"{root} lacks {', '.join(missing)}: wanted a tree as VOCdevkit/VOC2007, or "
            "splits that name trees below root, such as VOC2007/trainval+VOC2012/trainval",
        )
    path = root / "ImageSets" / "Main" / f"{listed}.txt"
    try:
        keys = [line.split()[0] for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(spec, f"{path} cannot be read ({error}): wanted an image's name a line") from (
            error
        )
    if not keys:
        raise _wrong(spec, f"{path} names no image")
    return keys


def _boxes(spec: VocDataset, path: Path, class_names: tuple[str, ...]) -> Boxes:
    corners, labels, difficult = [], [], []
    try:
        for found in xml.parse(path).getroot().iter("object"):
            name = found.findtext("name", "").strip()
            if name not in class_names:
                raise _wrong(
                    spec,
                    f"labels out of range: {path} shows {name!r}: wanted one of class_names, "
                    f"{', '.join(class_names)}",
                )
            box = found.find("bndbox")
            if box is None:
                raise ValueError(f"an object {name!r} without bndbox")
            # VOC counts pixels from 1, and its right and lower edges are inside.
            sides = [float(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax")]
            corners.append([sides[0] - 1, sides[1] - 1, sides[2], sides[3]])
            if not (corners[-1][0] < corners[-1][2] and corners[-1][1] < corners[-1][3]):
                raise ValueError(f"an object {name!r} whose box has no area: {sides}")
            labels.append(class_names.index(name))
            difficult.append(found.findtext("difficult", "0").strip() == "1")
    except DataError:
        raise
    except (OSError, xml.ParseError, ValueError) as error:
        raise _wrong(spec, f"{path} cannot be read as an annotation ({error})") from error
    return Boxes(
        np.array(corners, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(difficult, bool),
    )


def _wrong(spec: VocDataset, message: str) -> DataError:
    return DataError(f"data set {spec.name}: {message}")
