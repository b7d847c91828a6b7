"""`transfer`: the network on another data set, all of it fine-tuned or one new layer alone.

In: an evaluation, settings. Out: what it makes of the test images after its last epoch and at its
best on validation images, which are the set's own or drawn from `train` by the seed. The authors'
fine_tune.py reports its best epoch on the test images.
"""

import numpy as np

from trainer.datasets import split as divide
from trainer.evaluation.context import Evaluation
from trainer.evaluation.dataset_specs import TRAIN, VALIDATION
from trainer.evaluation.features import Extracted, labels_of
from trainer.evaluation.fine_tuning import HeldImages, rates_of
from trainer.evaluation.fine_tuning_outcome import fine_tuning_outcome
from trainer.evaluation.outcome import Outcome
from trainer.evaluation.protocol_settings import TransferSettings
from trainer.evaluation.sgd_heads import falls_after
from trainer.evaluation.views import TrainingViews, random_crops, resized_crops

AUTHORS_MILESTONES = (50 / 81, 70 / 81, 80 / 81)  # of their 81 epochs
CROP_SCALE_MIN = 0.2  # the authors' RandomResizedCrop for Stanford Cars
RESIZED_BY_THE_AUTHORS = "cars"  # torchvision's name


def transfer(evaluation: Evaluation, settings: TransferSettings) -> Outcome:
    """Fine-tune on the training images of the target set."""
    dataset = evaluation.dataset
    learned, held, validation = np.arange(len(dataset.train)), None, "none"
    if dataset.validation is not None:
        held, validation = HeldImages(evaluation, VALIDATION), "the set's own"
    elif settings.validation_share > 0:
        labels = dataset.train.labels
        learned, chosen = divide(
            labels, len(labels), holdout=settings.validation_share, seed=evaluation.seed
        )
        if len(chosen):  # not so where every class is too small to give an image away
            held = HeldImages(evaluation, TRAIN, chosen)
            validation = "drawn from train by the seed"
    crops = settings.crops
    if crops is None:
        by_area = dataset.published_as == RESIZED_BY_THE_AUTHORS
        crops = "resized_crop" if by_area else "random_crop"
    draw = {
        "resized_crop": resized_crops(CROP_SCALE_MIN, settings.flip),
        "random_crop": random_crops(settings.flip),
    }[crops]
    views = TrainingViews(evaluation, TRAIN, learned, draw=draw)
    falls = falls_after(settings.milestones, AUTHORS_MILESTONES, settings.epochs)
    return fine_tuning_outcome(
        evaluation,
        settings,
        views,
        labels_of(evaluation, TRAIN, Extracted(views.rows, {})),
        rates_of(settings, falls, "fine_tune" if settings.official_quirks else None),
        held=held,
        frozen=settings.linear,
        facts={
            "trained": "the linear layer" if settings.linear else "the whole network",
            "crops": crops,
            "milestones": list(falls),
            "learned_from": len(views.rows),
            "validation": validation,
            "validation_images": 0 if held is None else len(held.labels),
        },
    )
