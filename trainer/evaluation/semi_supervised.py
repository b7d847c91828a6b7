"""`semi_supervised`: the whole network fine-tuned on a few labels of each class.

In: an evaluation, settings. Out: what it makes of the test images after its last epoch, and where
the set has a validation split, at its best on that; the list of labelled images. The paper's 1 %
and 10 %, by the authors' semi_supervised.py; they report their best epoch on the test images.
"""

from math import ceil

import numpy as np
from numpy.typing import NDArray

from trainer.datasets import DataError
from trainer.evaluation.context import Evaluation
from trainer.evaluation.dataset_specs import TRAIN, VALIDATION
from trainer.evaluation.features import Extracted, labels_of
from trainer.evaluation.fine_tuning import HeldImages, rates_of
from trainer.evaluation.fine_tuning_outcome import fine_tuning_outcome
from trainer.evaluation.outcome import Outcome
from trainer.evaluation.protocol_settings import SemiSupervisedSettings
from trainer.evaluation.sgd_heads import falls_after
from trainer.evaluation.views import TrainingViews, resized_crops

AUTHORS_MILESTONES = (15 / 30, 20 / 30, 25 / 30)  # of their 30 epochs
CROP_SCALE_MIN = 0.08  # the authors' RandomResizedCrop


def semi_supervised(evaluation: Evaluation, settings: SemiSupervisedSettings) -> Outcome:
    """Fine-tune on `settings.share` of each class.

    Raises:
        DataError: the share of a class is less than one image.
    """
    dataset = evaluation.dataset
    labelled = labelled_rows(
        dataset.train.labels,
        dataset.class_names,
        share=settings.share,
        seed=evaluation.seed,
        name=dataset.name,
    )
    views = TrainingViews(
        evaluation, TRAIN, labelled, draw=resized_crops(CROP_SCALE_MIN, settings.flip)
    )
    labels = labels_of(evaluation, TRAIN, Extracted(views.rows, {}))
    falls = falls_after(settings.milestones, AUTHORS_MILESTONES, settings.epochs)
    source = dataset.train.source
    facts = {
        "milestones": list(falls),
        "labelled": len(views.rows),
        "labelled_of": len(source),
        "labelled_per_class": np.bincount(labels, minlength=len(dataset.class_names)).tolist(),
        "labelled_ids": [source.ids[row] for row in views.rows],
    }
    return fine_tuning_outcome(
        evaluation,
        settings,
        views,
        labels,
        rates_of(settings, falls, "semi_supervised" if settings.official_quirks else None),
        held=None if dataset.validation is None else HeldImages(evaluation, VALIDATION),
        frozen=False,
        facts=facts,
    )


def labelled_rows(
    labels: NDArray[np.int64],
    class_names: tuple[str, ...],
    *,
    share: float,
    seed: int,
    name: str,
) -> NDArray[np.int64]:
    """Ascending places of ceil(share x N_c) images of each class, drawn by the seed.

    Raises:
        DataError: share x N_c is below 1, so that what is drawn would be more than was asked for.
    """
    draw = np.random.default_rng([seed, len(labels)])
    chosen = []
    for seat, class_name in enumerate(class_names):
        members = np.flatnonzero(labels == seat)
        exact = share * len(members)
        if round(exact, 9) < 1:
            raise DataError(
                f"data set {name}: {share:g} of the {len(members)} training images of the class "
                f"{class_name!r} is less than one: raise settings.share to {1 / len(members):.3g} "
                "or more, or give the class more images"
            )
        # Rounded first: 0.07 x 100 is a little more than 7 in floats.
        chosen.append(draw.permutation(members)[: ceil(round(exact, 9))])
    return np.sort(np.concatenate(chosen))
