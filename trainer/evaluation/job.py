"""What an evaluation is asked to do: pydantic models of job.json, read once at the door.

In: a JSON file. Out: a frozen `Job`, or `JobError` that names the key, the value and what is
allowed. Defaults stand here and nowhere else; each says where it comes from.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from trainer.datasets.torchvision_sets import TORCHVISION_SETS
from trainer.representation.protocols import KNN_K, KNN_TEMPERATURE

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
SplitName = Annotated[str, Field(pattern="^(train|validation|test)$")]
# Pydantic's JSON Schema of such a dict allows further keys, its validation does not.
Splits = Annotated[dict[SplitName, str], Field(json_schema_extra={"additionalProperties": False})]
Share = Annotated[float, Field(gt=0, lt=1)]
Model = TypeVar("Model", bound="Section")
Parsed = TypeVar("Parsed")
Strength = Annotated[float, Field(gt=0, le=1e9)]  # C of a linear classifier


class JobError(ValueError):
    """A job that cannot be run as it is written; says which key, what it is, what is allowed."""


# Said to the service as well; the models themselves say it through _each_once.
_ONCE: dict[str, Any] = {"uniqueItems": True}


def _each_once(section: Model, *names: str) -> Model:
    for name in names:
        values = getattr(section, name)
        if len(set(values)) < len(values):
            raise ValueError(f"{name} names something twice: {list(values)}")
    return section


class Section(BaseModel):
    """A part of a job: read-only, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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


class KnnSettings(Section):
    """The weighted vote of the nearest training images."""

    # Instance discrimination's and the authors' 200; 1 and 20 are usual beside it.
    k: Annotated[
        tuple[Annotated[int, Field(ge=1, le=100_000)], ...],
        Field(min_length=1, max_length=16, json_schema_extra=_ONCE),
    ] = (KNN_K, 20, 1)
    temperature: Annotated[float, Field(ge=0.01, le=10)] = KNN_TEMPERATURE
    outputs: Annotated[
        tuple[Literal["embedding", "features"], ...],
        Field(min_length=1, json_schema_extra=_ONCE),
    ] = (
        "embedding",
        "features",
    )

    @model_validator(mode="after")
    def _nothing_twice(self) -> "KnnSettings":
        return _each_once(self, "k", "outputs")


