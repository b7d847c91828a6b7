"""Labelled data sets: the kinds that can be evaluated on, each with its splits.

In: a `DatasetSpec` and the seed that divides what is not divided. Out: a `LabelledDataset` whose
splits agree on the classes, or a `DataError` that says what was found, wanted, and to do. No image
is opened here; broken ones are found, counted and left out where the images are read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from trainer.datasets import DataError, ImageSource
from trainer.datasets import split as divide
from trainer.datasets.arrays import open_packed
from trainer.datasets.files import open_folder, open_list
from trainer.datasets.shards import expand_braces, open_shards
from trainer.datasets.source import SUFFIXES, classes_of
from trainer.evaluation.cub200 import open_cub200
from trainer.evaluation.dataset_specs import (
    TEST,
    TRAIN,
    VALIDATION,
    Cub200Dataset,
    DatasetSpec,
    FolderDataset,
    ListDataset,
    PackedDataset,
    ShardDataset,
    TableDataset,
    TorchvisionDataset,
    VocDataset,
)
from trainer.evaluation.labelled import LabelledDataset, LabelledSplit, fingerprint_of_all
from trainer.evaluation.labelled_tables import open_labelled_table
from trainer.evaluation.torchvision_splits import open_torchvision_splits
from trainer.evaluation.voc import open_voc

# What the folders and files of a split are usually called, the most usual first.
USUAL_NAMES = {
    TRAIN: ("train", "training"),
    TEST: ("test", "testing"),
    VALIDATION: ("val", "validation", "valid"),
}
NAMED_IN_ERRORS = 5

Place = TypeVar("Place")
Sources = dict[str, ImageSource]  # by split; an undivided set is all `train`


def open_dataset(spec: DatasetSpec, *, seed: int) -> LabelledDataset:
    """Open a labelled data set.

    Args:
        seed: divides a set without a test split, each class in the same shares.

    Raises:
        DataError: missing, without labels, a class without images, labels out of range, one class
            only, a split without images.
    """
    if not spec.root.exists():
        raise _wrong(spec, f"its root {spec.root} does not exist: put it there, or correct root")
    if isinstance(spec, VocDataset):
        splits, class_names = open_voc(spec)
        by_seed = False
    else:
        sources = _open(spec)
        named = getattr(spec, "class_names", None)
        class_names = named or _all_names(spec, sources)
        sources = {name: _aligned(spec, name, each, class_names) for name, each in sources.items()}
        by_seed = TEST not in sources
        splits = {name: LabelledSplit(each) for name, each in sources.items()}
        if by_seed:
            labels = splits[TRAIN].labels
            kept, held = divide(labels, len(labels), holdout=spec.test_share, seed=seed)
            splits |= {TRAIN: splits[TRAIN].subset(kept), TEST: splits[TRAIN].subset(held)}
        _check_classes(spec, splits, class_names)
    return LabelledDataset(
        name=spec.name,
        kind=spec.kind,
        splits=splits,
        class_names=class_names,
        fingerprint=fingerprint_of_all(splits, class_names),
        divided_by_seed=by_seed,
        max_skipped=spec.max_skipped,
        published_as=spec.set if isinstance(spec, TorchvisionDataset) else None,
    )


def _open(
    spec: FolderDataset
    | PackedDataset
    | TorchvisionDataset
    | TableDataset
    | Cub200Dataset
    | ListDataset
    | ShardDataset,
) -> Sources:
    if isinstance(spec, FolderDataset):
        return _folders(spec)
    if isinstance(spec, PackedDataset):
        return _packed(spec)
    if isinstance(spec, TorchvisionDataset):
        return open_torchvision_splits(spec.set, spec.root)
    if isinstance(spec, TableDataset):
        return open_labelled_table(spec)
    if isinstance(spec, Cub200Dataset):
        return open_cub200(spec)
    if isinstance(spec, ListDataset):
        start = spec.images or spec.root
        return {name: open_list(spec.root / where, start) for name, where in spec.splits.items()}
    return _shards(spec)


def _folders(spec: FolderDataset) -> Sources:
    places = _found(spec, spec.splits, [path for path in spec.root.iterdir() if path.is_dir()])
    return {name: _class_folders(spec, path) for name, path in places.items()}


def _class_folders(spec: FolderDataset, root: Path) -> ImageSource:
    """The images of the classes below `root`; every sub-folder is a class and must hold some."""
    if not root.is_dir():
        raise _wrong(spec, f"{root} is no folder: wanted one with a sub-folder for each class")
    classes = sorted(
        path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    source = open_folder(root)
    tops = [name.split("/")[0] if "/" in name else "" for name in source.ids]
    loose = [name for name, top in zip(source.ids, tops, strict=True) if not top]
    if loose:
        raise _wrong(
            spec,
            f"{len(loose)} images lie beside the classes' folders in {root}, first {loose[0]}: "
            "put each into the folder of its class",
        )
    empty = sorted(set(classes) - set(tops))
    if empty:
        raise _wrong(
            spec,
            f"the class {_listed(empty)} has no image below {root}: wanted files ending in "
            f"{', '.join(sorted(SUFFIXES))}, or remove the folder",
        )
    known = classes_of(tops)
    return replace(source, labels=known.labels, class_names=known.names)


def _packed(spec: PackedDataset) -> Sources:
    if spec.root.is_file():
        places = {TRAIN: spec.root}
    else:
        files = [path for path in spec.root.iterdir() if path.suffix == ".npz"]
        places = _found(spec, spec.splits, files)
    return {name: _one_packed(spec, path) for name, path in places.items()}


def _one_packed(spec: PackedDataset, path: Path) -> ImageSource:
    if not path.is_file():
        raise _wrong(spec, f"{path} is no .npz file")
    source = open_packed(path)
    with np.load(path, allow_pickle=False) as arrays:
        if spec.label not in arrays.files:
            raise _wrong(spec, f"{path} has no array {spec.label!r}, only {sorted(arrays.files)}")
        values = arrays[spec.label]
    if values.shape != (len(source),):
        raise _wrong(spec, f"{path}: {spec.label} is {values.shape} for {len(source)} images")
    if values.dtype.kind not in "iuUS":
        raise _wrong(spec, f"{path}: {spec.label} is {values.dtype}, wanted integers or texts")
    known = classes_of(values)
    return replace(source, labels=known.labels, class_names=known.names)


def _shards(spec: ShardDataset) -> Sources:
    if spec.splits is None:
        tars = sorted(spec.root.glob("*.tar")) if spec.root.is_dir() else [spec.root]
        found = {
            split: [path for path in tars if path.name.startswith(names)]
            for split, names in USUAL_NAMES.items()
        }
        divided = found[TRAIN] and (found[TEST] or found[VALIDATION])
        places = _val_is_test({k: v for k, v in found.items() if v}) if divided else {TRAIN: tars}
    else:
        places = {
            name: [Path(each) for each in expand_braces(str(spec.root / pattern))]
            for name, pattern in spec.splits.items()
        }
    if not all(places.values()):
        raise _wrong(spec, f"{spec.root} holds no .tar: wanted shards as WebDataset writes them")
    return {name: open_shards(paths) for name, paths in places.items()}


def _found(
    spec: FolderDataset | PackedDataset, given: Mapping[str, str] | None, there: Sequence[Path]
) -> dict[str, Path]:
    """The place of each split: as given, or by the usual names; else all of root is `train`."""
    if given is not None:
        return {name: spec.root / where for name, where in given.items()}
    by_name = {path.stem.lower(): path for path in there}
    found = {
        split: by_name[name]
        for split, names in USUAL_NAMES.items()
        for name in names[::-1]  # the most usual one stays
        if name in by_name
    }
    if TRAIN in found and len(found) > 1:
        return _val_is_test(found)
    if isinstance(spec, PackedDataset):
        raise _wrong(
            spec,
            f"{spec.root} holds {_listed(sorted(path.name for path in there)) or 'no .npz'}: "
            "wanted train.npz and test.npz, or splits with their names, or one .npz as root",
        )
    return {TRAIN: spec.root}


def _val_is_test(found: dict[str, Place]) -> dict[str, Place]:
    """Where there is no `test`, as with ImageNet, `val` is what is reported on."""
    if TEST in found or VALIDATION not in found:
        return found
    return {TRAIN: found[TRAIN], TEST: found[VALIDATION]}


def _all_names(spec: DatasetSpec, sources: Sources) -> tuple[str, ...]:
    """The classes of all splits: numbers in their order, other names by the alphabet."""
    for name, source in sources.items():
        if source.class_names is None:
            raise _wrong(
                spec,
                f"the split {name} has no labels, or not for each image: wanted one label an image",
            )
    names = {each for source in sources.values() for each in source.class_names or ()}
    numbers = [_number(each) for each in names]
    if None in numbers:
        return tuple(sorted(names))
    negative = sorted(number for number in numbers if number is not None and number < 0)
    if negative:
        raise _wrong(
            spec,
            f"labels out of range: {_listed([str(each) for each in negative])}; wanted numbers of "
            "at least 0, remove images that have no class",
        )
    return tuple(sorted(names, key=int))


def _aligned(
    spec: DatasetSpec, split: str, source: ImageSource, class_names: tuple[str, ...]
) -> ImageSource:
    """The same images with labels that count in `class_names`."""
    if source.labels is None or source.class_names is None:
        raise _wrong(spec, f"the split {split} has no labels: wanted one label an image")
    seats = {name: seat for seat, name in enumerate(class_names)}
    if not set(source.class_names) <= set(seats) and None not in map(_number, source.class_names):
        seats = {str(number): number for number in range(len(class_names))}
    unknown = [name for name in source.class_names if name not in seats]
    if unknown:
        raise _wrong(
            spec,
            f"labels out of range: the split {split} has {_listed(unknown)}, but class_names "
            f"names {len(class_names)}: wanted 0..{len(class_names) - 1} or these names",
        )
    table = np.array([seats[name] for name in source.class_names], np.int64)
    return replace(source, labels=table[source.labels], class_names=class_names)


def _check_classes(
    spec: DatasetSpec, splits: Mapping[str, LabelledSplit], class_names: tuple[str, ...]
) -> None:
    if len(class_names) < 2:
        raise _wrong(
            spec,
            f"it has one class only, {_listed(class_names)}: there is nothing to tell apart; "
            "wanted two or more",
        )
    empty = [name for name, split in splits.items() if not len(split)]
    if empty:
        raise _wrong(
            spec,
            f"its split {_listed(empty)} has no image: with {len(splits[TRAIN])} training images "
            f"and test_share {spec.test_share}, give more images or a larger share",
        )
    counts = np.bincount(splits[TRAIN].labels, minlength=len(class_names))
    missing = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if missing:
        raise _wrong(
            spec,
            f"the class {_listed(missing)} has no training image: a class that is tested, or named "
            "in class_names, must be learned from one at least",
        )


def _number(text: str) -> int | None:
    return int(text) if text.removeprefix("-").isdecimal() else None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_IN_ERRORS} more" if len(names) > NAMED_IN_ERRORS else ""
    return ", ".join(map(repr, names[:NAMED_IN_ERRORS])) + more


def _wrong(spec: DatasetSpec, message: str) -> DataError:
    return DataError(f"data set {spec.name}: {message}")
