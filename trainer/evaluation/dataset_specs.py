"""The labelled data sets that a job may name: one pydantic model for each kind, and their splits.

In: the `dataset` of a job. Out: a frozen `DatasetSpec`, which trainer.evaluation.datasets opens.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trainer.datasets.torchvision_sets import TORCHVISION_SETS
from trainer.evaluation.section import Section, Share

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
SplitName = Annotated[str, Field(pattern="^(train|validation|test)$")]
# Pydantic's JSON Schema of such a dict allows further keys, its validation does not.
Splits = Annotated[dict[SplitName, str], Field(json_schema_extra={"additionalProperties": False})]


class _Dataset(Section):
    """What all kinds of data sets have."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][\w.+-]*$")]
    root: Path
    # share of each class that is tested on, drawn by the job's seed, where there is no test split
    test_share: Share = 0.2
    # share of broken images that is left out instead of ending the job
    max_skipped: Annotated[float, Field(ge=0, lt=1)] = 0.01


class FolderDataset(_Dataset):
    """A folder whose sub-folders are the classes, below `train/`, `test/` or not divided."""

    kind: Literal["folder"]
    splits: Splits | None = None  # sub-folders of root; None: found by their names


class PackedDataset(_Dataset):
    """An .npz as trainer.datasets.arrays reads it, or a folder of one for each split."""

    kind: Literal["npz"]
    splits: Splits | None = None  # files below root; None: train.npz, test.npz, ...
    label: Annotated[str, Field(min_length=1)] = "labels"  # the array of labels
    class_names: tuple[str, ...] | None = None  # C, so that labels must be 0..C-1


class TorchvisionDataset(_Dataset):
    """One of torchvision's sets with its own splits; nothing is downloaded."""

    kind: Literal["torchvision"]
    set: Literal[tuple(TORCHVISION_SETS)]  # type: ignore[valid-type]


class TableDataset(_Dataset):
    """A CSV or parquet with a column of paths (or, in a parquet, of images) and one of labels."""

    kind: Literal["table"]
    # files below root; None: root is the one file, whose column `split` is asked if it is there
    splits: Splits | None = None
    path: Annotated[str, Field(min_length=1)] = "path"
    label: Annotated[str, Field(min_length=1)] = "label"
    split: Annotated[str, Field(min_length=1)] = "split"
    images: Path | None = None  # where paths start; None: the table's folder
    class_names: tuple[str, ...] | None = None


class VocDataset(_Dataset):
    """A tree as VOC2007's: JPEGImages, Annotations, ImageSets/Main; several classes an image."""

    kind: Literal["voc"]
    splits: Splits = Field(
        default_factory=lambda: {TRAIN: "trainval", TEST: "test"}
    )  # lists in ImageSets/Main; of several trees below root VOC2007/trainval+VOC2012/trainval
    class_names: tuple[str, ...] | None = None  # None: the 20 of VOC


class Cub200Dataset(_Dataset):
    """CUB_200_2011 as it was published, with its images.txt and train_test_split.txt."""

    kind: Literal["cub200"]


class ListDataset(_Dataset):
    """Text lists of `relative/path.jpg 12` a line, as Places205's."""

    kind: Literal["list"]
    splits: Splits  # lists below root
    images: Path | None = None  # where paths start; None: root
    class_names: tuple[str, ...] | None = None


class ShardDataset(_Dataset):
    """Tar shards as WebDataset writes them, `KEY.cls` beside `KEY.jpg`."""

    kind: Literal["webdataset"]
    # patterns below root, such as train-{000..009}.tar; None: root's *.tar are not divided
    splits: Splits | None = None
    class_names: tuple[str, ...] | None = None


DatasetSpec = Annotated[
    FolderDataset
    | PackedDataset
    | TorchvisionDataset
    | TableDataset
    | VocDataset
    | Cub200Dataset
    | ListDataset
    | ShardDataset,
    Field(discriminator="kind"),
]