class LinearProbeSettings(Section):
    """One linear classifier on frozen features; trainer/README.md compares with the paper's."""

    classifier: Literal["sgd", "lbfgs"] = "sgd"
    # `features`, `embedding`, a block such as `layer4.1` pooled to the paper's grid, or
    # `layer4.1@2` pooled to 2 x 2; each gets a classifier of its own. `blocks` stands for them all.
    layers: Annotated[
        tuple[str, ...], Field(min_length=1, max_length=32, json_schema_extra=_ONCE)
    ] = ("features",)
    # sgd: the authors' linear_classification.py
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 120
    batch_size: Annotated[int, Field(ge=2, le=65_536)] = 256
    lr: Annotated[float, Field(gt=0, le=1000)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    # epochs after which lr falls; null: the authors' 50, 80 and 100 of 120, in these shares
    milestones: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    batch_norm: bool = True
    # random crops (0.08, 1) and flips, encoded anew in each epoch; false: each image once, cached
    augment: bool = False
    # what the released code does by mistake: batch normalisation stays at its first statistics
    official_quirks: bool = False
    # lbfgs: scikit-learn's logistic regression, on standardised features
    c: Annotated[
        tuple[Strength, ...], Field(min_length=1, max_length=64, json_schema_extra=_ONCE)
    ] = (
        1e-5,
        1e-4,
        1e-3,
        1e-2,
        1e-1,
        1.0,
    )
    max_iter: Annotated[int, Field(ge=1, le=100_000)] = 100
    # share of each training class on which C is chosen, where the set has no validation split
    validation_share: Share = 0.2

    @model_validator(mode="after")
    def _nothing_twice(self) -> "LinearProbeSettings":
        return _each_once(self, "layers", "c")


class Voc07Settings(Section):
    """One linear classifier for each class of VOC07 on pooled features."""

    classifier: Literal["svm", "sgd"] = "svm"
    # svm: `features`; the authors' voc_linear.py takes the second-last block pooled to 2 x 2
    layer: str = "features"
    c: Annotated[
        tuple[Strength, ...], Field(min_length=1, max_length=64, json_schema_extra=_ONCE)
    ] = (
        0.001,
        0.01,
        0.1,
        1.0,
        10.0,
    )
    folds: Annotated[int, Field(ge=2, le=20)] = 3
    # sgd: voc_linear.py
    iterations: Annotated[int, Field(ge=1, le=1_000_000)] = 1900
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 16
    lr: Annotated[float, Field(gt=0, le=1000)] = 3.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-6
    step: Annotated[int, Field(ge=1)] = 760
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.5

    @model_validator(mode="after")
    def _nothing_twice(self) -> "Voc07Settings":
        return _each_once(self, "c")


class _FineTuneSettings(Section):
    """What both kinds of fine-tuning ask; the defaults are the authors', see trainer/README.md."""

    epochs: Annotated[int, Field(ge=1, le=10_000)]
    batch_size: Annotated[int, Field(ge=2, le=65_536)] = 128
    lr: Annotated[float, Field(gt=0, le=1000)]  # of the backbone
    head_lr: Annotated[float, Field(gt=0, le=1000)]  # of the new linear layer
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    # epochs after which the rates fall; null: the authors', in their shares of all epochs
    milestones: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5  # probability; 0 for digits, wafers with a side
    # the same once more for an encoder with drawn weights: twice the time
    untrained: bool = True
    # what the released code does by mistake with the two rates
    official_quirks: bool = False


class SemiSupervisedSettings(_FineTuneSettings):
    """The whole network fine-tuned on a few labels: the authors' semi_supervised.py."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.01  # of each class; the paper's 0.01 and 0.1
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 30
    lr: Annotated[float, Field(gt=0, le=1000)] = 0.0012
    head_lr: Annotated[float, Field(gt=0, le=1000)] = 0.06
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-5


class TransferSettings(_FineTuneSettings):
    """A pretrained network on another data set: the authors' fine_tune.py."""

    linear: bool = False  # the new layer alone is trained
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 81
    lr: Annotated[float, Field(gt=0, le=1000)] = 0.001
    head_lr: Annotated[float, Field(gt=0, le=1000)] = 0.05
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-6
    # random_crop: the short side at 256/224 of the crop; resized_crop: 0.2 to 1 of the area.
    # null: the authors', which is resized_crop for `cars` and random_crop for all others
    crops: Literal["random_crop", "resized_crop"] | None = None
    # share of each training class that chooses the best epoch, where the set has no validation
    # split; 0: nothing is held out, and the last epoch alone is reported
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.1


class DetectionSettings(Section):
    """Faster R-CNN R50-C4, by the authors' detectron2 files, which are MoCo's."""

    batch_size: Annotated[int, Field(ge=1, le=1024)] = 4
    # null: the authors' 96,000, 0.005 and 400 for 4 images, scaled to the batch
    iterations: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    lr: Annotated[float, Field(gt=0, le=100)] | None = None
    warmup: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    # iterations after which the rate falls; null: the authors' 72,000 and 88,000, in their shares
    milestones: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-4  # not of normalisations
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    # the short side of a training image, one of these at random, and of a test image
    short_sides_px: Annotated[
        tuple[Annotated[int, Field(ge=32, le=4096)], ...],
        Field(min_length=1, max_length=64, json_schema_extra=_ONCE),
    ] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    test_short_side_px: Annotated[int, Field(ge=32, le=4096)] = 800
    long_side_px: Annotated[int, Field(ge=32, le=8192)] = 1333  # at most
    # sides of the anchors, in pixels of the resized image
    anchors_px: Annotated[
        tuple[Annotated[int, Field(ge=4, le=4096)], ...],
        Field(min_length=1, max_length=16, json_schema_extra=_ONCE),
    ] = (32, 64, 128, 256, 512)
    rois: Annotated[int, Field(ge=4, le=4096)] = 512  # of an image, that the box head learns from
    roi_size: Annotated[int, Field(ge=2, le=56)] = 14  # side of what is pooled for the box head
    # training batches whose mean statistics the normalisations take in the end; 0: the running ones
    precise_batches: Annotated[int, Field(ge=0, le=100_000)] = 200
    untrained: bool = False  # the same once more for an encoder with drawn weights: twice the time

    @model_validator(mode="after")
    def _nothing_twice(self) -> "DetectionSettings":
        return _each_once(self, "short_sides_px", "anchors_px")


class _Job(Section):
    """What all jobs have."""

    bundle: Path
    dataset: DatasetSpec
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # scikit-learn takes no larger one
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Annotated[int, Field(ge=0, le=256)] | Literal["auto"] = "auto"  # decoding processes
    cache: Path | None = None  # frozen features are kept there; None: below the output folder

    def as_dict(self) -> dict[str, Any]:
        """The job as plain values, every default filled in."""
        return self.model_dump(mode="json")

    @property
    def job_id(self) -> str:
        """sha256 (hex) of all that decides the numbers, and where the data lie."""
        values = {k: v for k, v in self.as_dict().items() if k not in ("workers", "cache")}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class KnnJob(_Job):
    """`knn`: nothing is trained."""

    protocol: Literal["knn"]
    settings: KnnSettings = KnnSettings()


class LinearProbeJob(_Job):
    """`linear_probe`: a linear classifier on frozen features."""

    protocol: Literal["linear_probe"]
    settings: LinearProbeSettings = LinearProbeSettings()


class Voc07Job(_Job):
    """`voc07_svm`: several classes an image, mean average precision."""

    protocol: Literal["voc07_svm"]
    settings: Voc07Settings = Voc07Settings()


class SemiSupervisedJob(_Job):
    """`semi_supervised`: the whole network, a share of the labels."""

    protocol: Literal["semi_supervised"]
    settings: SemiSupervisedSettings = SemiSupervisedSettings()


class TransferJob(_Job):
    """`transfer`: the whole network or one layer, all labels of a target set."""

    protocol: Literal["transfer"]
    settings: TransferSettings = TransferSettings()


class DetectionJob(_Job):
    """`detection`: objects with boxes, average precision."""

    protocol: Literal["detection"]
    settings: DetectionSettings = DetectionSettings()


# A further protocol adds its job here, and its function in trainer.evaluation.protocols.
Job = KnnJob | LinearProbeJob | Voc07Job | SemiSupervisedJob | TransferJob | DetectionJob
_JOB: TypeAdapter[Job] = TypeAdapter(Annotated[Job, Field(discriminator="protocol")])
_DATASET: TypeAdapter[DatasetSpec] = TypeAdapter(DatasetSpec)


def load_job(path: Path) -> Job:
    """Read a job.

    Raises:
        JobError: no JSON, an unknown or missing key, a value out of range.
    """
    return parse_job(_load(path, "a job"))


def load_dataset(path: Path) -> DatasetSpec:
    """Read the `dataset` of a job alone.

    Raises:
        JobError: as `load_job`.
    """
    return _parsed(_DATASET, _load(path, "a data set"))


def parse_job(values: Mapping[str, Any]) -> Job:
    """Check plain values against the models.

    Raises:
        JobError: names each wrong key.
    """
    return _parsed(_JOB, values)


def _load(path: Path, what: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError) as error:
        raise JobError(f"{path} cannot be read as {what}: {error}") from error
    if not isinstance(values, dict):
        raise JobError(f"{path} must hold an object, got {type(values).__name__}")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose keys differ; else nobody knew which value was meant."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the key {twice[:64]!r} twice; say it once")
    return values


def _parsed(model: TypeAdapter[Parsed], values: Mapping[str, Any]) -> Parsed:
    try:
        return model.validate_python(values)
    except ValidationError as error:
        raise JobError(
            "; ".join(_explain(problem) for problem in error.errors(include_url=False))
        ) from None


def job_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of job.json: one definition for each protocol and kind of set."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_JOB.json_schema()}


def _explain(problem: Any) -> str:
    # A union adds the tag of its branch to the location; no field is called like a tag.
    tags = {"knn", "linear_probe", "voc07_svm", "semi_supervised", "transfer", "detection"} | {
        "folder",
        "npz",
        "torchvision",
        "table",
        "voc",
        "cub200",
        "list",
        "webdataset",
    }
    key = ".".join(str(part) for part in problem["loc"] if part not in tags)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"there is no key {key!r}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    shown = "" if isinstance(problem["input"], dict | BaseModel) else f"={problem['input']!r}"
    return f"{key or 'the job'}{shown}: {message}"
