"""The settings of each protocol: pydantic models with ranges and defaults.

In: the `settings` of a job. Out: one frozen model. Defaults stand here and nowhere else; each says
where it comes from.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from trainer.evaluation.section import Section, Share
from trainer.representation.protocols import KNN_K, KNN_TEMPERATURE

Model = TypeVar("Model", bound="Section")
Strength = Annotated[float, Field(gt=0, le=1e9)]  # C of a linear classifier
# Said to the service as well; the models themselves say it through _each_once.
_ONCE: dict[str, Any] = {"uniqueItems": True}


def _each_once(section: Model, *names: str) -> Model:
    for name in names:
        values = getattr(section, name)
        if len(set(values)) < len(values):
            raise ValueError(f"{name} names something twice: {list(values)}")
    return section


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
