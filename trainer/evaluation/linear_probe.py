"""`linear_probe`: how well one linear layer tells the classes apart on a frozen encoder's outputs.

In: an evaluation, settings. Out: one result for each layer, by `sgd` as the authors train it or by
`lbfgs`, whose C is chosen on validation images. Test images are read once, when all is chosen.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.datasets import split as divide
from trainer.evaluation.context import Evaluation, Network
from trainer.evaluation.dataset_specs import TEST, TRAIN, VALIDATION
from trainer.evaluation.features import Extracted, extract, labels_of
from trainer.evaluation.layers import encode_with, expanded
from trainer.evaluation.logistic import Fitted, choose_c, fit_logistic
from trainer.evaluation.outcome import Curve, Outcome, Result, classified
from trainer.evaluation.protocol_settings import LinearProbeSettings
from trainer.evaluation.sgd_heads import HeadBatch, Heads, train_heads
from trainer.evaluation.views import TrainingViews

Rows = NDArray[np.float32]


def linear_probe(evaluation: Evaluation, settings: LinearProbeSettings) -> Outcome:
    """A linear classifier for each layer of the frozen encoder."""
    layers = expanded(evaluation.trained.encoder, settings.layers)
    probe = _by_lbfgs if settings.classifier == "lbfgs" else _by_sgd
    trained = probe(evaluation, evaluation.trained, layers, settings)
    untrained: dict[str, NDArray[np.float32]] = {}
    if not (settings.classifier == "sgd" and settings.augment):  # all epochs anew: not cheap
        baseline = probe(evaluation, evaluation.untrained(), layers, settings)
        untrained = dict(baseline.scores)
    results: list[Result] = [
        classified(
            layer,
            scores,
            trained.labels,
            evaluation.dataset.class_names,
            rows=trained.rows,
            seed=evaluation.seed,
            untrained=untrained.get(layer),
            facts={"classifier": settings.classifier, "layer": layer, **trained.facts[layer]},
        )
        for layer, scores in trained.scores
    ]
    return Outcome(results, headline="top1", curves=trained.curves)


class _Probed:
    """What the classifiers of some layers say of the test images."""

    def __init__(self, labels: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        self.labels, self.rows = labels, rows
        self.scores: list[tuple[str, NDArray[np.float32]]] = []
        self.facts: dict[str, dict[str, object]] = {}
        self.curves: list[Curve] = []


def _by_lbfgs(
    evaluation: Evaluation,
    network: Network,
    layers: tuple[str, ...],
    settings: LinearProbeSettings,
) -> _Probed:
    train = extract(evaluation, network, TRAIN, layers)
    labels = labels_of(evaluation, TRAIN, train)
    own = evaluation.dataset.validation is not None
    held: Extracted | None = None
    if own:
        held = extract(evaluation, network, VALIDATION, layers)
        held_labels = labels_of(evaluation, VALIDATION, held)
    else:
        fit_rows, held_rows = divide(
            labels, len(labels), holdout=settings.validation_share, seed=evaluation.seed
        )
    fitted: dict[str, Fitted] = {}
    facts: dict[str, dict[str, object]] = {}
    for layer in layers:
        values = train.values[layer]
        if held is not None:
            parts = (values, labels, held.values[layer], held_labels)
            values = np.concatenate([values, held.values[layer]])
            known = np.concatenate([labels, held_labels])
        else:
            parts = (values[fit_rows], labels[fit_rows], values[held_rows], labels[held_rows])
            known = labels
        stage, tried = f"choosing C for {layer}", 0

        def advance(stage: str = stage) -> None:
            nonlocal tried
            tried += 1
            evaluation.progress(stage, tried, len(settings.c))

        evaluation.progress(stage, 0, len(settings.c))
        choice = choose_c(
            *parts, cs=settings.c, max_iter=settings.max_iter, seed=evaluation.seed, advance=advance
        )
        evaluation.progress(f"fitting {layer}", 0, 1)
        fitted[layer] = fit_logistic(
            values, known, c=choice.c, max_iter=settings.max_iter, seed=evaluation.seed
        )
        evaluation.progress(f"fitting {layer}", 1, 1)
        facts[layer] = {
            "c": choice.c,
            "validation_top1": choice.accuracies,
            "validation": "the set's own" if own else "drawn from train by the seed",
            "fitted_on": len(known),
            "iterations": fitted[layer].iterations,
            "converged": fitted[layer].iterations < settings.max_iter,
        }
    test = extract(evaluation, network, TEST, layers)
    probed = _Probed(labels_of(evaluation, TEST, test), test.rows)
    probed.scores = [(layer, fitted[layer].scores(test.values[layer])) for layer in layers]
    probed.facts = facts
    return probed


def _by_sgd(
    evaluation: Evaluation,
    network: Network,
    layers: tuple[str, ...],
    settings: LinearProbeSettings,
) -> _Probed:
    feed = _views if settings.augment else _cached
    epoch, widths = feed(evaluation, network, layers, settings)
    heads = Heads(
        widths,
        len(evaluation.dataset.class_names),
        batch_norm=settings.batch_norm,
        affine=settings.official_quirks,
        seed=evaluation.seed,
        device=evaluation.device,
    )
    said = "linear layers" if network is evaluation.trained else "linear layers, untrained encoder"
    course = train_heads(
        heads, epoch, settings, lambda done: evaluation.progress(said, done, settings.epochs)
    )
    test = extract(evaluation, network, TEST, layers)
    probed = _Probed(labels_of(evaluation, TEST, test), test.rows)
    probed.scores = [(layer, heads.scores(layer, test.values[layer])) for layer in layers]
    probed.facts = {layer: dict(course.facts) for layer in layers}
    probed.curves = [
        Curve("Training loss", "nats", course.losses),
        Curve("Training accuracy", "share of images", course.accuracies),
    ]
    return probed


# The batches of an epoch, and the width of each layer.
_Feed = tuple[Callable[[int], Iterator[HeadBatch]], dict[str, int]]


def _cached(
    evaluation: Evaluation,
    network: Network,
    layers: tuple[str, ...],
    settings: LinearProbeSettings,
) -> _Feed:
    """Each training image as at evaluation, its outputs computed once."""
    train = extract(evaluation, network, TRAIN, layers)
    labels = torch.from_numpy(labels_of(evaluation, TRAIN, train)).to(evaluation.device)
    values = {
        layer: torch.from_numpy(train.values[layer]).to(evaluation.device) for layer in layers
    }

    def epoch(number: int) -> Iterator[HeadBatch]:
        draw = np.random.default_rng([evaluation.seed, number])
        order = torch.from_numpy(draw.permutation(len(labels))).to(evaluation.device)
        size = settings.batch_size
        for i in range(max(1, len(order) // size)):
            rows = order[i * size : (i + 1) * size]
            yield HeadBatch({name: each[rows] for name, each in values.items()}, labels[rows])

    return epoch, {name: each.shape[1] for name, each in values.items()}


def _views(
    evaluation: Evaluation,
    network: Network,
    layers: tuple[str, ...],
    settings: LinearProbeSettings,
) -> _Feed:
    """New crops and flips in each epoch, as the authors train; the encoder runs in every step."""
    views = TrainingViews(evaluation, TRAIN)
    kept = Extracted(views.rows, {})
    labels = torch.from_numpy(labels_of(evaluation, TRAIN, kept)).to(evaluation.device)
    encode = encode_with(network.encoder, layers)
    side = evaluation.bundle.contract.size_px
    blank = encode(torch.zeros(1, 3, side, side, device=evaluation.device))

    def epoch(number: int) -> Iterator[HeadBatch]:
        batches = views.epoch(settings.batch_size, seed=evaluation.seed, epoch=number)
        for batch in batches:
            # Made in inference mode, which autograd would refuse to differentiate by.
            values = {name: rows.clone() for name, rows in encode(batch.pixels).items()}
            yield HeadBatch(values, labels[torch.from_numpy(batch.places).to(labels.device)])

    return epoch, {name: rows.shape[1] for name, rows in blank.items()}
