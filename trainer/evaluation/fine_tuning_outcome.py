"""From a fine-tuning to its outcome: the trained encoder, its untrained twin, both on the test.

In: training views with labels, perhaps validation images. Out: a result after the last epoch and,
with validation images, one at the best on these; each beside the twin's own. The test images are
read once, when all networks are what they will be.
"""

from collections.abc import Callable, Mapping
from typing import Any

from numpy import int64
from numpy.typing import NDArray

from trainer.encoder import Encoder
from trainer.evaluation.context import Evaluation
from trainer.evaluation.dataset_specs import TEST
from trainer.evaluation.features import Extracted, labels_of
from trainer.evaluation.fine_tuning import (
    Classifier,
    Course,
    HeldImages,
    Rates,
    curves_of,
    fine_tune,
    score_test,
)
from trainer.evaluation.outcome import Outcome, classified
from trainer.evaluation.protocol_settings import SemiSupervisedSettings, TransferSettings
from trainer.evaluation.views import TrainingViews

LAST, BEST = "last epoch", "best on validation"
_TRAINED, _UNTRAINED = "trained", "untrained"


def fine_tuning_outcome(
    evaluation: Evaluation,
    settings: SemiSupervisedSettings | TransferSettings,
    views: TrainingViews,
    labels: NDArray[int64],
    rates: Callable[[int], Rates],
    *,
    held: HeldImages | None,
    frozen: bool,
    facts: Mapping[str, Any],
) -> Outcome:
    """Fine-tune a copy of the encoder, and its twin where it is asked for, and count.

    Args:
        labels: (M,) of the usable images of `views`.
        frozen: the new layer alone is trained.
        facts: of the outcome.
    """
    class_names = evaluation.dataset.class_names

    def train(encoder: Encoder, said: str) -> tuple[Classifier, Course]:
        network = Classifier(encoder, len(class_names), seed=evaluation.seed, frozen=frozen)
        course = fine_tune(
            evaluation, network, views, labels, settings, rates, held=held, said=said
        )
        return network, course

    said = "linear layer" if frozen else "fine-tuning"
    trainings = {_TRAINED: train(evaluation.fresh_copy(), said)}
    if settings.untrained:
        twin = evaluation.untrained().encoder
        trainings[_UNTRAINED] = train(twin, f"{said}, untrained encoder")
    networks = {(which, LAST): network for which, (network, _) in trainings.items()}
    networks |= {
        (which, BEST): course.best
        for which, (_, course) in trainings.items()
        if course.best is not None
    }
    rows, scores = score_test(evaluation, networks)
    wanted = labels_of(evaluation, TEST, Extracted(rows, {}))
    best_epoch = trainings[_TRAINED][1].best_epoch
    results = [
        classified(
            name,
            scores[_TRAINED, name],
            wanted,
            class_names,
            rows=rows,
            seed=evaluation.seed,
            untrained=scores.get((_UNTRAINED, name)),
            facts={"epoch": settings.epochs if name == LAST else best_epoch},
        )
        for name in (LAST, BEST)
        if (_TRAINED, name) in scores
    ]
    courses = {which: course for which, (_, course) in trainings.items()}
    return Outcome(results, headline="top1", curves=curves_of(courses), facts=facts)
