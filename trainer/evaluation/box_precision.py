"""Average precision of boxes as COCO counts it, and its bootstrap over images.

In: detections and objects of each image. Out: AP for each class and overlap. Detections are matched
once, by pycocotools; the precision is then counted for any weights of the images, so that drawing
images anew costs no matching. With all weights 1 it is pycocotools' own figure.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from trainer.evaluation.labelled import Boxes

OVERLAPS = np.linspace(0.5, 0.95, 10)  # COCO's ten thresholds of intersection over union
RECALLS = np.linspace(0, 1, 101)  # at which COCO looks
MOST = 100  # detections of an image that are counted


class Detections(NamedTuple):
    """What was found on one image."""

    corners: NDArray[np.float32]  # (M, 4): left, top, right, bottom in pixels of the image
    labels: NDArray[np.int64]  # (M,) 0..C-1
    scores: NDArray[np.float32]  # (M,)


class ClassMatches(NamedTuple):
    """The D detections of one class, the highest score first, T overlaps, N images."""

    images: NDArray[np.int64]  # (D,) where each was found
    hits: NDArray[np.bool_]  # (T, D)
    ignored: NDArray[np.bool_]  # (T, D) they met a difficult object, and count for nothing
    objects: NDArray[np.int64]  # (N,) that count


def match(
    found: Sequence[Detections], there: Sequence[Boxes], num_classes: int
) -> list[ClassMatches]:
    """Match the detections of N images with their objects, for each class."""
    images = [{"id": i, "width": 1, "height": 1} for i in range(1, len(there) + 1)]
    classes = [{"id": seat, "name": str(seat)} for seat in range(num_classes)]
    truth = [
        # A crowd is what pycocotools can leave out of both counts: so are difficult objects.
        _annotation(image, box, label, iscrowd=int(hard))
        for image, boxes in enumerate(there, 1)
        for box, label, hard in zip(*boxes, strict=True)
    ]
    guesses = [
        _annotation(image, box, label, score=float(score))
        for image, detections in enumerate(found, 1)
        for box, label, score in zip(*detections, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it talks, where our progress goes
        evaluation = COCOeval(
            _coco(images, classes, truth), _coco(images, classes, guesses), iouType="bbox"
        )
        evaluation.params.iouThrs = OVERLAPS
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [MOST]
        evaluation.evaluate()
    count = len(images)
    by_class = [
        evaluation.evalImgs[seat * count : (seat + 1) * count] for seat in range(num_classes)
    ]
    return [_of_class(each) for each in by_class]


def average_precisions(
    matches: Sequence[ClassMatches], weights: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """(C, T) average precision, NaN of a class without an object that counts.

    Args:
        weights: (N,) how often each image counts; None: once.
    """
    return np.stack([_precision(each, weights) for each in matches])


def overlaps(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float64]:
    """(M, K) intersection over union of (M, 4) and (K, 4) corners."""
    low = np.maximum(ours[:, None, :2], theirs[None, :, :2])
    high = np.minimum(ours[:, None, 2:], theirs[None, :, 2:])
    common = (high - low).clip(min=0).prod(axis=2).astype(np.float64)
    areas = [(each[:, 2:] - each[:, :2]).prod(axis=1) for each in (ours, theirs)]
    union = areas[0][:, None] + areas[1][None] - common
    return np.asarray(common / np.maximum(union, 1e-12), np.float64)


def _precision(found: ClassMatches, weights: NDArray[np.int64] | None) -> NDArray[np.float64]:
    objects = found.objects.sum() if weights is None else (found.objects * weights).sum()
    if objects == 0:
        return np.full(len(OVERLAPS), np.nan)
    each = np.ones(len(found.images)) if weights is None else weights[found.images]
    counted = ~found.ignored * each  # (T, D)
    hits = np.cumsum(found.hits * counted, axis=1)
    precision = hits / np.maximum(np.cumsum(counted, axis=1), np.finfo(np.float64).tiny)
    recall = hits / objects
    falling = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = np.zeros((len(OVERLAPS), len(RECALLS)))
    for row in range(len(OVERLAPS)):
        seats = np.searchsorted(recall[row], RECALLS, side="left")
        inside = seats < recall.shape[1]
        reached[row, inside] = falling[row, seats[inside]]
    return np.asarray(reached.mean(axis=1), np.float64)


def _of_class(images: Sequence[dict[str, NDArray[np.float64]] | None]) -> ClassMatches:
    scores, places, hits, ignored = [], [], [], []
    objects = np.zeros(len(images), np.int64)
    for place, image in enumerate(images):
        if image is None:  # neither object nor detection
            continue
        objects[place] = int((np.asarray(image["gtIgnore"]) == 0).sum())
        scores.append(np.asarray(image["dtScores"], np.float64))
        places.append(np.full(len(scores[-1]), place))
        hits.append(image["dtMatches"].reshape(len(OVERLAPS), -1) > 0)
        ignored.append(image["dtIgnore"].reshape(len(OVERLAPS), -1) > 0)
    if not scores:
        none = np.zeros((len(OVERLAPS), 0), bool)
        return ClassMatches(np.zeros(0, np.int64), none, none, objects)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return ClassMatches(
        np.concatenate(places)[order],
        np.concatenate(hits, axis=1)[:, order],
        np.concatenate(ignored, axis=1)[:, order],
        objects,
    )


def _annotation(
    image: int, box: NDArray[np.float32], label: int, **more: float
) -> dict[str, object]:
    left, top, right, bottom = (float(side) for side in box)
    width, height = right - left, bottom - top
    shape = {"bbox": [left, top, width, height], "area": width * height}
    return {"image_id": image, "category_id": int(label), "iscrowd": 0, **shape, **more}


def _coco(
    images: list[dict[str, int]], classes: list[dict[str, object]], listed: list[dict[str, object]]
) -> COCO:
    coco = COCO()
    numbered = [{"id": number, **each} for number, each in enumerate(listed, 1)]
    coco.dataset = {"images": images, "categories": classes, "annotations": numbered}
    coco.createIndex()
    return coco
