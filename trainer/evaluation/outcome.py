"""What a protocol hands back, and how classifications are counted.

In: scores and labels of the tested images. Out: an `Outcome` of plain numbers, the same shape for
every protocol, of which the report is made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

TOP5 = 5
BOOTSTRAP_DRAWS = 1000
CONFIDENCE = 0.95
MISTAKES = 24  # pictures that are shown, the most confident mistakes


class EvaluationError(RuntimeError):
    """An evaluation that cannot come to its end; says what to change."""


class Curve(NamedTuple):
    """A figure of one or more lines, such as a loss over the epochs."""

    title: str
    unit: str
    lines: Mapping[str, Sequence[tuple[float, float]]]  # name: points, ascending in x
    x_name: str = "epoch"


class Mistake(NamedTuple):
    """A tested image that was taken for another class."""

    row: int  # of the test split
    label: int
    predicted: int
    margin: float  # score of the prediction above that of the true class


@dataclass(frozen=True)
class Result:
    """What one classifier (one output, one k, one layer) reached on the test split.

    Attributes:
        name: such as `embedding, k=200`; unique within an outcome.
        metrics: name to value; shares are 0..1.
        intervals: name to the ends of its 95 % bootstrap interval over the test items.
        per_class: a row for each class: `class`, `count` and metrics of that class.
        confusion: (C, C) counts, true class by row; None where an image has several classes.
        mistakes: the most confident ones, the worst first.
        untrained: metrics of the same protocol on an untrained encoder of the same architecture;
            None where it was too dear to measure.
        gains: name to the ends of the interval of the metric above the untrained encoder's, both
            counted on the same drawn items; empty without `untrained`.
        facts: what was chosen and how: C and its validation figures, rows used, iterations, ...
    """

    name: str
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    per_class: Sequence[Mapping[str, Any]]
    confusion: NDArray[np.int64] | None = None
    mistakes: Sequence[Mistake] = ()
    untrained: Mapping[str, float] | None = None
    gains: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """All that a protocol found; the first result is the one that is meant when one is asked for.

    Attributes:
        headline: the metric of the first result that stands for the whole evaluation.
        facts: what belongs to no single result, such as the list of labelled images.
    """

    results: Sequence[Result]
    headline: str
    curves: Sequence[Curve] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def classified(
    name: str,
    scores: NDArray[np.floating[Any]],
    labels: NDArray[np.int64],
    class_names: Sequence[str],
    *,
    rows: NDArray[np.int64],
    seed: int,
    untrained: NDArray[np.floating[Any]] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Result:
    """Count a classification.

    Args:
        scores: (N, C), higher is likelier; the lowest class wins a tie.
        labels: (N,) true classes.
        rows: (N,) places of the items in the test split.
        seed: of the bootstrap.
        untrained: (N, C) scores of the same items by an untrained encoder.
    """
    ranks = label_ranks(scores, labels)
    top1, top5 = ranks == 0, ranks < TOP5
    plain = None if untrained is None else label_ranks(untrained, labels)
    predicted = scores.argmax(axis=1)
    count = len(class_names)
    confusion = np.zeros((count, count), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    return Result(
        name=name,
        metrics=accuracies(scores, labels),
        intervals=bootstrap(
            lambda rows: _accuracies(top1[rows], top5[rows], labels[rows], count),
            len(labels),
            seed=seed,
        ),
        per_class=[
            {
                "class": class_name,
                "count": int(members.sum()),
                "top1": float(top1[members].mean()) if members.any() else None,
            }
            for class_name, members in zip(
                class_names, labels == np.arange(count)[:, None], strict=True
            )
        ],
        confusion=confusion,
        mistakes=_mistakes(scores, labels, predicted, rows),
        untrained=None if untrained is None else accuracies(untrained, labels),
        gains={} if plain is None else _gains(ranks, plain, labels, count, seed=seed),
        facts=facts or {},
    )


def accuracies(scores: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> dict[str, float]:
    """`top1`, `mean_per_class` (the mean of the classes' top-1) and of more than five classes
    `top5`, each 0..1.
    """
    ranks = label_ranks(scores, labels)
    return _accuracies(ranks == 0, ranks < TOP5, labels, scores.shape[1])


def label_ranks(scores: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) how many classes come before the true one; of equal scores the lower class does."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    lower = np.arange(scores.shape[1]) < labels[:, None]
    before = (scores > own) | ((scores == own) & lower)
    return np.asarray(before.sum(axis=1), np.int64)


def bootstrap(
    measure: Callable[[NDArray[np.int64]], Mapping[str, float]],
    count: int,
    *,
    seed: int,
    draws: int = BOOTSTRAP_DRAWS,
) -> dict[str, tuple[float, float]]:
    """The percentile interval of each metric when the test items are drawn with replacement.

    Args:
        measure: the metrics of some rows, which may stand there more than once.
        count: of test items.
    """
    draw = np.random.default_rng([seed, count])
    measured = [measure(draw.integers(0, count, count)) for _ in range(draws)]
    ends = [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2]
    return {
        name: tuple(np.nanpercentile([each[name] for each in measured], ends).tolist())
        for name in measured[0]
    }


def _gains(
    ranks: NDArray[np.int64],
    plain: NDArray[np.int64],
    labels: NDArray[np.int64],
    count: int,
    *,
    seed: int,
) -> dict[str, tuple[float, float]]:
    def measure(rows: NDArray[np.int64]) -> dict[str, float]:
        ours, theirs = (
            _accuracies(each[rows] == 0, each[rows] < TOP5, labels[rows], count)
            for each in (ranks, plain)
        )
        return {name: value - theirs[name] for name, value in ours.items()}

    return bootstrap(measure, len(labels), seed=seed)


def _accuracies(
    top1: NDArray[np.bool_], top5: NDArray[np.bool_], labels: NDArray[np.int64], count: int
) -> dict[str, float]:
    members = np.bincount(labels, minlength=count)
    right = np.bincount(labels, weights=top1, minlength=count)
    there = members > 0
    found = {"top1": float(top1.mean())}
    if count > TOP5:
        found["top5"] = float(top5.mean())
    return {**found, "mean_per_class": float((right[there] / members[there]).mean())}


def _mistakes(
    scores: NDArray[np.floating[Any]],
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    rows: NDArray[np.int64],
) -> list[Mistake]:
    own = np.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
    margin = scores.max(axis=1) - own
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-margin[wrong], kind="stable")][:MISTAKES]
    return [
        Mistake(int(rows[row]), int(labels[row]), int(predicted[row]), float(margin[row]))
        for row in worst
    ]
