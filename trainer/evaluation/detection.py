"""`detection`: a Faster R-CNN C4 around the encoder, fine-tuned on boxes, by COCO's precision.

In: an evaluation of a data set with boxes, settings. Out: AP, AP50 and AP75 on the test images,
which are read once, after the last iteration. Schedule and sizes are those of the authors'
detectron2 files (VOC07+12 on VOC07), which are MoCo's for a batch of 4.
"""

import numpy as np
from numpy.typing import NDArray
from torchvision.models.detection import FasterRCNN

from trainer.datasets import DataError
from trainer.encoder import Encoder
from trainer.evaluation.box_precision import (
    OVERLAPS,
    ClassMatches,
    Detections,
    average_precisions,
    match,
    overlaps,
)
from trainer.evaluation.context import Evaluation
from trainer.evaluation.dataset_specs import TEST, TRAIN
from trainer.evaluation.detector import build_detector
from trainer.evaluation.detector_training import (
    Losses,
    boxes_of,
    detect,
    schedule_of,
    train_detector,
)
from trainer.evaluation.features import usable_images
from trainer.evaluation.job import JobError
from trainer.evaluation.labelled import Boxes
from trainer.evaluation.outcome import MISTAKES, Curve, Mistake, Outcome, Result, bootstrap
from trainer.evaluation.protocol_settings import DetectionSettings

BOOTSTRAP_DRAWS = 100  # each sorts nothing, and counts every detection
AT50, AT75 = 0, 5  # places in OVERLAPS
MISTAKE_SCORE = MISTAKE_OVERLAP = 0.5  # of a detection that lies on an object of another class


def detection(evaluation: Evaluation, settings: DetectionSettings) -> Outcome:
    """Train a detector on the training images' boxes and count what it finds on the test's."""
    dataset, schedule = evaluation.dataset, schedule_of(settings)
    if dataset.train.boxes is None:
        raise JobError(
            f"detection wants a data set with boxes, kind `voc`; {dataset.name} is {dataset.kind}: "
            "ask for linear_probe or transfer"
        )
    if not any((~boxes.difficult).any() for boxes in dataset.test.boxes or ()):
        raise DataError(f"data set {dataset.name}: no test image shows an object that counts")
    learned = _usable(evaluation, TRAIN)

    def found(encoder: Encoder, said: str) -> tuple[FasterRCNN, Losses]:
        detector = build_detector(encoder, len(dataset.class_names), settings, seed=evaluation.seed)
        return detector, train_detector(evaluation, detector, learned, settings, schedule, said)

    detectors = {"trained": found(evaluation.fresh_copy(), "detector")}
    if settings.untrained:
        twin = evaluation.untrained().encoder
        detectors["untrained"] = found(twin, "detector, untrained encoder")
    tested = _usable(evaluation, TEST)
    there = boxes_of(evaluation, TEST, tested)
    detections = {
        name: detect(evaluation, detector, tested, settings, f"detecting, {name} encoder")
        for name, (detector, _) in detectors.items()
    }
    matches = {
        name: match(each, there, len(dataset.class_names)) for name, each in detections.items()
    }
    result = _counted(evaluation, matches, mistakes_of(detections["trained"], there, tested))
    lines = {
        name if which == "trained" else f"{name}, untrained": points
        for which, (_, losses) in detectors.items()
        for name, points in losses.items()
    }
    facts = {
        **schedule._asdict(),
        "stride_px": detectors["trained"][0].backbone.stride_px,
        "learned_from": len(learned),
    }
    curve = Curve("Training losses", "sum of each kind's mean", lines, "iteration")
    return Outcome([result], headline="ap", curves=[curve], facts=facts)


def mistakes_of(
    found: list[Detections], there: list[Boxes], rows: NDArray[np.int64]
) -> list[Mistake]:
    """Confident detections that lie on an object of another class and on none of their own."""
    mistakes = []
    for row, detections, boxes in zip(rows, found, there, strict=True):
        if not len(boxes.labels):
            continue
        met = overlaps(detections.corners, boxes.corners)  # (M, K)
        for common, label, score in zip(met, detections.labels, detections.scores, strict=True):
            on = common >= MISTAKE_OVERLAP
            if score < MISTAKE_SCORE or not on.any() or (on & (boxes.labels == label)).any():
                continue
            taken_for = int(boxes.labels[common.argmax()])
            mistakes.append(Mistake(int(row), taken_for, int(label), float(score)))
    mistakes.sort(key=lambda mistake: -mistake.margin)
    return mistakes[:MISTAKES]


def _counted(
    evaluation: Evaluation, matches: dict[str, list[ClassMatches]], mistakes: list[Mistake]
) -> Result:
    ours, theirs = matches["trained"], matches.get("untrained")
    count = len(ours[0].objects)
    precisions = average_precisions(ours)
    names = {"ap": slice(None), "ap50": AT50, "ap75": AT75}

    def weights(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount(rows, minlength=count)

    def gain(rows: NDArray[np.int64]) -> dict[str, float]:
        assert theirs is not None
        one, two = (_means(average_precisions(each, weights(rows))) for each in (ours, theirs))
        return {name: value - two[name] for name, value in one.items()}

    intervals = bootstrap(
        lambda rows: _means(average_precisions(ours, weights(rows))),
        count,
        seed=evaluation.seed,
        draws=BOOTSTRAP_DRAWS,
    )
    return Result(
        name="Faster R-CNN C4",
        metrics=_means(precisions),
        intervals=intervals,
        per_class=[
            {
                "class": name,
                "count": int(own.objects.sum()),
                **{
                    metric: None if own.objects.sum() == 0 else float(np.mean(row[at]))
                    for metric, at in names.items()
                },
            }
            for name, own, row in zip(evaluation.dataset.class_names, ours, precisions, strict=True)
        ],
        mistakes=mistakes,
        untrained=None if theirs is None else _means(average_precisions(theirs)),
        gains={}
        if theirs is None
        else bootstrap(gain, count, seed=evaluation.seed, draws=BOOTSTRAP_DRAWS),
        facts={"overlaps": OVERLAPS.round(2).tolist()},
    )


def _means(precisions: NDArray[np.float64]) -> dict[str, float]:
    """Over the classes that are there."""
    there = precisions[~np.isnan(precisions[:, 0])]
    if not len(there):
        return dict.fromkeys(("ap", "ap50", "ap75"), float("nan"))
    return {
        "ap": float(there.mean()),
        "ap50": float(there[:, AT50].mean()),
        "ap75": float(there[:, AT75].mean()),
    }


def _usable(evaluation: Evaluation, split: str) -> NDArray[np.int64]:
    """Places of the images that can be decoded; the others are counted."""
    rows: list[int] = []
    total, said = len(evaluation.dataset.splits[split]), f"looking through {split}"
    evaluation.progress(said, 0, total)
    for _ in usable_images(evaluation, split, rows):
        evaluation.progress(said, len(rows), total)
    evaluation.progress(said, total, total)
    return np.array(rows, np.int64)
